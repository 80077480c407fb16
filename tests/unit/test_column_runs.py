"""Masks enlarged as runs of their columns are those that are enlarged pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freesolo.ops.column_runs import ColumnRuns
from freesolo.ops.masks import Projections, encode_rle, resize_masks_soft

SIZES = st.tuples(st.integers(1, 8), st.integers(1, 8))
LARGER_OR_SMALLER = st.tuples(st.integers(1, 24), st.integers(1, 24))


def soft_masks(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed))


def test_where_a_column_passes_the_threshold_is_told_by_two_values() -> None:
    # Rows of the result lie at -1/4, 1/4, 3/4, 5/4 of the two rows: values 0, 1/4, 3/4, 1.
    runs = ColumnRuns.enlarged(torch.tensor([[[0.0], [1.0]]]), 4, 1, 0.5)
    assert (runs.columns.tolist(), runs.tops.tolist(), runs.bottoms.tolist()) == ([0], [2], [4])
    runs = ColumnRuns.enlarged(torch.tensor([[[1.0], [0.0]]]), 4, 1, 0.5)
    assert (runs.tops.tolist(), runs.bottoms.tolist()) == ([0], [2])
    runs = ColumnRuns.enlarged(torch.tensor([[[0.0], [1.0]]]), 4, 1, 0.1)
    assert (runs.tops.tolist(), runs.bottoms.tolist()) == ([1], [4])


@pytest.mark.parametrize(("column", "top", "bottom"), [([0.0, 1.0], 3, 5), ([1.0, 0.0], 0, 2)])
def test_what_is_at_the_threshold_is_not_above_it(column: list[float], top: int, bottom: int) -> None:
    # Of five rows the middle one lies halfway between the two: 1/2.
    runs = ColumnRuns.enlarged(torch.tensor(column)[None, :, None], 5, 1, 0.5)
    assert (runs.tops.tolist(), runs.bottoms.tolist()) == ([top], [bottom])


def test_a_row_of_the_map_that_is_at_a_threshold_which_float32_has_not() -> None:
    # 0.3 is not float32's 0.3; the middle row of nine is the middle one of three.
    soft = torch.tensor([0.9, 0.3, 0.9])[None, :, None]
    runs = ColumnRuns.enlarged(soft, 9, 1, 0.3)
    assert (runs.tops.tolist(), runs.bottoms.tolist()) == ([0, 5], [4, 9])
    assert torch.equal(runs.pixels(), resize_masks_soft(soft, 9, 1) > 0.3)


@given(st.integers(0, 3), SIZES, LARGER_OR_SMALLER, st.sampled_from([0.1, 0.25, 0.3, 0.5]), st.integers(0, 2**32 - 1))
def test_runs_are_those_of_the_pixels(
    count: int, size: tuple[int, int], wanted: tuple[int, int], threshold: float, seed: int
) -> None:
    soft = soft_masks(count, *size, seed)
    if seed % 2:  # some values at the threshold
        soft = torch.where(soft > 0.7, threshold, soft)
    resized = resize_masks_soft(soft, *wanted) if count else torch.zeros(0, *wanted)
    runs = ColumnRuns.enlarged(soft, *wanted, threshold)
    masks = runs.pixels()
    # A value within rounding of the threshold may fall on either side of it.
    assert torch.equal(masks, torch.where((resized - threshold).abs() < 1e-6, masks, resized > threshold))
    assert (runs.bottoms > runs.tops).all()
    assert runs.encode_rle() == encode_rle(masks)
    projections, expected = runs.projections(), Projections.of(masks)
    assert torch.equal(projections.rows, expected.rows)
    assert torch.equal(projections.columns, expected.columns)
    kept = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(runs[kept].pixels(), masks[kept])


def test_a_mask_without_a_pixel_and_one_of_all_pixels() -> None:
    soft = torch.stack([torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3, 4)])
    runs = ColumnRuns.enlarged(soft, 6, 5, 0.5)
    assert runs.encode_rle() == encode_rle(torch.stack([torch.full((6, 5), each > 0) for each in (0, 1, 0)]))
    assert runs.projections().areas().tolist() == [0, 30, 0]
    assert runs.projections().boxes_xywh().tolist() == [[0, 0, 0, 0], [0, 0, 5, 6], [0, 0, 0, 0]]


def test_one_cell_of_one_photo_that_is_smaller_than_the_map() -> None:
    soft = torch.zeros(1, 9, 9)
    soft[0, 4, 4] = 1.0
    assert ColumnRuns.enlarged(soft, 3, 3, 0.5).projections().areas().tolist() == [1]
    soft[0, 4, 4], soft[0, 3, 3] = 0.0, 1.0  # between the three rows that are looked at
    assert ColumnRuns.enlarged(soft, 3, 3, 0.5).encode_rle() == encode_rle(torch.zeros(1, 3, 3, dtype=torch.bool))


def test_no_masks() -> None:
    runs = ColumnRuns.enlarged(torch.zeros(0, 3, 4), 6, 8, 0.5)
    assert runs.encode_rle() == []
    assert runs.pixels().shape == (0, 6, 8)
    assert runs.projections().rows.shape == (0, 6)
    assert runs[torch.zeros(0, dtype=torch.bool)].projections().boxes_xyxy().shape == (0, 4)
