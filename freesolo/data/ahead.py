"""Items made ready in a thread, while whoever uses them is at work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class _End:
    """There are no more items, because of an error or because there were no more."""

    error: BaseException | None = None


def made_ahead(items: Generator[Item, None, None], count: int) -> Iterator[Item]:
    """The same items in the same order, each made while those before it are used.

    The generator runs in a thread of its own, and is closed in it: when it ends, or soon after this iterator is closed.

    Args:
        items: What makes them.
        count: How many may be ready and wait; one more is being made.

    Raises:
        BaseException: What the generator raised, after the items that it made before.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(count)
    closed = threading.Event()

    def put(item: Item | _End) -> bool:
        while not closed.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=_LOOK_SECONDS)
                return True
        return False

    def make() -> None:
        end = _End()
        try:
            with closing(items):
                for item in items:
                    if not put(item):
                        return
        except BaseException as error:  # noqa: BLE001  raised where the items are used
            end = _End(error)
        put(end)

    threading.Thread(target=make, name="made ahead", daemon=True).start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
    finally:
        closed.set()
    if item.error is not None:
        raise item.error
