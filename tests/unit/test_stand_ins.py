"""Stand-ins for unusable samples: a function of the epoch's order and of what is usable in it, and of nothing else."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freesolo.data.order import Span, seen_at_most
from freesolo.data.stand_ins import STAND_INS, with_stand_ins
from freesolo.errors import JobError

BATCH = 4


@dataclass
class Epochs:
    """The same samples in every epoch, in the order of their numbers; `reads`: spans that were looked back at."""

    samples: int
    unusable: Container[int]
    reads: list[Span] = field(default_factory=list)

    def rows(self, spans: tuple[Span, ...]) -> Iterator[dict[str, Any]]:
        for span in spans:
            for place in range(span.start, span.stop):
                yield {"key": (span.epoch, place), "error": "damaged" if place in self.unusable else None}

    def look_back(self, spans: tuple[Span, ...]) -> Iterator[dict[str, Any]]:
        self.reads += spans
        return self.rows(spans)

    def seen(self, *spans: Span, share: float = 1.0) -> list[tuple[int, int]]:
        """What takes each place of the spans: (epoch, place)."""
        rows = with_stand_ins(
            self.rows(spans), spans, self.look_back, samples=self.samples, batch_size=BATCH, max_bad_samples=share
        )
        return [used["key"] for _, used in rows]

    def expected(self, place: int) -> int:
        """Written from the definition: go back, place by place, once around."""
        if place not in self.unusable:
            return place
        back = [(place - distance) % self.samples for distance in range(1, self.samples)]
        before = [other for other in back if other not in self.unusable]
        in_a_row = back.index(before[0])  # unusable ones between the nearest usable one and this
        turns = before[:STAND_INS]
        # The first of the row is replaced by the nearest, the second by the next nearest.
        return turns[in_a_row % len(turns)]


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


@given(st.data())
def test_wherever_a_span_begins_the_stand_ins_are_the_same_or_the_epoch_is_over_its_budget(data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, 120))
    places = st.integers(0, samples - 1)
    lost = data.draw(st.lists(st.builds(range, places, places), max_size=3))
    unusable = data.draw(st.frozensets(places)).union(*lost)
    share = data.draw(st.sampled_from([0.0, 0.02, 0.1, 0.2, 1.0]))
    start = data.draw(places)
    stop = data.draw(st.integers(start + 1, samples))
    cut = data.draw(st.integers(start, stop))
    spans = [span for span in (Span(0, start, cut), Span(0, cut, stop)) if len(span)]
    some = Epochs(samples, unusable)
    try:
        seen = some.seen(*spans, share=share)
    except JobError:
        assert len(unusable) > share * seen_at_most(0, samples, BATCH) or len(unusable) == samples
    else:
        assert seen == [(0, some.expected(place)) for place in range(start, stop)]


@pytest.mark.parametrize("place", [150, 200, 250, 299, 300, 350, 399])
def test_a_run_goes_on_inside_the_first_second_or_third_of_neighbouring_lost_windows(place: int) -> None:
    three_lost = Epochs(1000, range(100, 400))
    uninterrupted = three_lost.seen(Span(0, 0, 1000), share=0.3)
    assert three_lost.reads == []
    assert three_lost.seen(Span(0, place, 1000), share=0.3) == uninterrupted[place:]


def test_with_stand_ins_cost_no_reading_and_lost_windows_are_looked_over_once_a_span() -> None:
    whole = Epochs(1000, frozenset())
    assert whole.seen(Span(0, 200, 300)) == [(0, place) for place in range(200, 300)]
    assert whole.reads == []
    lost = Epochs(1000, range(100, 300))
    lost.seen(Span(0, 250, 300))
    assert lost.reads == [Span(0, 250 - 32, 250), Span(0, 994, 1000), Span(0, 0, 250)], "32 before it, then 256"


def test_within_the_budget_enough_is_found_and_above_it_nothing_else_stands_in() -> None:
    """In the first epoch a tenth of two epochs and a batch: see `seen_at_most`."""
    within, above = Epochs(1000, range(100, 300)), Epochs(1000, range(100, 302))
    assert within.seen(Span(0, 299, 300), share=0.1) == [(0, within.expected(299))]
    with pytest.raises(JobError, match="more than the 200 that"):
        above.seen(Span(0, 301, 302), share=0.1)


def test_no_more_is_looked_over_than_the_budget_allows_to_be_unusable() -> None:
    lost = Epochs(10**6, range(10**5, 10**6))
    told = r"epoch 0: unusable samples, more than the 2000 that stream\.max_bad_samples=0\.001 allows; first: "
    with pytest.raises(JobError, match=rf"{told}\(0, 500000\) \(damaged\)"):
        lost.seen(Span(0, 500_000, 500_002), share=0.001)
    distances = [2 * STAND_INS, 8 * 2 * STAND_INS, 2000 + STAND_INS]
    assert lost.reads == [Span(0, 500_000 - distance, 500_000) for distance in distances]


def test_an_epoch_without_a_usable_sample_is_told_whatever_the_budget() -> None:
    with pytest.raises(JobError, match=r"epoch 7: unusable samples, nothing else; first: \(7, 0\) \(damaged\)"):
        Epochs(100, range(100)).seen(Span(7, 0, 2), share=1.0)
