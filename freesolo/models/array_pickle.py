"""Pickles of NumPy arrays, which detectron2 keeps weights in (`.pkl`): written, and read without running any of them.

A pickle is a program that may call whatever it names. Here it can name a few things, all of them stand-ins of ours,
which make arrays of numbers and nothing else; whatever else it holds must be dictionaries, lists, texts and numbers.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

_TYPES = frozenset(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"))
_BYTE_ORDERS: dict[str, Literal["<", ">"]] = {"<": "<", ">": ">", "|": "<", "=": "<"}
_MAX_DIMENSIONS = 32
_MAX_DEPTH = 64
_MAX_VALUES = 1_000_000
_TORCH_MAGIC = bytes.fromhex("80028a0a6cfc9c46f920")  # how torch's files before 1.6 begin, which are pickles too


def is_array_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later does, and not as torch's files do."""
    with path.open("rb") as file:
        head = file.read(len(_TORCH_MAGIC))
    return head[:1] == b"\x80" and head != _TORCH_MAGIC


def read_array_pickle(path: Path) -> Any:
    """The arrays, as tensors, and plain values of a file, in the containers that they are in.

    Raises:
        ValueError: It holds anything else, code perhaps, or is damaged; says why in a few words.
    """
    try:
        content = _Reader(io.BytesIO(path.read_bytes())).load()
        return _plain(content)
    except _RefusedError:
        raise
    except Exception as error:
        # The reader of pickles raises whatever its parsing of a damaged file happens to: IndexError, KeyError, ...
        raise ValueError(f"it is damaged, or no pickle of arrays ({type(error).__name__})") from error


def write_array_pickle(content: dict[str, Any], path: Path) -> None:
    """Write a dictionary of arrays and plain values as a pickle that NumPy 1 and 2 both read.

    Raises:
        OSError: The disk is full, or will not have it.
    """
    written = pickle.dumps(content, protocol=2)
    # NumPy 2 names its own parts by where they are now, which NumPy 1 does not know; it knows itself by the old name.
    # The first array names them, and the others refer to it, so nothing of an array's numbers comes before.
    path.write_bytes(written.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))


class _RefusedError(ValueError):
    """What a file holds is not read, whatever it is."""


class _Reader(pickle._Unpickler):
    """A reader for which nothing that runs has a name.

    It is Python's own, in Python: the one in C makes a table as large as any number in the file says.
    """

    def __init__(self, file: io.BytesIO) -> None:
        # As Python 2's texts, which is what the oldest of the field's files hold.
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get(f"{module}.{name}")
        if stand_in is None:
            raise _RefusedError(
                f"it holds {f'{module}.{name}'!r:.80}, which is no array or plain value: code of whoever made it, "
                "which is not run"
            )
        return stand_in()

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError("it refers to something outside of it")

    def get_extension(self, code: int) -> NoReturn:
        raise _RefusedError("it refers to something outside of it")


class _ArrayType:
    """Stands for `numpy.ndarray`, which an array's recipe names as what to make."""

    __slots__ = ()


class _DataType:
    """Stands for `numpy.dtype`: called with a name, it makes one that its state completes."""

    __slots__ = ()

    def __call__(self, name: object, *_: object) -> _NumberType:
        return _NumberType(name)


