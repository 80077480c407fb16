"""What a parquet file says of its size, read from its footer alone.

pyarrow tells it, too, but asking it for a column of a damaged file ends the whole process (`std::terminate`, in
pyarrow 25): its C++ raises where its Python does not expect it. The footer is Thrift's compact protocol, of which a
reader is short: a structure becomes a dictionary of its field numbers, and who wants a field knows its number.
"""

from __future__ import annotations

from typing import Any

_MAGIC = b"PAR1"
_MAX_DEPTH = 16  # ours is 8 deep
_TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 6, 7, 8, 9, 10, 11, 12
# Numbers of fields, in parquet.thrift's FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _META_DATA, _NUM_VALUES, _TOTAL_UNCOMPRESSED_SIZE = 4, 1, 3, 5, 6


def declared_size(data: bytes) -> tuple[int, int]:
    """Values in all columns of a parquet file, and bytes of all of its pages once they are uncompressed.

    Raises:
        ValueError: It has no footer, or a damaged one.
    """
    values = size = 0
    try:
        for group in _footer(data)[_ROW_GROUPS]:
            for column in group[_COLUMNS]:
                chunk = column[_META_DATA]
                values += _at_least_0(chunk[_NUM_VALUES])
                size += _at_least_0(chunk[_TOTAL_UNCOMPRESSED_SIZE])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"a damaged parquet footer ({error!r})") from error
    return values, size


def _footer(data: bytes) -> dict[int, Any]:
    length = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[-4:] != _MAGIC or length > len(data) - 8:
        raise ValueError("not a parquet file: it does not end as one")
    structure: dict[int, Any] = _Reader(data[len(data) - 8 - length : -8]).value(_STRUCT, 0)
    return structure


def _at_least_0(number: int) -> int:
    if number < 0:
        raise ValueError(f"a damaged parquet footer: {number} where a count should be")
    return number


class _Reader:
    """Thrift's compact protocol, front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def value(self, kind: int, depth: int) -> Any:
        """The value that comes next, of a known type; its end raises `IndexError`."""
        if depth > _MAX_DEPTH:
            raise ValueError("a damaged parquet footer: nested too deep")
        if kind == _BYTE:
            return self._byte()
        if _BYTE < kind <= _I64:
            number = self._varint()
            return (number >> 1) ^ -(number & 1)
        if kind in (_DOUBLE, _BINARY):
            return self._bytes(8 if kind == _DOUBLE else self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._element(head & 15, depth) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return [(self._element(kinds >> 4, depth), self._element(kinds & 15, depth)) for _ in range(count)]
        if kind == _STRUCT:
            return self._structure(depth)
        raise ValueError(f"a damaged parquet footer: type {kind}")

    def _structure(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self.value(_I64, depth)
            kind = head & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self.value(kind, depth + 1)
        return fields

    def _element(self, kind: int, depth: int) -> Any:
        """Of a list or a map, where a boolean has a byte of its own."""
        return self._byte() if kind in (_TRUE, _FALSE) else self.value(kind, depth + 1)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._data):
            raise IndexError("its end is missing")
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise ValueError("a damaged parquet footer: a number that is too long")
