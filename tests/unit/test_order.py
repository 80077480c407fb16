"""The order of epochs: every sample once an epoch, whatever stops, restarts and changes of workers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freesolo.data.order import Order, Span, StreamState, advance, seen_at_most, take_pass, worker_spans

SHARDS = (5, 3, 7, 4)  # 19 samples


def seen_by(order: Order, state: StreamState, steps: int, batch_size: int, workers: int) -> list[list[tuple[int, int]]]:
    """(epoch, sample) of each worker's stream."""
    streams = []
    for worker in range(workers):
        spans = worker_spans(state, order.samples, steps=steps, batch_size=batch_size, worker=worker, workers=workers)
        streams.append([sample for piece in order.pieces(spans) for sample in _samples_of(order, piece)])
    return streams


def _samples_of(order: Order, piece) -> list[tuple[int, int]]:
    starts = [sum(order.shard_samples[:shard]) for shard in range(len(order.shard_samples))]
    members = [starts[shard] + i for shard in piece.window.shards for i in range(order.shard_samples[shard])]
    places = piece.window.permutation()[piece.start : piece.stop]
    return [(piece.window.epoch, members[place]) for place in places]


def test_an_epoch_holds_each_sample_once_and_differs_from_the_next() -> None:
    order = Order(SHARDS, seed=3, window_shards=2)
    (stream,) = seen_by(order, StreamState(), steps=38, batch_size=1, workers=1)
    first, second = stream[:19], stream[19:]
    assert sorted(first) == [(0, sample) for sample in range(19)]
    assert sorted(second) == [(1, sample) for sample in range(19)]
    assert [sample for _, sample in first] != [sample for _, sample in second]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    streams = [seen_by(Order(SHARDS, seed), StreamState(), 19, 1, 1) for seed in (1, 1, 2)]
    assert streams[0] == streams[1] != streams[2]


def test_a_window_mixes_its_shards_and_only_those() -> None:
    order = Order(SHARDS, seed=0, window_shards=2)
    windows = order.windows(epoch=5)
    assert sorted(shard for window in windows for shard in window.shards) == [0, 1, 2, 3]
    assert [len(window.shards) for window in windows] == [2, 2]
    assert sorted(windows[0].permutation()) == list(range(windows[0].samples))


def test_what_does_not_fill_a_batch_is_carried_into_the_next_pass() -> None:
    # 19 samples, batch 4: 4 steps and 3 samples over; the next pass has 3 + 19 = 22: 5 steps and 2 over.
    first = take_pass(StreamState(), 19, 4, workers=2)
    assert (first.steps, first.carried, first.next_epoch) == (4, (Span(0, 16, 19),), 1)
    assert first.parts == ((Span(0, 0, 8),), (Span(0, 8, 16),))
    second = take_pass(first.after(4, 4), 19, 4, workers=2)
    assert (second.steps, second.carried, second.next_epoch) == (5, (Span(1, 17, 19),), 2)
    assert second.parts[0] == (Span(0, 16, 19), Span(1, 0, 7))


def test_a_batch_larger_than_the_data_set_takes_several_epochs() -> None:
    stream = seen_by(Order((2, 1), seed=0), StreamState(), steps=1, batch_size=7, workers=1)[0]
    assert Counter(epoch for epoch, _ in stream) == {0: 3, 1: 3, 2: 1}


def test_what_is_unseen_after_some_steps_is_each_workers_rest() -> None:
    state = advance(StreamState(), 1, samples=19, batch_size=4, workers=2)
    assert state == StreamState(1, (Span(0, 2, 8), Span(0, 10, 19)))
    assert StreamState.from_json(state.to_json()) == state


def test_resumed_equals_uninterrupted_with_the_same_workers() -> None:
    order = Order(SHARDS, seed=7)
    whole = seen_by(order, StreamState(), 14, 4, 2)
    for stop in range(14):
        state = advance(StreamState(), stop, 19, 4, 2)
        head, tail = seen_by(order, StreamState(), stop, 4, 2), seen_by(order, state, 14 - stop, 4, 2)
        assert [a + b for a, b in zip(head, tail, strict=True)] == whole


@given(
    shards=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    legs=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 3, 4, 6])), max_size=6),
    window=st.integers(1, 3),
)
def test_each_sample_is_seen_once_an_epoch_across_changes_of_workers(shards, legs, window) -> None:
    order, state, seen = Order(tuple(shards), 0, window), StreamState(), Counter()
    for steps, workers in legs:
        for stream in seen_by(order, state, steps, 12, workers):
            seen.update(stream)
        state = advance(state, steps, order.samples, 12, workers)
    unseen = Counter()
    for piece in order.pieces(state.unseen):
        unseen.update(_samples_of(order, piece))
    assert seen + unseen == {(epoch, i): 1 for epoch in range(state.next_epoch) for i in range(order.samples)}


@given(
    samples=st.integers(1, 40),
    legs=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 6])), min_size=1, max_size=6),
)
def test_while_an_epoch_is_read_no_more_is_seen_than_its_bound(samples, legs) -> None:
    state = StreamState()
    for steps, workers in legs:
        current = take_pass(state, samples, 12, workers)
        still_unseen = sum(len(span) for span in current.carried)
        oldest = min(span.epoch for part in current.parts for span in part)
        assert current.next_epoch * samples - still_unseen <= seen_at_most(oldest, samples, 12)
        state = advance(state, steps, samples, 12, workers)


def test_an_empty_data_set_and_an_odd_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        take_pass(StreamState(), 0, 4, 1)
    with pytest.raises(ValueError, match="batch_size=4 is not divisible by 3 workers"):
        take_pass(StreamState(), 19, 4, 3)
