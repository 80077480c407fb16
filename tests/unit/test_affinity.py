"""Colour similarity and the pairwise loss on images small enough to check by hand."""

import inspect
import math

import pytest
import torch

from freesolo.ops import affinity
from freesolo.ops.affinity import (
    NEIGHBOURS,
    colour_similarity,
    pairwise_affinity_loss,
    pairwise_affinity_terms,
    rgb_to_lab,
)

RIGHT = NEIGHBOURS.index((0, 1))
LEFT = NEIGHBOURS.index((0, -1))
BELOW = NEIGHBOURS.index((1, 0))


def everywhere(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_lab_of_white_black_and_the_primaries():
    # Reference values of CIE Lab (D65) for sRGB.
    colours = [[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    lab = rgb_to_lab(torch.tensor(colours, dtype=torch.uint8).T[:, :, None])
    torch.testing.assert_close(lab[:, :, 0].T, torch.tensor(expected, dtype=torch.float32), atol=0.02, rtol=0)


def test_lab_agrees_with_scikit_image():
    color = pytest.importorskip("skimage.color")
    pixels = torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(color.rgb2lab(pixels.movedim(1, -1).numpy())).movedim(-1, 1)
    torch.testing.assert_close(rgb_to_lab(pixels), expected.float(), atol=1e-3, rtol=0)


def test_similarity_of_one_colour_is_one_inside_and_zero_across_the_border():
    pixels = torch.full((1, 3, 12, 12), 90, dtype=torch.uint8)
    similarity = colour_similarity(pixels, everywhere(1, 12, 12), dilation=1, bottom_rows_ignored=0)
    assert similarity.shape == (1, 8, 3, 3)
    assert torch.equal(similarity[0, :, 1, 1], torch.ones(8))
    inside = [k for k, (row, column) in enumerate(NEIGHBOURS) if row >= 0 and column >= 0]
    assert similarity[0, :, 0, 0].nonzero().flatten().tolist() == inside


def test_similarity_falls_with_the_distance_in_lab():
    # Greys differ in L alone. Left half 100, right half 103; distance 2 between columns of one-pixel blocks.
    pixels = torch.full((1, 3, 1, 4), 100.0)
    pixels[..., 2:] = 103.0
    lightness = rgb_to_lab(pixels)[0, 0, 0]
    step = (lightness[2] - lightness[0]).item()
    assert step == pytest.approx(1.217, abs=0.01)
    similarity = colour_similarity(pixels, everywhere(1, 1, 4), stride=1, bottom_rows_ignored=0)
    expected = math.exp(-step / 2)
    torch.testing.assert_close(similarity[0, RIGHT, 0], torch.tensor([expected, expected, 0.0, 0.0]))
    torch.testing.assert_close(similarity[0, LEFT, 0], torch.tensor([0.0, 0.0, expected, expected]))


def test_similarity_is_of_the_pooled_image():
    # A fine chequerboard, inverted in its right half: no pixel is like its counterpart, but all blocks average alike.
    columns = torch.arange(8)
    board = (torch.arange(8)[:, None] + columns[None, :] + columns // 4) % 2 * 255.0
    similarity = colour_similarity(board.expand(1, 3, 8, 8), everywhere(1, 8, 8), dilation=1, bottom_rows_ignored=0)
    assert similarity[0, RIGHT, 0, 0] == 1.0


def test_pairs_that_touch_padding_do_not_count():
    valid = everywhere(1, 8, 16)
    valid[:, :, 11:] = False  # the third of four blocks has one padded column, the fourth is all padding
    pixels = torch.full((1, 3, 8, 16), 50.0)
    similarity = colour_similarity(pixels, valid, dilation=1, bottom_rows_ignored=0)
    assert similarity[0, RIGHT].tolist() == [[1.0, 0.0, 0.0, 0.0]] * 2
    assert similarity[0, LEFT].tolist() == [[0.0, 1.0, 0.0, 0.0]] * 2
    assert similarity[0, BELOW].tolist() == [[1.0, 1.0, 0.0, 0.0], [0.0] * 4]


def test_bottom_rows_are_those_of_each_image_not_of_the_batch():
    pixels = torch.full((2, 3, 24, 4), 50.0)
    valid = everywhere(2, 24, 4)
    valid[1, 16:] = False
    similarity = colour_similarity(pixels, valid, dilation=1, bottom_rows_ignored=6)
    # Image 0 may use rows 0..17, four whole blocks; image 1 rows 0..9, two. Downward pairs start one block earlier.
    assert similarity[0, BELOW, :, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert similarity[1, BELOW, :, 0].tolist() == [1, 0, 0, 0, 0, 0]


def test_an_image_no_taller_than_the_bottom_rows_has_no_pairs():
    assert colour_similarity(torch.zeros(1, 3, 8, 8), everywhere(1, 8, 8)).sum() == 0
    assert colour_similarity(torch.zeros(1, 3, 16, 8), ~everywhere(1, 16, 8), bottom_rows_ignored=0).sum() == 0


def test_similarity_of_no_images():
    assert colour_similarity(torch.zeros(0, 3, 8, 12), everywhere(0, 8, 12)).shape == (0, 8, 2, 3)


def test_similarity_refuses_a_ragged_extent():
    with pytest.raises(ValueError, match="10 x 12"):
        colour_similarity(torch.zeros(1, 3, 10, 12), everywhere(1, 10, 12))


def test_loss_of_a_single_pair():
    # One row of two pixels, one pixel apart, both ends select the pair. Logits 0 and log 3: m = 1/2 and 3/4,
    # P(same) = 1/2 * 3/4 + 1/2 * 1/4 = 1/2.
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    loss = pairwise_affinity_loss(logits, torch.ones(1, 8, 1, 2), everywhere(1, 1, 2), dilation=1)
    torch.testing.assert_close(loss, torch.tensor(math.log(2.0)))


def test_each_end_selects_by_its_own_region_and_similarity():
    logits = torch.tensor([[[0.0, math.log(3.0), -math.log(3.0)]]])
    similarity = torch.zeros(1, 8, 1, 3)
    similarity[0, RIGHT, 0] = torch.tensor([0.3, 0.29, 0.0])
    similarity[0, LEFT, 0] = torch.tensor([0.0, 0.0, 0.9])
    region = torch.tensor([[[True, True, False]]])
    # Pair 0-1 from 0 alone (0.3 is enough): log 2. Pair 1-2: 0.29 is too little from 1, and 2 is outside the region.
    terms = pairwise_affinity_terms(logits, similarity, torch.tensor([0]), region, dilation=1)
    assert terms.pair_count.tolist() == [1.0]
    torch.testing.assert_close(terms.loss_sum, torch.tensor([math.log(2.0)]))
    # With 0 outside and 2 inside, 0 no longer selects its pair, and 2 selects the one with 1: m = 3/4 and 1/4,
    # P(same) = 2 * 3/16 = 3/8.
    region = torch.tensor([[[False, True, True]]])
    terms = pairwise_affinity_terms(logits, similarity, torch.tensor([0]), region, dilation=1)
    assert terms.pair_count.tolist() == [1.0]
    torch.testing.assert_close(terms.loss_sum, torch.tensor([-math.log(3 / 8)]))
    # With all inside, both pairs.
    terms = pairwise_affinity_terms(logits, similarity, torch.tensor([0]), everywhere(1, 1, 3), dilation=1)
    assert terms.pair_count.tolist() == [2.0]
    torch.testing.assert_close(terms.loss_sum, torch.tensor([math.log(2.0) - math.log(3 / 8)]))


def test_instances_share_their_images_maps():
    generator = torch.Generator().manual_seed(0)
    maps, logits = torch.rand(2, 8, 5, 6, generator=generator), torch.randn(3, 5, 6, generator=generator)
    region = torch.rand(3, 5, 6, generator=generator) > 0.4
    index = torch.tensor([1, 0, 1])
    shared = pairwise_affinity_terms(logits, maps, index, region)
    apart = pairwise_affinity_terms(logits, maps[index], torch.arange(3), region)
    assert torch.equal(shared.loss_sum, apart.loss_sum)
    assert torch.equal(shared.pair_count, apart.pair_count)
    mean = pairwise_affinity_loss(logits, maps[index], region)
    torch.testing.assert_close(mean, shared.loss_sum.sum() / shared.pair_count.sum())


def test_windows_and_whole_maps_give_the_same(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(2, 8, 20, 30, generator=generator)
    region = torch.zeros(7, 20, 30, dtype=torch.bool)
    # All of it, each corner, a pixel in the middle, none.
    region[0] = region[1, :3, :4] = region[2, 15:, :2] = region[3, :1, 29:] = region[4, 18:, 20:] = region[5, 9, 9] = (
        True
    )
    index = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    results = []
    for at_once in (1, 3, 100, None):
        monkeypatch.setattr(affinity, "_MAPS_AT_ONCE", at_once)
        logits = torch.randn(7, 20, 30, generator=torch.Generator().manual_seed(4)).requires_grad_()
        terms = pairwise_affinity_terms(logits, maps, index, region, whole_maps=at_once is None)
        (terms.loss_sum * torch.arange(1, 8)).sum().backward()
        results.append((terms.loss_sum.detach(), terms.pair_count, logits.grad))
    assert results[0][1].min() == 0
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


def test_loss_is_finite_for_certain_masks():
    # Certain and equal: no loss. Certain and opposite: P(same) = 2 e^-1000, counted from both ends.
    logits = torch.tensor([[[1000.0, 1000.0]], [[1000.0, -1000.0]], [[-1000.0, -1000.0]]], requires_grad=True)
    terms = pairwise_affinity_terms(
        logits, torch.ones(1, 8, 1, 2), torch.zeros(3, dtype=torch.int64), everywhere(3, 1, 2), dilation=1
    )
    torch.testing.assert_close(terms.loss_sum, torch.tensor([0.0, 2000.0 - 2 * math.log(2.0), 0.0]))
    terms.loss_sum.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_selected_is_zero_with_a_gradient(count: int):
    logits = torch.randn(count, 4, 4, requires_grad=True)
    loss = pairwise_affinity_loss(logits, torch.zeros(count, 8, 4, 4), everywhere(count, 4, 4))
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros(count, 4, 4))


@pytest.mark.parametrize(("side", "dilation"), [(1, 1), (1, 2), (2, 2), (5, 8)])
def test_maps_no_larger_than_the_dilation_have_no_pairs(side: int, dilation: int):
    terms = pairwise_affinity_terms(
        torch.randn(2, side, side),
        torch.ones(1, 8, side, side),
        torch.tensor([0, 0]),
        everywhere(2, side, side),
        dilation=dilation,
    )
    assert terms.loss_sum.tolist() == [0.0, 0.0]
    assert terms.pair_count.tolist() == [0.0, 0.0]


def test_loss_is_computed_in_float32_whatever_the_logits_are():
    logits = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    others = (torch.ones(1, 8, 4, 4), torch.tensor([0]), everywhere(1, 4, 4))
    terms = pairwise_affinity_terms(logits, *others)
    assert terms.loss_sum.dtype == torch.float32
    assert torch.equal(terms.loss_sum, pairwise_affinity_terms(logits.float(), *others).loss_sum)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("same stride", {"similarity": torch.ones(1, 8, 2, 4)}),
        ("9 neighbours", {"similarity": torch.ones(1, 9, 4, 4)}),
        ("1 map indices for 2 masks", {"image_index": torch.tensor([0])}),
        ("region", {"region": torch.ones(2, 4, 1, dtype=torch.bool)}),
    ],
)
def test_loss_refuses_shapes_that_disagree(name: str, bad: dict[str, torch.Tensor]):
    good = {
        "mask_logits": torch.zeros(2, 4, 4),
        "similarity": torch.ones(1, 8, 4, 4),
        "image_index": torch.tensor([0, 0]),
        "region": everywhere(2, 4, 4),
    }
    unchecked = inspect.unwrap(pairwise_affinity_terms)  # as in production, where annotations are not enforced
    with pytest.raises(ValueError, match=name):
        unchecked(**(good | bad))
