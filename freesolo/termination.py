"""SIGTERM, which is how schedulers and `ray job stop` ask a process to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM
"""The exit code of who ended because of it, as shells have it."""


@contextmanager
def on_termination(ask: Callable[[], object]) -> Iterator[None]:
    """Let the first SIGTERM in the block ask for an end in good order; a second one leaves at once.

    Outside of the main thread, where no signal arrives, nothing changes.

    Args:
        ask: Called in the main thread, between two of its steps. What it raises, the block raises.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def act(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            leave()
        asked = True
        ask()

    before = signal.signal(signal.SIGTERM, act)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave() -> None:
    """End this process, cleaning up on the way.

    Raises:
        SystemExit: Always.
    """
    raise SystemExit(TERMINATED)
