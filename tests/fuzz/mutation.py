"""Inputs for parsers: valid files, damaged at random; the same seed gives the same input anywhere."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

_NUMBERS = (b"0", b"-1", b"1", b"255", b"65535", b"2147483648", b"9223372036854775808", b"1e999", b"NaN", b"0.5")
_WORDS = (
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"../../x",
    b"/etc/passwd",
    b"\\ud800",
    b"\x00",
    b"\xff\xfe",
    b"[" * 200,
)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        7,
        2**31,
        2**63,
        2**64,
        10**400,
        -0.5,
        0.5,
        1e300,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "../x", "/etc/passwd", "s3://a/b", "a\x00b", "\x1b[31m", "\ud800", "0" * 64, "shard-000000", "x" * 5000),
    *([], [[]], {}, {"": None}, [1, 2, 3, 4], [1.5] * 6, [float("nan")] * 6, [1e9] * 6, "10", [0], [-5, 53], "abc"),
)


def mutate_bytes(seeds: Sequence[bytes], source: random.Random) -> bytes:
    """One of the seeds with some of its bytes changed, added, taken away or another seed's; at times no seed at all."""
    if source.random() < 0.03:
        return source.randbytes(source.choice((0, 1, 16, 300, 2000)))
    data = bytearray(source.choice(seeds))
    for _ in range(source.choice((1, 1, 1, 2, 3, 8))):
        source.choice(_CHANGES)(data, seeds, source)
    return bytes(data)


def mutate_json(document: Any, source: random.Random) -> Any:
    """A JSON value with some of the values or names in it replaced, repeated, moved or missing."""
    document = deepcopy(document)
    for _ in range(source.choice((1, 1, 2, 4))):
        holder, place = _somewhere(document, source)
        if holder is None:
            return deepcopy(source.choice(_VALUES))
        kind = source.random()
        if kind < 0.55:
            holder[place] = deepcopy(source.choice(_VALUES))
        elif kind < 0.7:
            other, other_place = _somewhere(document, source)
            assert other is not None
            holder[place] = deepcopy(other[other_place])
        elif kind < 0.8:
            value: Any = holder[place]
            for _ in range(source.choice((1, 70, 400))):
                value = [value]
            holder[place] = value
            return document  # what nests that deep cannot be changed further
        elif kind < 0.9:
            del holder[place]
            if not document:
                return document
        elif isinstance(holder, dict):
            holder[str(source.choice(_VALUES))[:100]] = holder.pop(place)
        else:
            holder.append(deepcopy(holder[place]))
    return document


def write_json(document: Any) -> bytes:
    """The bytes of a JSON value, with what JSON lacks as Python writes it, half surrogates and all."""
    return json.dumps(document, ensure_ascii=True).encode()


def _somewhere(document: Any, source: random.Random) -> tuple[Any, Any]:
    """A dictionary or list in a value, and a key or place of it; None where there is none."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        value = waiting.pop()
        places = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for place in places:
            found.append((value, place))
            if isinstance(value[place], dict | list):
                waiting.append(value[place])
    return source.choice(found) if found else (None, None)


def _flip(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    if data:
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def _set(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    if data:
        data[source.randrange(len(data))] = source.choice((0, 1, 127, 128, 255, source.randrange(256)))


def _widen(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    """A number of two, four or eight bytes at its limits."""
    width = source.choice((2, 4, 8))
    if len(data) >= width:
        place = source.randrange(len(data) - width + 1)
        number = source.choice((0, 1, 2**15, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1))
        data[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, source.choice(("big", "little")))


def _insert(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    place = source.randrange(len(data) + 1)
    data[place:place] = source.choice((source.randbytes(source.randrange(1, 9)), *_WORDS, *_NUMBERS))


def _delete(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    place = source.randrange(len(data) + 1)
    del data[place : place + source.choice((1, 2, 4, 16, 512))]


def _repeat(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    start = source.randrange(len(data) + 1)
    piece = bytes(data[start : start + source.choice((1, 4, 64, 512))])
    data[start:start] = piece * source.choice((1, 2, 20))


def _truncate(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    del data[source.randrange(len(data) + 1) :]


def _splice(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    other = source.choice(seeds)
    start = source.randrange(len(other) + 1)
    place = source.randrange(len(data) + 1)
    data[place:] = other[start:]


def _renumber(data: bytearray, seeds: Sequence[bytes], source: random.Random) -> None:
    """A number written in digits becomes another."""
    numbers = list(re.finditer(rb"\d+", data[:100_000]))
    if numbers:
        number = source.choice(numbers)
        data[number.start() : number.end()] = source.choice(_NUMBERS)


_Change = Callable[[bytearray, Sequence[bytes], random.Random], None]
_CHANGES: tuple[_Change, ...] = (_flip, _set, _widen, _insert, _delete, _repeat, _truncate, _splice, _renumber)