class _NumberType:
    """A type of numbers that is read."""

    __slots__ = ("dtype",)

    def __init__(self, name: object) -> None:
        if not isinstance(name, str) or name not in _TYPES:
            raise _RefusedError(f"an array of {name!r:.40}, which are no numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in _BYTE_ORDERS or any(state[2:5]):
            raise _RefusedError("an array of structures")
        self.dtype = self.dtype.newbyteorder(_BYTE_ORDERS[state[1]])


class _MakeArray:
    """Stands for NumPy's function that begins an array, which its state completes."""

    __slots__ = ()

    def __call__(self, kind: object, shape: object, typecode: object) -> _Array:
        del shape, typecode  # of the empty array that NumPy would begin with
        if not isinstance(kind, _ArrayType):
            raise _RefusedError("an array of a kind of its own")
        return _Array()


class _Array:
    """An array of numbers; none until it has its state."""

    __slots__ = ("numbers",)

    def __init__(self) -> None:
        self.numbers: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, number_type, by_column, content = state
        if not isinstance(number_type, _NumberType) or not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
            raise _RefusedError("an array that is described wrongly")
        if isinstance(content, str):
            content = content.encode("latin1")  # Python 2's texts were bytes
        if not isinstance(content, bytes | bytearray) or not all(type(side) is int and side >= 0 for side in shape):
            raise _RefusedError("an array that is described wrongly")
        if math.prod(shape) * number_type.dtype.itemsize != len(content):
            raise _RefusedError(f"an array of shape {shape!s:.80} with more or fewer numbers than that")
        numbers = np.frombuffer(bytes(content), number_type.dtype)
        self.numbers = numbers.reshape(shape, order="F" if by_column else "C")


class _MakeNumber:
    """Stands for NumPy's function that makes a number of an array's type."""

    __slots__ = ()

    def __call__(self, number_type: object, content: object) -> Any:
        if isinstance(content, str):
            content = content.encode("latin1")
        if not isinstance(number_type, _NumberType) or not isinstance(content, bytes):
            raise _RefusedError("a number that is described wrongly")
        if len(content) != number_type.dtype.itemsize:
            raise _RefusedError("a number that is described wrongly")
        return np.frombuffer(content, number_type.dtype)[0].item()


class _Encode:
    """Stands for `_codecs.encode`, which is how Python 3 writes bytes for Python 2."""

    __slots__ = ()

    def __call__(self, text: object, encoding: object) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise _RefusedError("bytes that are described wrongly")
        return text.encode("latin1")


class _EmptyBytes:
    """Stands for `bytes`, which is how Python 3 writes none of them for Python 2."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


class _Dictionary:
    """Stands for `collections.OrderedDict`."""

    __slots__ = ()

    def __call__(self) -> dict[Any, Any]:
        return {}


_STAND_INS: dict[str, type[Any]] = {
    "numpy.ndarray": _ArrayType,
    "numpy.dtype": _DataType,
    "numpy.core.multiarray._reconstruct": _MakeArray,
    "numpy._core.multiarray._reconstruct": _MakeArray,
    "numpy.core.multiarray.scalar": _MakeNumber,
    "numpy._core.multiarray.scalar": _MakeNumber,
    "_codecs.encode": _Encode,
    "builtins.bytes": _EmptyBytes,
    "__builtin__.bytes": _EmptyBytes,
    "collections.OrderedDict": _Dictionary,
}


def _plain(content: Any) -> Any:
    """Arrays as tensors, everything else as it is; refuses what is neither."""
    visits = itertools.count(1)

    def visit(value: Any, depth: int) -> Any:
        # A list may be in itself, or twice in each of a chain of lists.
        if depth > _MAX_DEPTH or next(visits) > _MAX_VALUES:
            raise _RefusedError(f"it holds more than {_MAX_VALUES} values, or containers {_MAX_DEPTH} deep")
        if isinstance(value, _Array):
            return _tensor(value)
        if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            return {key: visit(each, depth + 1) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [visit(each, depth + 1) for each in value]
        if value is None or isinstance(value, str | bytes | int | float):
            return value
        raise _RefusedError(f"it holds a {type(value).__name__.lstrip('_')}, which is no array or plain value")

    return visit(content, 0)


def _tensor(array: _Array) -> Tensor:
    if array.numbers is None:
        raise _RefusedError("an array without numbers")
    native = array.numbers.astype(array.numbers.dtype.newbyteorder("="), order="C")  # a copy, which can be written to
    if not np.isfinite(native).all():
        raise _RefusedError("values that are NaN or infinite")
    return torch.from_numpy(native)
