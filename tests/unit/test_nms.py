"""Suppression of overlapping masks and of neighbouring cells, by hand arithmetic."""

import math

import pytest
import torch

from freesolo.ops.nms import matrix_nms, point_nms


def columns(*spans: tuple[int, int], width: int = 12) -> torch.Tensor:
    """Masks of one row, each of the columns from start to stop."""
    masks = torch.zeros(len(spans), 1, width, dtype=torch.bool)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[:, start:stop] = True
    return masks


def one_category(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


# A = columns 0..3, B = 2..5, C = 4..7: IoU(A, B) = 2 / 6, IoU(B, C) = 2 / 6, IoU(A, C) = 0.
CHAIN = columns((0, 4), (2, 6), (4, 8))
CHAIN_SCORES = torch.tensor([0.9, 0.8, 0.7])


def test_gaussian_decay_is_compensated_by_the_suppressors_own_overlap():
    # B: f(1/3) = exp(-2/9). C: from A f(0) = 1; from B f(1/3) / f(compensate_B = 1/3) = 1; the minimum is 1.
    decayed = matrix_nms(CHAIN, CHAIN_SCORES, one_category(3))
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.8 * math.exp(-2 / 9), 0.7]))


def test_linear_decay():
    # D = columns 3..6 overlaps A in 1 of 7, B in 3 of 5, C in 3 of 5 and comes last; compensate is A 0, B 1/3, C 1/3.
    # Ratios: A (1 - 1/7) / 1 = 0.857; B and C (1 - 3/5) / (1 - 1/3) = 0.6. The minimum is 0.6.
    masks = torch.cat((CHAIN, columns((3, 7))))
    scores = torch.cat((CHAIN_SCORES, torch.tensor([0.5])))
    decayed = matrix_nms(masks, scores, one_category(4), kernel="linear")
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.8 * 2 / 3, 0.7, 0.5 * 0.6]))


def test_gaussian_sigma_is_the_strength():
    decayed = matrix_nms(CHAIN, CHAIN_SCORES, one_category(3), sigma=9.0)
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.8 * math.exp(-1.0), 0.7]))


def test_categories_do_not_suppress_each_other():
    masks = columns((0, 4), (0, 4), (0, 4))
    decayed = matrix_nms(masks, CHAIN_SCORES, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.8, 0.7 * math.exp(-2.0)]))


def test_result_is_in_the_order_of_the_input():
    shuffle = torch.tensor([2, 0, 1])
    expected = matrix_nms(CHAIN, CHAIN_SCORES, one_category(3))[shuffle]
    torch.testing.assert_close(matrix_nms(CHAIN[shuffle], CHAIN_SCORES[shuffle], one_category(3)), expected)


def test_of_equal_scores_the_earlier_wins():
    masks, scores = columns(*[(0, 4)] * 20), torch.full((20,), 0.5)
    decayed = matrix_nms(masks, scores, one_category(20))
    assert decayed[0] == 0.5
    torch.testing.assert_close(decayed[1:], torch.full((19,), 0.5 * math.exp(-2.0)))


def test_linear_decay_of_exact_duplicates_is_zero_and_finite():
    # B duplicates A; C duplicates both; D overlaps them in 2 of 6 and is decayed by A alone: B and C are gone.
    masks = columns((0, 4), (0, 4), (0, 4), (2, 6))
    decayed = matrix_nms(masks, torch.tensor([0.9, 0.8, 0.7, 0.6]), one_category(4), kernel="linear")
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.0, 0.0, 0.6 * 2 / 3]))


def test_empty_masks_neither_suppress_nor_are_suppressed():
    masks = columns((0, 0), (0, 0), (0, 4))
    assert torch.equal(matrix_nms(masks, CHAIN_SCORES, one_category(3)), CHAIN_SCORES)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_no_masks_and_one_mask(kernel: str):
    assert matrix_nms(CHAIN[:0], CHAIN_SCORES[:0], one_category(0), kernel=kernel).shape == (0,)
    assert matrix_nms(CHAIN[:1], CHAIN_SCORES[:1], one_category(1), kernel=kernel).tolist() == CHAIN_SCORES[:1].tolist()


def test_a_cell_survives_as_the_maximum_of_itself_and_the_three_up_and_left():
    scores = torch.tensor([[[[0.3, 0.2, 0.1], [0.4, 0.1, 0.5], [0.2, 0.6, 0.7]]]])
    # (0,1) loses to its left 0.3, (0,2) to its left 0.2; (1,1) to 0.4; (2,0) to its upper 0.4; the rest are maxima:
    # (0,0) has 0.4 below it and still survives, (2,1) has 0.7 at its right.
    expected = torch.tensor([[[[0.3, 0.0, 0.0], [0.4, 0.0, 0.5], [0.0, 0.6, 0.7]]]])
    assert torch.equal(point_nms(scores), expected)


def test_upper_left_neighbour_counts_and_upper_right_does_not():
    diagonal = torch.tensor([[[[0.9, 0.0], [0.0, 0.5]]]])
    assert torch.equal(point_nms(diagonal), torch.tensor([[[[0.9, 0.0], [0.0, 0.0]]]]))
    other = torch.tensor([[[[0.0, 0.9], [0.5, 0.0]]]])
    assert torch.equal(point_nms(other), other)


def test_equal_cells_all_survive_and_channels_are_apart():
    scores = torch.stack((torch.full((2, 2), 0.5), torch.tensor([[0.9, 0.1], [0.1, 0.1]])))[None]
    survivors = point_nms(scores)
    assert torch.equal(survivors[0, 0], scores[0, 0])
    assert torch.equal(survivors[0, 1], torch.tensor([[0.9, 0.0], [0.0, 0.0]]))


def test_point_nms_of_no_images_and_of_one_cell():
    assert point_nms(torch.zeros(0, 1, 3, 3)).shape == (0, 1, 3, 3)
    assert point_nms(torch.full((1, 1, 1, 1), 0.4)).item() == pytest.approx(0.4)
