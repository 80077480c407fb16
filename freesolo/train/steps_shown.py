"""How far train workers have come, shown where a person looks: at the terminal of the process that started them.

Worker 0 tells an actor, and a thread beside the waiting driver asks it. The other way round, the driver tells the actor
when training shall stop, and worker 0 hears of it. A group of workers that is lost and started
again goes on from its last checkpoint, and is shown as what it is: the one stopped, the other goes on from there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from freesolo.progress import Advance, progress

SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True, slots=True)
class StepsDone:
    """Where the training is.

    Attributes:
        group: How many times workers were started; 0: not yet.
        begun: The step that the last of them began at.
        done: Steps done, those before `begun` included.
    """

    group: int = 0
    begun: int = 0
    done: int = 0


class StepBoard:
    """Holds the last word of worker 0 and of the driver; lives in an actor."""

    def __init__(self) -> None:
        self._steps = StepsDone()
        self._stop = asyncio.Event()

    async def begin(self, step: int) -> None:
        """Workers were started, and go on from a step."""
        self._steps = StepsDone(self._steps.group + 1, step, step)

    async def tell(self, step: int) -> None:
        """So many steps are done."""
        self._steps = replace(self._steps, done=step)

    async def read(self) -> StepsDone:
        """What was told last."""
        return self._steps

    async def stop(self) -> None:
        """Training shall stop."""
        self._stop.set()

    async def stop_wanted(self) -> None:
        """Returns when training shall stop."""
        await self._stop.wait()


@contextmanager
def steps_shown(name: str, total: int) -> Iterator[Any]:
    """Show the steps of a training from entry to exit; yields the board's handle, for workers and driver.

    Args:
        name: Of the training.
        total: Steps of the whole training.
    """
    board: Any = ray.remote(num_cpus=0)(StepBoard).remote()
    over = threading.Event()
    follower = threading.Thread(target=_follow, args=(board, name, total, over), name="steps shown", daemon=True)
    follower.start()
    try:
        yield board
    finally:
        over.set()
        follower.join()
        ray.kill(board)


class _Stopped(Exception):  # noqa: N818  it is no error: the display says where the group stopped
    """A group of workers ended before the training did."""


def _follow(board: Any, name: str, total: int, over: threading.Event) -> None:
    # A board that was lost with its node costs the display, not the training.
    with suppress(RayError):
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            start: StepsDone = ray.get(board.read.remote())
            if start.group:
                with suppress(_Stopped), progress(name, total=total, unit="steps", done=start.begun) as advance:
                    _follow_group(board, start, total, over, advance)


def _follow_group(board: Any, start: StepsDone, total: int, over: threading.Event, advance: Advance) -> None:
    done = start.begun
    while True:
        last_look = over.wait(SECONDS_BETWEEN_LOOKS)
        steps: StepsDone = ray.get(board.read.remote())
        if steps.group != start.group:
            raise _Stopped
        advance(steps.done - done)
        done = steps.done
        if last_look:
            if done < total:
                raise _Stopped
            return
