"""A parquet file's size, told from its footer as pyarrow tells it from a whole file."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from freesolo.data.parquet_footer import declared_size

TABLE = pa.table(
    {
        "number": pa.array(range(1000)),
        "text": pa.array([None if i % 7 == 0 else str(i % 3) for i in range(1000)]),
        "list": pa.array([[{"a": i, "b": [0.5] * (i % 4)}] * (i % 3) for i in range(1000)]),
        "half": pa.array(np.arange(1000, dtype=np.float16)),
        "is": pa.array([i % 2 == 0 for i in range(1000)]),
    }
)


def written(table: pa.Table = TABLE, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd", "row_group_size": 30},
        {"use_dictionary": False, "write_statistics": False, "version": "1.0"},
        {"data_page_version": "2.0", "write_page_index": True, "sorting_columns": [pq.SortingColumn(0)]},
    ],
)
def test_it_is_what_pyarrow_says(options: dict[str, object]) -> None:
    data = written(**options)
    metadata = pq.read_metadata(io.BytesIO(data))
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    expected = (sum(c.num_values for c in columns), sum(c.total_uncompressed_size for c in columns))
    assert declared_size(data) == expected


def test_an_empty_table_has_no_values() -> None:
    sink = io.BytesIO()
    pq.write_table(TABLE[:0], sink)
    assert declared_size(sink.getvalue())[0] == 0


@pytest.mark.parametrize(
    "footer",
    [
        b"",  # ends before its end
        b"\x19\xfc\xff\xff\xff\xff\x7f",  # a list that declares more than there is
        b"\x1c" * 40 + b"\0" * 41,  # structures in structures
        b"\x16" + b"\xff" * 12 + b"\0",  # a number without an end
        b"\x1d\0",  # a type that is none
        b"\x15\x02\0",  # another structure's fields
        b"\x48\x01x\0",  # row groups that are text
    ],
)
def test_a_damaged_footer_is_refused(footer: bytes) -> None:
    with pytest.raises(ValueError, match="a damaged parquet footer"):
        declared_size(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1\xff\xff\xff\xffPAR1", b"x" * 100])
def test_what_does_not_end_as_parquet_is_none(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a parquet file"):
        declared_size(data)


def test_every_cut_and_every_changed_byte_is_read_or_refused() -> None:
    data = written(TABLE.select(["list"]), store_schema=False, write_statistics=False)
    length = int.from_bytes(data[-8:-4], "little")
    for place in range(len(data) - 8 - length, len(data) - 8):
        for value in (0, 0x19, 0xFF, data[place] ^ 1):
            changed = data[:place] + bytes([value]) + data[place + 1 :]
            try:
                values, size = declared_size(changed)
                assert min(values, size) >= 0
            except ValueError:
                continue
