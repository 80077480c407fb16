"""Trying again: how long is waited, when it ends, what is said. Time is a number here; nothing sleeps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freesolo.data.retry import Patience, StillFailingError, persist, wait_seconds

PATIENCE = Patience(seconds=60.0, first_wait=0.5, longest_wait=8.0)


class Time:
    """A clock that only sleeping moves, and tries that take `cost` seconds each."""

    def __init__(self, cost: float = 0.0) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.cost = cost

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(time: Time, failures: float, error: Exception) -> Callable[[], str]:
    """Fails that many times, then answers."""
    tries = itertools.count(1)

    def act() -> str:
        time.now += time.cost
        if next(tries) <= failures:
            raise error
        return "done"

    return act


def run(act: Callable[[], str], time: Time, *, chance: float = 0.999) -> str:
    return persist(
        act,
        "s3://b/x",
        lambda error: isinstance(error, ConnectionError),
        patience=PATIENCE,
        clock=lambda: time.now,
        sleep=time.sleep,
        chance=lambda: chance,
    )


@pytest.mark.parametrize(("failures", "ceiling"), [(1, 0.5), (2, 1.0), (3, 2.0), (5, 8.0), (6, 8.0), (10_000, 8.0)])
def test_waits_double_up_to_the_longest(failures: int, ceiling: float) -> None:
    assert wait_seconds(PATIENCE, failures=failures, elapsed=0.0, chance=0.5) == pytest.approx(ceiling / 2)
    assert wait_seconds(PATIENCE, failures=failures, elapsed=0.0, chance=0.0) == 0.0


def test_the_last_try_is_made_when_patience_ends() -> None:
    assert wait_seconds(PATIENCE, failures=9, elapsed=58.0, chance=0.9) == pytest.approx(2.0)
    assert wait_seconds(PATIENCE, failures=9, elapsed=60.0, chance=0.9) is None
    assert wait_seconds(PATIENCE, failures=1, elapsed=600.0, chance=0.9) is None


@given(failures=st.integers(1, 10**6), elapsed=st.floats(0, 59.99), chance=st.floats(0, 1, exclude_max=True))
def test_no_wait_is_negative_too_long_or_beyond_patience(failures: int, elapsed: float, chance: float) -> None:
    wait = wait_seconds(PATIENCE, failures=failures, elapsed=elapsed, chance=chance)
    assert wait is not None
    assert 0.0 <= wait <= PATIENCE.longest_wait
    assert elapsed + wait <= PATIENCE.seconds + 1e-9


def test_what_fails_in_passing_is_tried_until_it_is_done(caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    with caplog.at_level(logging.WARNING):
        assert run(failing(time, 3, ConnectionResetError("reset\nby peer")), time) == "done"
    assert time.slept == pytest.approx([0.5, 1.0, 2.0], rel=0.01)
    assert [record.exc_info for record in caplog.records] == [None] * 4, "no tracebacks"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "s3://b/x: try 1 failed (reset by peer); again in 0.5 s, for 60 s more"
    assert lines[2] == "s3://b/x: try 3 failed (reset by peer); again in 2.0 s, for 59 s more"
    assert lines[3] == "s3://b/x: try 4 succeeded, 3.5 s after the first"


def test_what_succeeds_at_once_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    assert run(failing(Time(), 0, ConnectionError()), Time()) == "done"
    assert not caplog.records


def test_what_will_not_pass_is_raised_at_once() -> None:
    time = Time()
    with pytest.raises(PermissionError, match="no"):
        run(failing(time, 1, PermissionError("no")), time)
    assert not time.slept


@pytest.mark.parametrize("cost", [0.0, 30.0])
def test_patience_ends(cost: float) -> None:
    """With tries that fail at once, and with tries that take half of all patience each."""
    time, away = Time(cost), ConnectionError("away")
    with pytest.raises(StillFailingError, match=r"^tried \d+ times in \d+ s$") as ended:
        run(failing(time, float("inf"), away), time)
    assert ended.value.__cause__ is away
    assert 60.0 <= time.now - 1000.0 <= 60.0 + cost
    assert ended.value.tries == len(time.slept) + 1
