"""What a training sees in place of a sample that it cannot use: others, from before it in its epoch's order.

Which ones depends on that order and on what is usable in it, and on nothing else: not on batches, nor on how many
workers read, or from where they went on. So a training with unusable samples is as reproducible as any other, and one
that meets lost shards goes on as far as its budget of bad samples allows. What is before a worker's first samples is
read for it, as far back as there can be unusable samples within that budget: where even there too few are usable, the
epoch has more unusable ones than the training would have been allowed to meet, and it stops at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from freesolo.data.order import Span, seen_at_most
from freesolo.data.views import Row
from freesolo.errors import JobError

STAND_INS = 16
"""Samples that take turns where many in a row are unusable: enough that no batch is one picture many times."""


def with_stand_ins(
    rows: Iterator[Row],
    spans: Iterable[Span],
    read: Callable[[tuple[Span, ...]], Iterator[Row]],
    *,
    samples: int,
    batch_size: int,
    max_bad_samples: float,
) -> Iterator[tuple[Row, Row]]:
    """Find others for the rows that have an `error`.

    For the first of several in a row stands the usable row before them, for the second the one before that, and so on
    through `STAND_INS` of them, over and over. An epoch's order is a circle here: before its first row comes its last.

    Args:
        rows: Those of `spans`, in their order.
        spans: Where they are in the order of epochs.
        read: Reads the rows of any spans, for what is before one that does not begin with usable rows.
        samples: In an epoch.
        batch_size: Samples of a step.
        max_bad_samples: Share of the samples seen that may be unusable before the training is stopped.

    Yields:
        Each row, and what to use for it: itself, or its stand-in.

    Raises:
        JobError: An epoch has no usable row, or more unusable ones than may be met; names one.
    """
    for span in spans:
        recent: deque[Row] = deque(maxlen=STAND_INS)
        unusable_in_a_row = 0
        looked_back = False
        for row in islice(rows, len(span)):
            if not row["error"]:
                recent.append(row)
                unusable_in_a_row = 0
                yield row, row
                continue
            if len(recent) < STAND_INS and not looked_back:
                most_unusable = int(max_bad_samples * seen_at_most(span.epoch, samples, batch_size))
                reach = min(most_unusable + STAND_INS, samples)
                before, trailing = _before(span, read, samples, reach)
                if not before or (len(before) < STAND_INS and reach < samples):
                    limit = f"more than the {most_unusable} that stream.max_bad_samples={max_bad_samples:g} allows"
                    raise JobError(
                        f"epoch {span.epoch}: unusable samples, {limit if reach < samples else 'nothing else'}; "
                        f"first: {row['key']} ({row['error']})"
                    )
                unusable_in_a_row = 0 if recent else trailing
                # Of an epoch with fewer usable rows each takes its turn once.
                recent = deque([*before, *recent], maxlen=len(before))
                looked_back = True
            yield row, recent[-1 - unusable_in_a_row % len(recent)]
            unusable_in_a_row += 1


def _before(
    span: Span, read: Callable[[tuple[Span, ...]], Iterator[Row]], samples: int, reach: int
) -> tuple[list[Row], int]:
    """The last `STAND_INS` usable rows before a span, or all within reach, and how many unusable ones follow them."""
    distance = 0
    while True:
        distance = min(max(8 * distance, 2 * STAND_INS), reach)
        usable: deque[Row] = deque(maxlen=STAND_INS)
        trailing = 0
        for row in read(_leading_to(span, distance, samples)):
            if row["error"]:
                trailing += 1
            else:
                usable.append(row)
                trailing = 0
        if len(usable) == STAND_INS or distance == reach:
            return list(usable), trailing


def _leading_to(span: Span, distance: int, samples: int) -> tuple[Span, ...]:
    """The `distance` positions before a span of the same epoch, around the circle."""
    start = span.start - distance
    if start >= 0:
        return (Span(span.epoch, start, span.start),)
    end_of_epoch = Span(span.epoch, samples + start, samples)
    return (end_of_epoch, Span(span.epoch, 0, span.start)) if span.start else (end_of_epoch,)
