"""Free Mask on feature maps drawn by hand: what is found, what is dropped and why, and that nothing is lost."""

import pytest
import torch

from freesolo.freemask.algorithm import FreeMasks, free_masks
from freesolo.settings import FreeMaskSettings

# Filters opened wide, one query scale: what the similarity alone says.
OPEN = FreeMaskSettings(
    query_scales=(1.0,), min_maskness=0.0, top_border=0.0, max_width=1.0, embedding_channels=4, max_instances=50
)


def with_object(height: int, width: int, rows: slice, columns: slice, channels: int = 8) -> torch.Tensor:
    """A map of one feature with a rectangle of another, orthogonal one."""
    features = torch.zeros(1, channels, height, width)
    features[:, 0] = 1.0
    features[:, 0, rows, columns] = 0.0
    features[:, 1, rows, columns] = 2.0
    return features


def best_per_mask(found: FreeMasks) -> list[list[float]]:
    """Boxes of the masks that Matrix NMS left at their full score."""
    return found.masks[found.scores > 0.99].projections().boxes_xyxy().tolist()


def test_an_object_and_its_background_are_found_at_the_images_size():
    features = with_object(8, 10, slice(3, 6), slice(2, 7))
    (found,) = free_masks(features, [(16, 20)], OPEN)
    assert (found.masks.height, found.masks.width) == (16, 20)
    # The background asks first (query 0); the object's own first query is the cell (3, 2).
    first_two = found.scores > 0.99
    assert found.query_index[first_two].tolist() == [0, 3 * 10 + 2]
    # Twice the size: 0.5 is reached between cell centres, so the object keeps its edges at 2x.
    projections = found.masks[first_two].projections()
    assert projections.boxes_xyxy().tolist() == [[0.0, 0.0, 20.0, 16.0], [4.0, 6.0, 14.0, 12.0]]
    assert projections.areas()[1] >= 6 * 10 - 4  # the corners are rounded by a pixel each
    torch.testing.assert_close(found.scores[first_two], torch.ones(2))


def test_repeated_masks_are_decayed_and_sorted_last():
    (found,) = free_masks(with_object(4, 4, slice(2, 4), slice(1, 3)), [(4, 4)], OPEN)
    # 16 queries, two distinct masks: 14 duplicates, each decayed by exp(-2).
    assert len(found) == 16
    expected = torch.cat((torch.ones(2), torch.full((14,), 1.0).mul(torch.exp(torch.tensor(-2.0)))))
    torch.testing.assert_close(found.scores, expected)


def test_released_settings_keep_one_object_below_the_top():
    settings = FreeMaskSettings(embedding_channels=4)
    (found,) = free_masks(with_object(16, 20, slice(8, 14), slice(5, 13)), [(160, 200)], settings)
    # The background spans the width and goes; duplicates fall below 0.7; the half- and quarter-size queries agree.
    assert len(found) == 1
    assert found.masks.projections().boxes_xyxy().tolist() == [[50.0, 80.0, 130.0, 140.0]]


@pytest.mark.parametrize(
    ("rows", "top_border", "kept"),
    [
        (slice(1, 4), 0.2, False),  # rows 1, 2, 3: mean 2 = 0.2 * 10, at the border
        (slice(1, 5), 0.2, True),  # mean 2.5
        (slice(1, 4), 0.19, True),
    ],
)
def test_masks_at_the_top_border_are_dropped(rows: slice, top_border: float, kept: bool):
    settings = OPEN.model_copy(update={"top_border": top_border, "max_width": 0.99})
    (found,) = free_masks(with_object(10, 10, rows, slice(2, 5)), [(10, 10)], settings)
    assert bool(best_per_mask(found)) == kept


def test_each_occupied_row_counts_once_towards_the_vertical_centre():
    # An L of rows 1 (nine columns wide) and 2..7 (one wide): by pixels its mean row would be 2.4, by rows it is 4.
    features = with_object(10, 12, slice(1, 2), slice(1, 10))
    features[0, 0, 2:8, 1], features[0, 1, 2:8, 1] = 0.0, 1.0
    settings = OPEN.model_copy(update={"top_border": 0.3, "max_width": 0.99})
    (found,) = free_masks(features, [(10, 12)], settings)
    assert best_per_mask(found) == [[1.0, 1.0, 10.0, 8.0]]


@pytest.mark.parametrize(("columns", "kept"), [(slice(1, 20), False), (slice(2, 20), True)])
def test_masks_across_the_image_are_dropped(columns: slice, kept: bool):
    # 19 of 20 columns are the 0.95 that drops a mask. The background spans all 20 in either case.
    settings = OPEN.model_copy(update={"max_width": 0.95})
    (found,) = free_masks(with_object(10, 20, slice(5, 8), columns), [(10, 20)], settings)
    assert bool(best_per_mask(found)) == kept


def test_masks_of_low_score_are_dropped():
    features = with_object(4, 4, slice(2, 4), slice(1, 3))
    (found,) = free_masks(features, [(4, 4)], OPEN.model_copy(update={"min_maskness": 0.13}))
    assert len(found) == 16  # duplicates have exp(-2) = 0.135
    (found,) = free_masks(features, [(4, 4)], OPEN.model_copy(update={"min_maskness": 0.14}))
    assert len(found) == 2


