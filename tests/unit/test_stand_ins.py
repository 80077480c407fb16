"""Stand-ins for unusable samples: a function of the epoch's order and of what is usable in it, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from freesolo.data.order import Span
from freesolo.data.stand_ins import STAND_INS, with_stand_ins


@dataclass
class Epochs:
    """The same samples in every epoch, in the order of their numbers; `reads`: spans that were looked back at."""

    samples: int
    unusable: frozenset[int]
    reads: list[Span] = field(default_factory=list)

    def rows(self, spans: tuple[Span, ...]) -> Iterator[dict[str, Any]]:
        for span in spans:
            for place in range(span.start, span.stop):
                yield {"key": (span.epoch, place), "error": "damaged" if place in self.unusable else None}

    def look_back(self, spans: tuple[Span, ...]) -> Iterator[dict[str, Any]]:
        self.reads += spans
        return self.rows(spans)

    def seen(self, *spans: Span, reach: int | None = None) -> list[tuple[int, int] | None]:
        """What takes each place of the spans: (epoch, place), or None."""
        rows = with_stand_ins(
            self.rows(spans),
            spans,
            self.look_back,
            samples=self.samples,
            reach=self.samples if reach is None else reach,
        )
        return [None if stand_in is None else stand_in["key"] for _, stand_in in rows]

    def expected(self, place: int) -> int | None:
        """Written from the definition: go back, place by place, once around."""
        if place not in self.unusable:
            return place
        back = [(place - distance) % self.samples for distance in range(1, self.samples)]
        before = [other for other in back if other not in self.unusable]
        if not before:
            return None
        in_a_row = back.index(before[0])  # unusable ones between the nearest usable one and this
        turns = before[:STAND_INS]
        # The first of the row is replaced by the nearest, the second by the next nearest.
        return turns[in_a_row % len(turns)]


epochs = st.integers(1, 60).flatmap(
    lambda samples: st.builds(Epochs, st.just(samples), st.frozensets(st.integers(0, samples - 1)))
)


def test_the_nearest_before_takes_the_place_and_then_the_one_before_that() -> None:
    many = Epochs(100, frozenset({50, 60, 61, 62}))
    seen = [place for _, place in many.seen(Span(0, 0, 100))]
    assert seen[48:52] == [48, 49, 49, 51]
    assert seen[58:64] == [58, 59, 59, 58, 57, 63]
    assert many.reads == []


def test_a_long_run_takes_turns() -> None:
    many = Epochs(1000, frozenset(range(500, 600)))
    seen = [place for _, place in many.seen(Span(0, 0, 1000))]
    assert seen[500 : 500 + STAND_INS] == list(range(499, 499 - STAND_INS, -1))
    assert seen[500 + STAND_INS : 600] == seen[500 : 600 - STAND_INS]


def test_an_epoch_is_a_circle_and_stays_the_same_epoch() -> None:
    assert Epochs(4, frozenset({0, 1})).seen(Span(7, 0, 4)) == [(7, 3), (7, 2), (7, 2), (7, 3)]


@given(epochs, st.data())
def test_wherever_a_span_begins_the_stand_ins_are_the_same(some: Epochs, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, some.samples - 1))
    stop = data.draw(st.integers(start + 1, some.samples))
    cut = data.draw(st.integers(start, stop))
    spans = [span for span in (Span(3, start, cut), Span(3, cut, stop)) if len(span)]
    expected = [some.expected(place) for place in range(start, stop)]
    assert some.seen(*spans) == [None if place is None else (3, place) for place in expected]


def test_with_stand_ins_cost_no_reading_and_a_lost_window_is_looked_over_once_a_span() -> None:
    whole = Epochs(1000, frozenset())
    assert whole.seen(Span(0, 200, 300)) == [(0, place) for place in range(200, 300)]
    assert whole.reads == []
    lost = Epochs(1000, frozenset(range(100, 300)))
    assert None not in lost.seen(Span(0, 250, 300), reach=200 + 2 * STAND_INS)
    assert lost.reads == [Span(0, 250 - 2 * STAND_INS, 250), Span(0, 250 - 200 - 2 * STAND_INS, 250)]


def test_far_and_wide_nothing_usable_is_told_without_reading_everything() -> None:
    none = Epochs(10**9, frozenset(range(1000)))
    assert none.seen(Span(0, 500, 502), reach=100) == [None, None]
    assert sum(len(span) for span in none.reads) == 2 * STAND_INS + 100
