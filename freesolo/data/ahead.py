"""Items made ready in a thread, while whoever uses them is at work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _End:
    """There are no more items, because of an error or because there were no more."""

    error: BaseException | None = None


def made_ahead(items: Generator[Item, None, None], count: int) -> Generator[Item, None, None]:
    """The same items in the same order, each made while those before it are used.

    The generator runs in a thread of its own, and is closed in it; when this one is closed, that is waited for.

    Args:
        items: What makes them.
        count: How many may be ready and wait.

    Raises:
        BaseException: What the generator raised, after the items that it made before.
    """
    ready: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()
    room = threading.Semaphore(count)
    closed = threading.Event()

    def make() -> None:
        end = _End()
        try:
            with closing(items):
                while room.acquire() and not closed.is_set():
                    ready.put(next(items))
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001  raised where the items are used
            end = _End(error)
        ready.put(end)

    thread = threading.Thread(target=make, name="made ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            room.release()
            yield item
    finally:
        closed.set()
        room.release()
        thread.join()
    if item.error is not None:
        raise item.error
