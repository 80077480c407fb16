"""What fails now and then is tried again: exponential backoff with full jitter, for a bounded time.

Full jitter (a wait drawn evenly between nothing and the backoff): a thousand workers that lost one store at one moment
come back to it spread out, not in step.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long something is tried again.

    Attributes:
        seconds: From the first try to the last one. Two minutes outlast a restart or a fail-over
            of a store, and a job whose store is really away says so before anybody wonders.
        first_wait: At most this long after the first failure, in seconds; twice as long after each further one.
        longest_wait: But never longer than this.
    """

    seconds: float = 120.0
    first_wait: float = 0.5
    longest_wait: float = 10.0


PATIENCE = Patience()


class StillFailingError(Exception):
    """What was tried again and again until patience ended; the last failure is its cause.

    Attributes:
        tries: How often it was tried.
        seconds: From the first try until now.
    """

    def __init__(self, tries: int, seconds: float) -> None:
        super().__init__(f"tried {tries} times in {seconds:.0f} s")
        self.tries = tries
        self.seconds = seconds


def wait_seconds(patience: Patience, *, failures: int, elapsed: float, chance: float) -> float | None:
    """How long to wait before the next try; None: give up.

    The last try is made when patience ends, however the waits were drawn.

    Args:
        patience: How long to go on.
        failures: Tries so far, at least 1; all of them failed.
        elapsed: Seconds since the first try began.
        chance: In [0, 1): drawn evenly.
    """
    if elapsed >= patience.seconds:
        return None
    doublings = min(failures - 1, 64)  # more would overflow, and are far beyond the longest wait
    ceiling = min(patience.longest_wait, patience.first_wait * 2.0**doublings)
    return min(chance * ceiling, patience.seconds - elapsed)


def persist(
    act: Callable[[], Result],
    subject: str,
    transient: Callable[[BaseException], bool],
    *,
    patience: Patience | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    chance: Callable[[], float] = random.random,
) -> Result:
    """Do something that may fail in passing, until it is done; each failure is a line in the log.

    Args:
        act: What to do. It may have been done although it failed, and is then done twice: it must stand that.
        subject: What it is done to; begins each line.
        transient: Whether an error may pass. Any other is raised as it is, at once.
        patience: None: `PATIENCE`.
        clock: Seconds of a clock that never goes back.
        sleep: Waits that many seconds.
        chance: Draws evenly from [0, 1).

    Raises:
        StillFailingError: It failed until patience ended; the last failure is the cause.
    """
    patience = PATIENCE if patience is None else patience
    began, failures = clock(), 0
    while True:
        try:
            result = act()
        except Exception as error:
            if not transient(error):
                raise
            failures += 1
            elapsed = clock() - began
            wait = wait_seconds(patience, failures=failures, elapsed=elapsed, chance=chance())
            if wait is None:
                raise StillFailingError(failures, elapsed) from error
            _LOG.warning(
                "%s: try %d failed (%s); again in %.1f s, for %.0f s more",
                *(subject, failures, one_line(error), wait, patience.seconds - elapsed),
            )
            sleep(wait)
        else:
            if failures:
                _LOG.warning("%s: try %d succeeded, %.1f s after the first", subject, failures + 1, clock() - began)
            return result


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
