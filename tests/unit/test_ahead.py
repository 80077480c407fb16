"""Items made in a thread are the same ones, and so is what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from freesolo.data.ahead import made_ahead


def test_items_are_the_same_and_are_made_while_others_are_used() -> None:
    made: list[int] = []
    two_more = threading.Event()

    def items() -> Generator[int, None, None]:
        for number in range(5):
            made.append(number)
            if len(made) == 3:
                two_more.set()
            yield number

    used = made_ahead(items(), 1)
    assert next(used) == 0
    assert two_more.wait(10), "while the first is used the second waits and the third is made"
    time.sleep(0.05)
    assert made == [0, 1, 2], "and no others"
    assert list(used) == [1, 2, 3, 4]


def test_none_are_none() -> None:
    assert list(made_ahead((number for number in ()), 1)) == []


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise KeyError("gone")

    used = made_ahead(items(), 1)
    assert [next(used), next(used)] == [1, 2]
    with pytest.raises(KeyError, match="gone"):
        next(used)


def test_who_stops_early_closes_it() -> None:
    closed = threading.Event()

    def items() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    used = made_ahead(items(), 1)
    next(used)
    used.close()  # type: ignore[attr-defined]  # as when the loop that uses it ends with an error
    assert closed.wait(10)
