"""Which sample is seen when: the order of an epoch, and how workers share it so that each sample is seen exactly once.

An epoch's order is a function of (seed, epoch) and the manifest's shard sizes. Shards are permuted, neighbours in that
permutation form windows of `window_shards`, and the samples of a window are permuted among themselves. A position in
the order is an integer in [0, samples); a `Span` is a run of positions of one epoch.

What a run has still to see of the epochs that it has opened is a short list of spans: its `StreamState`, which every
checkpoint carries. A *pass* takes those spans (opening the next epoch when less than a batch is left), cuts them into
one contiguous part per worker and lets each worker stream its part. After any number of steps what is left is again a
list of spans, so a run can stop anywhere and go on with another number of workers: nothing is seen twice or missed.
Samples that don't fill a last batch are carried into the next pass. With the same number of workers the parts that are
left are the very parts the workers were reading, so a resumed run sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `start` to `stop` (exclusive) of an epoch's order."""

    epoch: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class StreamState:
    """What is still to be seen: the unseen spans of opened epochs, and the first epoch that is not opened yet."""

    next_epoch: int = 0
    unseen: tuple[Span, ...] = ()

    def to_json(self) -> dict[str, object]:
        """A JSON-able form that `from_json` reads back."""
        return {"next_epoch": self.next_epoch, "unseen": [[span.epoch, span.start, span.stop] for span in self.unseen]}

    @classmethod
    def from_json(cls, record: dict[str, object]) -> StreamState:
        """The state that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: It did not write this.
        """
        unseen = record["unseen"]
        next_epoch = record["next_epoch"]
        if type(next_epoch) is not int or next_epoch < 0 or not isinstance(unseen, list):
            raise ValueError("not a stream's state")
        for numbers in unseen:
            if [type(number) for number in numbers] != [int, int, int] or not (
                0 <= numbers[0] < next_epoch and 0 <= numbers[1] < numbers[2]
            ):
                raise ValueError(f"not a span of epochs below {next_epoch}: {numbers}")
        return cls(next_epoch, tuple(Span(*numbers) for numbers in unseen))


@dataclass(frozen=True, slots=True)
class Pass:
    """One division of unseen samples among workers.

    Attributes:
        steps: Optimiser steps in this pass.
        parts: The spans of each worker, `steps * batch_size / workers` positions each.
        carried: Positions left over, less than a batch; they open the next pass.
        next_epoch: The first epoch that this pass does not open.
    """

    steps: int
    parts: tuple[tuple[Span, ...], ...]
    carried: tuple[Span, ...]
    next_epoch: int

    def after(self, steps: int, batch_size: int) -> StreamState:
        """What is unseen after `steps` steps of this pass."""
        seen = steps * batch_size // len(self.parts)
        rest = [span for part in self.parts for span in _slice(part, seen, _total(part))]
        return StreamState(self.next_epoch, _merge([*rest, *self.carried]))


