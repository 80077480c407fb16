"""How far long work has come, told on standard error: a bar on a terminal, a line now and then elsewhere.

Standard output is left alone, because a job's last line there is its result.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import IO, Protocol, cast, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0
"""A log that is followed shows life; one that is kept stays short."""

SECONDS_BETWEEN_SAMPLES = 1.0
SAMPLES_OF_THE_RATE = 30
"""The rate is that of the last samples, not of all time: the first steps of training are slow and say nothing."""


@runtime_checkable
class Stream(Protocol):
    """What is needed of the stream that is written to."""

    def write(self, text: str, /) -> object:
        """Append text."""

    def flush(self) -> None:
        """Let it be seen."""

    def isatty(self) -> bool:
        """Whether a person looks at it as it is written."""


@runtime_checkable
class Advance(Protocol):
    """Tells a `progress` that `count` more items are done; may be called from any thread."""

    def __call__(self, count: int = 1) -> None:
        """`count` more items are done; at least 0."""


def describe_seconds(seconds: float) -> str:
    """A length of time in the two units that matter: "0.4 s", "12 s", "1 min 53 s", "2 h 5 min", "3 d 4 h"."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit}" + (f" {rest} {smaller_unit}" if rest else "")
    return f"{whole} s"


def describe_progress(done: int, total: int | None, unit: str, *, rate: float, elapsed: float | None = None) -> str:
    """One line about work: "120/470 images, 3.1/s, 1 min 53 s left".

    Args:
        done: Items that are done.
        total: Items in all; None where nobody knows.
        unit: What an item is, in the plural. Of "bytes", megabytes are shown.
        rate: Items per second; 0 where it is not known yet, then neither rate nor time left are shown.
        elapsed: Seconds that the work took, once it is over; then they are shown in place of the time left.
    """
    parts = [_amount(done, total, unit)]
    if rate > 0:
        parts.append(f"{rate / 1e6:.1f} MB/s" if unit == "bytes" else f"{_round_rate(rate)}/s")
    if elapsed is not None:
        parts.append(f"took {describe_seconds(elapsed)}")
    elif rate > 0 and total is not None:
        parts.append(f"{describe_seconds(max(total - done, 0) / rate)} left")
    return ", ".join(parts)


@contextmanager
def progress(
    name: str,
    *,
    total: int | None,
    unit: str = "items",
    done: int = 0,
    stream: Stream | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
    """Show how far a piece of work has come, from entry to exit.

    On a terminal a bar is drawn in place and replaced by one line at the end; elsewhere a line is written at most every
    `SECONDS_BETWEEN_LINES`, and one at the end. Work that raises says where it stopped. Not to be nested.

    ```python
    with progress("pack", total=len(photos), unit="photos") as advance:
        for photo in photos:
            write(photo)
            advance()
    ```

    Args:
        name: The work's name, the start of each line.
        total: Items in all; None where nobody knows.
        unit: What an item is, in the plural. Of "bytes", megabytes are shown.
        done: Items that were done before, by a run that this one continues; they do not count in the rate.
        stream: Where to write; default: standard error.
        clock: Seconds from any origin, never going back.
    """
    target = sys.stderr if stream is None else stream
    meter = _Meter(total, unit, done, clock)
    display = _bar(name, meter, target) if _draws_bars(target) else nullcontext(_Lines(name, meter, target))
    verdict = "stopped at "
    try:
        with display as show:
            yield _Advance(meter, show)
        verdict = ""
    finally:
        target.write(f"{name}: {verdict}{meter.summary()}\n")
        target.flush()


class _Meter:
    """Counts items and knows how fast they have come lately."""

    def __init__(self, total: int | None, unit: str, done: int, clock: Callable[[], float]) -> None:
        self.total = total
        self.done = done
        self._unit = unit
        self._clock = clock
        self.started = clock()
        self._done_before = done
        self._samples: deque[tuple[float, int]] = deque([(self.started, done)], maxlen=SAMPLES_OF_THE_RATE)

    def add(self, count: int) -> float:
        """Count items; the time now."""
        if count < 0:
            raise ValueError(f"progress cannot go back: advance({count})")
        now = self._clock()
        self.done += count
        if now - self._samples[-1][0] >= SECONDS_BETWEEN_SAMPLES:
            self._samples.append((now, self.done))
        return now

    def status(self) -> str:
        """Amount, rate of late and time left."""
        since, before = self._samples[0]
        return describe_progress(
            self.done, self.total, self._unit, rate=_per_second(self.done - before, self._clock() - since)
        )

    def summary(self) -> str:
        """Amount, mean rate and time taken."""
        elapsed = self._clock() - self.started
        rate = _per_second(self.done - self._done_before, elapsed)
        return describe_progress(self.done, self.total, self._unit, rate=rate, elapsed=elapsed)


class _Lines:
    """Writes a line when the last one is old enough."""

    def __init__(self, name: str, meter: _Meter, stream: Stream) -> None:
        self._name = name
        self._meter = meter
        self._stream = stream
        self._last = meter.started  # the first line waits too, so that short work writes only its summary

    def __call__(self, now: float) -> None:
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self._stream.write(f"{self._name}: {self._meter.status()}\n")
            self._stream.flush()


class _Advance:
    """Counts, then shows, one thread at a time."""

    def __init__(self, meter: _Meter, show: Callable[[float], None]) -> None:
        self._meter = meter
        self._show = show
        self._lock = threading.Lock()

    def __call__(self, count: int = 1) -> None:
        with self._lock:
            self._show(self._meter.add(count))


class _StatusColumn(TextColumn):
    """The meter's words; asked at each refresh, so that the rate falls when the work stalls."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__("")
        self._meter = meter

    def render(self, task: object) -> Text:
        return Text(self._meter.status(), style="progress.remaining")


@contextmanager
def _bar(name: str, meter: _Meter, stream: Stream) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn(name, markup=False), BarColumn(bar_width=30), _StatusColumn(meter))
    # rich would otherwise send standard output to the bar's stream, and a job's result with it.
    with Progress(*columns, console=_console(stream), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=meter.total, completed=meter.done)
        yield lambda _now: bar.update(task, completed=meter.done)


def _draws_bars(stream: Stream) -> bool:
    return stream.isatty() and not _console(stream).is_dumb_terminal


def _console(stream: Stream) -> Console:
    return Console(file=cast("IO[str]", stream))  # rich asks for more than it uses


def _amount(done: int, total: int | None, unit: str) -> str:
    if unit == "bytes":
        return f"{done / 1e6:.1f} MB" if total is None else f"{done / 1e6:.1f}/{total / 1e6:.1f} MB"
    return f"{done} {unit}" if total is None else f"{done}/{total} {unit}"


def _round_rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"


def _per_second(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
