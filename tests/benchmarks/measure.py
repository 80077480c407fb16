"""Time two ways of doing the same thing on the same inputs, in turns, and say how they compare.

A machine's speed drifts while it measures: it warms up, and others use it. Ours and the peer's turns therefore
alternate, each repeat has a ratio of its own, and it is the ratios whose median and spread are reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Generic, TypeVar

import torch
from rich.table import Table

Ours = TypeVar("Ours")
Peers = TypeVar("Peers")

Clock = Callable[[], float]
"""Seconds since any fixed moment."""


@dataclass(frozen=True, slots=True)
class Case(Generic[Ours, Peers]):
    """One thing done in two ways.

    Attributes:
        name: What is done.
        peer_name: Who else does it, and how.
        ours: Does it our way; called many times, must answer the same each time.
        peer: Does it the peer's way, on the same inputs.
        assert_equal: Raises AssertionError where our answer, its first argument, is not the peer's, its second.
        repeats: How many times each way is timed where nothing else is asked for: fewer where it takes long.
        flops: Floating-point operations of a call of ours; None where they are not what limits it.
        untimed: Calls before each timed one, of ways that have something to start, or to stop.
        limit: Does only what no way can do without; timed like them.
    """

    name: str
    peer_name: str
    ours: Callable[[], Ours]
    peer: Callable[[], Peers]
    assert_equal: Callable[[Ours, Peers], None]
    repeats: int = 9
    flops: float | None = None
    untimed: int = 0
    limit: Callable[[], object] | None = None

    def check(self) -> None:
        """Do it both ways once.

        Raises:
            AssertionError: If the answers differ: times of different work cannot be compared.
        """
        self.assert_equal(self.ours(), self.peer())


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Some cases on one kind of inputs.

    Attributes:
        name: What to ask for on the command line.
        inputs: What the cases are given.
        cases: Makes the inputs and the cases on them, for a device.
        needs: Packages of its peers that this project does not install.
    """

    name: str
    inputs: str
    cases: Callable[[torch.device], Iterable[Case[Any, Any]]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds that each repeat took, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """In seconds."""
        return median(self.seconds)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How long a case took both ways; measurement i of `ours` and of `peer` were taken one right after the other."""

    name: str
    peer_name: str
    ours: Measurement
    peer: Measurement
    flops: float | None = None
    limit: Measurement | None = None

    def share_of_limit(self, peak: float) -> float | None:
        """Of what is possible, what ours does at the median; None where nobody knows what that is.

        Args:
            peak: Floating-point operations a second that the device can do.
        """
        if self.limit is not None:
            return self.limit.median / self.ours.median
        return None if self.flops_per_second is None else self.flops_per_second / peak

    @property
    def flops_per_second(self) -> float | None:
        """Ours, at the median; None where they are not what limits it."""
        return None if self.flops is None else self.flops / self.ours.median

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as long as ours the peer took in each repeat: above 1 where ours is the faster."""
        pairs = zip(self.ours.seconds, self.peer.seconds, strict=True)
        return tuple(peer / ours for ours, peer in pairs)


def clock_of(device: torch.device) -> Clock:
    """A clock that waits for what the device was given to do."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def matrix_product_rate(device: torch.device, *, side: int, repeats: int = 9) -> float:
    """Floating-point operations a second of one large matrix product: what nothing on this device is faster than.

    Args:
        device: Where to multiply; in bfloat16 on a GPU, else in float32, as training does.
        side: Of the square matrices; the median of `repeats` products.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    first, second = torch.randn(2, side, side, device=device, dtype=dtype)  # zeros would be multiplied faster
    clock = clock_of(device)
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        first @ second
        seconds.append(clock() - start)
    return float(2 * side**3 / median(seconds[1:]))


def compare(case: Case[Any, Any], *, repeats: int | None = None, clock: Clock = time.perf_counter) -> Comparison:
    """Check that both ways give the same answer, then time them in turns.

    The check is also the warm-up. Who goes first changes with each repeat, so that neither always follows the other.

    Args:
        case: What to do.
        repeats: How many times each way is timed, at least 1; None: the case's own.
        clock: Read before and after each call.

    Raises:
        AssertionError: If the answers differ.
    """
    case.check()
    ours: list[float] = []
    peer: list[float] = []
    limit: list[float] = []
    for repeat in range(repeats or case.repeats):
        turns: list[tuple[Callable[[], object], list[float]]] = [(case.ours, ours), (case.peer, peer)]
        in_turn = turns[::-1] if repeat % 2 else turns
        if case.limit is not None:
            in_turn.append((case.limit, limit))
        for action, seconds in in_turn:
            for _ in range(case.untimed):
                action()
            seconds.append(_timed(action, clock))
    measured = (Measurement(tuple(seconds)) for seconds in (ours, peer))
    return Comparison(
        case.name, case.peer_name, *measured, flops=case.flops, limit=Measurement(tuple(limit)) if limit else None
    )


def _timed(action: Callable[[], object], clock: Clock) -> float:
    start = clock()
    action()
    return clock() - start


def table(benchmark: Benchmark, comparisons: Sequence[Comparison], *, peak: float) -> Table:
    """One row a case: medians of both, and the median ratio with the lowest and the highest.

    Args:
        benchmark: Names the table.
        comparisons: Its rows.
        peak: Floating-point operations a second that the device can do (`matrix_product_rate`).
    """
    result = Table(
        title=f"{benchmark.name}: {benchmark.inputs}",
        caption="medians over the repeats; above 1 ours is the faster; limit: a large matrix product, or as said",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("case\npeer", min_width=20)
    for heading in ("repeats", "ours", "of the limit", "peer's", "peer's / ours\n(lowest to highest)"):
        result.add_column(heading, justify="right", no_wrap=True)
    for comparison in comparisons:
        ratios, share = comparison.ratios, comparison.share_of_limit(peak)
        result.add_row(
            f"{comparison.name}\n[dim]{comparison.peer_name}[/dim]",
            str(len(ratios)),
            _milliseconds(comparison.ours.median),
            "" if share is None else f"{share:.0%}",
            _milliseconds(comparison.peer.median),
            f"{median(ratios):.2f}\n({min(ratios):.2f} to {max(ratios):.2f})",
        )
    return result


def as_json(benchmark: Benchmark, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What `table` shows, and every repeat."""
    return {
        "name": benchmark.name,
        "inputs": benchmark.inputs,
        "cases": [
            {
                "name": comparison.name,
                "peer": comparison.peer_name,
                "ours_seconds": list(comparison.ours.seconds),
                "peer_seconds": list(comparison.peer.seconds),
                "flops_per_second": comparison.flops_per_second,
                "limit_seconds": None if comparison.limit is None else list(comparison.limit.seconds),
                "ratio": {
                    "median": median(comparison.ratios),
                    "lowest": min(comparison.ratios),
                    "highest": max(comparison.ratios),
                },
            }
            for comparison in comparisons
        ],
    }


def _milliseconds(seconds: float) -> str:
    # Three digits are more than a repeat on a shared machine tells.
    milliseconds = 1000 * seconds
    return f"{milliseconds:,.{0 if milliseconds >= 100 else 1}f} ms"