@dataclass(frozen=True, slots=True)
class Window:
    """Shards whose samples are mixed with one another; `index` counts an epoch's windows."""

    seed: int
    epoch: int
    index: int
    shards: tuple[int, ...]
    samples: int

    def permutation(self) -> np.ndarray:
        """Which of its samples (its shards' samples, concatenated) comes at each place, `(samples,)`."""
        return np.random.default_rng([self.seed, self.epoch, self.index]).permutation(self.samples)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a window's permuted samples, `start` to `stop` (exclusive): what one read task reads."""

    window: Window
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Order:
    """The order of every epoch of one data set.

    Attributes:
        shard_samples: Number of samples of each shard, in the manifest's order.
        seed: Of all permutations.
        window_shards: Shards per window.
    """

    shard_samples: tuple[int, ...]
    seed: int
    window_shards: int = 1

    @property
    def samples(self) -> int:
        """Samples in the data set."""
        return sum(self.shard_samples)

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch, in the order in which they are read."""
        permuted = np.random.default_rng([self.seed, epoch]).permutation(len(self.shard_samples)).tolist()
        groups = [permuted[i : i + self.window_shards] for i in range(0, len(permuted), self.window_shards)]
        return [
            Window(self.seed, epoch, index, tuple(shards), sum(self.shard_samples[shard] for shard in shards))
            for index, shards in enumerate(groups)
        ]

    def pieces(self, spans: Iterable[Span]) -> Iterator[Piece]:
        """The pieces of windows that hold the positions of `spans`, in order."""
        for span in spans:
            windows = self.windows(span.epoch)
            stops = accumulate(window.samples for window in windows)
            for window, stop in zip(windows, stops, strict=True):
                offset = stop - window.samples
                first, last = max(span.start, offset), min(span.stop, stop)
                if first < last:
                    yield Piece(window, first - offset, last - offset)


def take_pass(state: StreamState, samples: int, batch_size: int, workers: int) -> Pass:
    """Divide what is unseen among workers, opening epochs until there is at least one batch.

    Args:
        state: What is unseen.
        samples: Samples in the data set.
        batch_size: Samples of a step, all workers together.
        workers: Number of train workers.

    Raises:
        ValueError: The data set is empty, or the batch does not divide by the workers.
    """
    if samples <= 0:
        raise ValueError("cannot stream an empty data set")
    if batch_size % workers:
        raise ValueError(f"batch_size={batch_size} is not divisible by {workers} workers")
    unseen, epoch = list(state.unseen), state.next_epoch
    while _total(unseen) < batch_size:
        unseen.append(Span(epoch, 0, samples))
        epoch += 1
    steps = _total(unseen) // batch_size
    share = steps * batch_size // workers
    parts = tuple(_slice(unseen, worker * share, (worker + 1) * share) for worker in range(workers))
    return Pass(steps, parts, _slice(unseen, steps * batch_size, _total(unseen)), epoch)


def seen_at_most(epoch: int, samples: int, batch_size: int) -> int:
    """A bound on the samples seen of all epochs, by all workers together, when a pass ends that has some of this epoch.

    Where such a pass begins no later epoch has been read, and it holds less than an epoch and a batch.
    """
    return (epoch + 2) * samples + batch_size


def advance(state: StreamState, steps: int, samples: int, batch_size: int, workers: int) -> StreamState:
    """What is unseen after `steps` more steps of `workers` workers that started at `state` together."""
    while steps > 0:
        current = take_pass(state, samples, batch_size, workers)
        state = current.after(min(steps, current.steps), batch_size)
        steps -= current.steps
    return state


def worker_spans(
    state: StreamState, samples: int, *, steps: int, batch_size: int, worker: int, workers: int
) -> Iterator[Span]:
    """What one worker reads in the next `steps` steps, in order: `steps * batch_size / workers` positions."""
    while steps > 0:
        current = take_pass(state, samples, batch_size, workers)
        taken = min(steps, current.steps)
        yield from _slice(current.parts[worker], 0, taken * batch_size // workers)
        state = current.after(taken, batch_size)
        steps -= taken


def _total(spans: list[Span] | tuple[Span, ...]) -> int:
    return sum(len(span) for span in spans)


def _slice(spans: list[Span] | tuple[Span, ...], start: int, stop: int) -> tuple[Span, ...]:
    """Positions `start` to `stop` of the concatenation of `spans`."""
    taken, offset = [], 0
    for span in spans:
        first, last = max(start - offset, 0), min(stop - offset, len(span))
        if first < last:
            taken.append(Span(span.epoch, span.start + first, span.start + last))
        offset += len(span)
    return tuple(taken)


def _merge(spans: list[Span]) -> tuple[Span, ...]:
    """The same positions in the same order, with neighbours that touch joined."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].epoch == span.epoch and merged[-1].stop == span.start:
            merged[-1] = Span(span.epoch, merged[-1].start, span.stop)
        else:
            merged.append(span)
    return tuple(merged)