def test_masks_of_one_cell_are_dropped():
    (found,) = free_masks(with_object(5, 5, slice(2, 3), slice(2, 3)), [(5, 5)], OPEN)
    assert 2 * 5 + 2 not in found.query_index.tolist()
    assert 0 in found.query_index.tolist()
    (found,) = free_masks(with_object(5, 5, slice(2, 3), slice(2, 4)), [(5, 5)], OPEN)
    assert 2 * 5 + 2 in found.query_index.tolist()


def test_at_most_max_instances_are_kept():
    features = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    (found,) = free_masks(features, [(12, 12)], OPEN.model_copy(update={"max_instances": 5}))
    assert len(found) == 5
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)


def test_queries_come_from_every_scale():
    features = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = OPEN.model_copy(update={"query_scales": (1.0, 0.5, 0.25), "max_instances": 500})
    (found,) = free_masks(features, [(8, 8)], settings)
    # 64 + 16 + 4 queries; scales of a smaller map than a cell still give one.
    assert found.query_index.max() >= 80
    assert found.query_index.max() < 84
    free_masks(features[..., :1, :3], [(8, 8)], settings)


def test_embeddings_are_the_resized_query():
    features = with_object(4, 4, slice(2, 4), slice(1, 3), channels=8)
    (found,) = free_masks(features, [(4, 4)], OPEN)
    # 8 channels to 4 is the mean of neighbours: (1, 0, 0, ...) and (0, 2, 0, ...) both become (1, 0, 0, 0).
    torch.testing.assert_close(found.embeddings, torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(16, 4))
    random = torch.randn(1, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    (found,) = free_masks(random, [(5, 5)], OPEN.model_copy(update={"embedding_channels": 16}))
    means = random[0].flatten(1).T[found.query_index].view(len(found), 16, 2).mean(dim=2)
    torch.testing.assert_close(found.embeddings, means / means.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(1, 8, 4, 5),
        torch.full((1, 8, 4, 5), 3.7),
        torch.rand(1, 2048, 1, 1).expand(1, 2048, 9, 11),
        torch.rand(1, 2048, 1, 1).expand(1, 2048, 9, 11) * (1 + torch.rand(1, 1, 9, 11)),
        torch.randn(1, 8, 1, 1),
    ],
    ids=["zeros", "constant", "constant-2048", "one-direction", "one-cell"],
)
def test_maps_that_are_alike_everywhere_give_an_empty_record(features: torch.Tensor):
    (found,) = free_masks(features, [(30, 40)], OPEN)
    assert len(found) == 0
    assert found.masks.pixels().shape == (0, 30, 40)
    assert found.embeddings.shape == (0, 4)
    assert found.query_index.dtype == torch.int64


def test_similarities_within_rounding_of_each_other_are_alike():
    # Two directions at an angle t have the cosine 1 - t**2 / 2: 8e-6 from 1 for t = 0.004, 1.8e-5 for t = 0.006.
    for angle, expected in ((0.004, 0), (0.006, 20)):
        features = torch.zeros(1, 2, 4, 5)
        features[:, 0] = 1.0
        features[:, 1, 2:4] = angle
        (found,) = free_masks(features, [(4, 5)], OPEN)
        assert len(found) == expected


def test_every_image_has_a_record_in_order():
    empty = torch.full((1, 8, 8, 10), 1.0)
    features = torch.cat((with_object(8, 10, slice(3, 6), slice(2, 7)), empty))
    first, second = free_masks(features, [(16, 20), (33, 44)], OPEN)
    assert len(first) > 0
    assert first.masks.pixels().shape[1:] == (16, 20)
    assert second.masks.pixels().shape == (0, 33, 44)
    assert free_masks(features[:0], [], OPEN) == []


def test_images_of_a_batch_do_not_know_of_each_other():
    features = torch.randn(3, 16, 6, 7, generator=torch.Generator().manual_seed(0))
    together = free_masks(features, [(12, 14)] * 3, OPEN)
    for image, found in enumerate(together):
        (alone,) = free_masks(features[image : image + 1], [(12, 14)], OPEN)
        assert len(found) > 3
        assert torch.equal(found.query_index, alone.query_index)
        assert torch.equal(found.masks.pixels(), alone.masks.pixels())
        torch.testing.assert_close(found.embeddings, alone.embeddings)


def test_masks_that_vanish_at_the_images_size_are_dropped():
    # An image far smaller than its feature map: two adjacent cells fall between the pixels that are sampled.
    features = with_object(12, 12, slice(6, 8), slice(6, 7))
    (found,) = free_masks(features, [(2, 2)], OPEN)
    assert (found.masks.projections().areas() > 0).all()
    assert 6 * 12 + 6 not in found.query_index.tolist()


def test_result_does_not_depend_on_autocast_or_on_gradients():
    features = torch.randn(1, 32, 7, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = free_masks(features, [(14, 14)], OPEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = free_masks(features, [(14, 14)], OPEN)
    assert torch.equal(found.masks.pixels(), expected.masks.pixels())
    assert torch.equal(found.scores, expected.scores)
    assert not found.scores.requires_grad


def test_features_in_bfloat16_are_taken():
    features = with_object(8, 10, slice(3, 6), slice(2, 7))
    (expected,) = free_masks(features, [(16, 20)], OPEN)
    (found,) = free_masks(features.bfloat16(), [(16, 20)], OPEN)
    assert torch.equal(found.masks.pixels(), expected.masks.pixels())
    assert found.scores.dtype == torch.float32


def test_sizes_of_other_images_are_refused():
    with pytest.raises(ValueError, match="2 image sizes for 1 feature maps"):
        free_masks(torch.zeros(1, 8, 4, 4), [(4, 4), (4, 4)], OPEN)
