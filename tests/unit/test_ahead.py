"""Items made in a thread are the same ones, and so is what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from freesolo.data.ahead import made_ahead


def test_items_are_the_same_and_are_made_while_others_are_used() -> None:
    made: list[int] = []
    one_more = threading.Event()

    def items() -> Generator[int, None, None]:
        for number in range(5):
            made.append(number)
            if len(made) == 2:
                one_more.set()
            yield number

    used = made_ahead(items(), 1)
    assert next(used) == 0
    assert one_more.wait(10), "while the first is used the second is made"
    time.sleep(0.05)
    assert made == [0, 1], "and no others"
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
    closed_in: list[threading.Thread] = []

    def items() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            closed_in.append(threading.current_thread())

    used = made_ahead(items(), 1)
    next(used)
    used.close()  # as when the loop that uses it ends with an error
    (thread,) = closed_in
    assert thread is not threading.current_thread(), "a generator must not be closed while its thread runs it"
    assert not thread.is_alive(), "nothing is left that could still ask for anything"
