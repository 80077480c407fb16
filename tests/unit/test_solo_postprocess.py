"""Post-processing of planted predictions: a mask comes back where it was put; nothing comes of nothing."""

from __future__ import annotations

import pytest
import torch

from freesolo.settings import InferenceSettings
from freesolo.solo.heads.solov2 import SoloV2Head, SoloV2Predictions
from freesolo.solo.postprocess import instances_from_predictions
from freesolo.types import Instances
from tests.small import small_solo

MODEL = small_solo(num_categories=2, embedding_channels=3, grid_sizes=(4, 3, 2, 2, 1))
CELLS = 16 + 9 + 4 + 4 + 1
LAST_CELL = CELLS - 1
HEAD = SoloV2Head(MODEL)


def blank(batch_size: int = 1) -> SoloV2Predictions:
    """Over 64 x 96 px: no cell believes in anything, and feature channel k of 32 is made for the k-th plant."""
    return SoloV2Predictions(
        category_logits=torch.full((batch_size, 2, CELLS), -10.0),
        kernels=torch.zeros(batch_size, 32, CELLS),
        embeddings=torch.ones(batch_size, 3, CELLS),
        mask_features=torch.full((batch_size, 32, 16, 24), -1.0),
    )


def plant(
    predictions: SoloV2Predictions,
    channel: int,
    cell: int,
    box: tuple[int, int, int, int],
    *,
    image: int = 0,
    category: int = 0,
    score: float = 0.9,
    confidence: float = 20.0,
) -> None:
    """Let a cell predict a box of the mask features (left, top, right, bottom), with logits of +- `confidence`."""
    left, top, right, bottom = box
    predictions.category_logits[image, category, cell] = torch.logit(torch.tensor(score))
    predictions.kernels[image, channel, cell] = confidence
    predictions.mask_features[image, channel, top:bottom, left:right] = 1.0


def found(
    predictions: SoloV2Predictions,
    *,
    sizes: list[tuple[int, int]] | None = None,
    originals: list[tuple[int, int]] | None = None,
    **settings: float,
) -> list[Instances]:
    sizes = sizes or [(64, 96)] * len(predictions)
    return instances_from_predictions(
        HEAD, predictions, torch.tensor(sizes), originals or sizes, InferenceSettings(**settings), MODEL
    )


def box_of(mask: torch.Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)


def test_a_planted_mask_comes_back():
    predictions = blank()
    plant(predictions, 0, 5, (4, 2, 12, 10), category=1)
    predictions.embeddings[0, :, 5] = torch.tensor([3.0, 0.0, 4.0])
    (instances,) = found(predictions)
    assert len(instances) == 1
    assert instances.category_ids.tolist() == [1]
    assert instances.scores.item() == pytest.approx(0.9, rel=1e-5)  # maskness 1, nothing to decay it
    assert instances.embeddings[0].tolist() == pytest.approx([0.6, 0.0, 0.8])
    assert instances.image_index.tolist() == [0]
    # Between two map pixels the value crosses 1/2 halfway: the box is 4 times the map's.
    assert box_of(instances.masks[0]) == (16, 8, 48, 40)
    assert instances.masks[0, 8:40, 16:48].float().mean() > 0.98


def test_maskness_is_part_of_the_score():
    predictions = blank()
    plant(predictions, 0, 5, (4, 2, 12, 10), confidence=1.0)
    (instances,) = found(predictions)
    assert instances.scores.item() == pytest.approx(0.9 * torch.tensor(1.0).sigmoid().item(), rel=1e-5)


def test_masks_are_cropped_to_the_image_and_resized_to_the_photo():
    predictions = blank()
    plant(predictions, 0, 5, (4, 2, 24, 16))
    # The image fills 40 x 48 of the padded 64 x 96 px; the photo was twice that. From (16, 8) on: from (32, 16).
    (instances,) = found(predictions, sizes=[(40, 48)], originals=[(80, 96)])
    assert instances.masks.shape == (1, 80, 96)
    assert box_of(instances.masks[0]) == (32, 16, 96, 80)


def test_a_mask_that_lies_in_the_padding_alone_is_dropped():
    predictions = blank()
    plant(predictions, 0, 5, (18, 2, 22, 10))
    (instances,) = found(predictions, sizes=[(64, 48)])
    assert len(instances) == 0
    assert instances.masks.shape == (0, 64, 48)


@pytest.mark.parametrize(("cell", "pixels"), [(0, 8), (16, 8), (25, 16), (29, 32), (LAST_CELL, 32)])
def test_masks_smaller_than_their_levels_stride_are_dropped(cell, pixels):
    # One row of so many map pixels, or one fewer; the map has 24 to a row, so the rest goes into a second.
    for short_of in (0, 1):
        predictions = blank()
        plant(predictions, 0, cell, (0, 0, 0, 0))
        predictions.mask_features[0, 0].view(-1)[: pixels - short_of] = 1.0
        assert len(found(predictions)[0]) == 1 - short_of


def test_of_neighbouring_cells_the_better_speaks():
    predictions = blank()
    plant(predictions, 0, 5, (4, 2, 12, 10), score=0.9)
    plant(predictions, 1, 6, (4, 2, 12, 10), score=0.8)  # to the right of cell 5: 5 is in its window
    plant(predictions, 2, 0, (0, 12, 6, 16), score=0.7)  # upper left of 5: in the corner nobody is in its window
    (instances,) = found(predictions)
    assert instances.scores.tolist() == pytest.approx([0.9, 0.7], rel=1e-4)


def test_duplicates_on_another_level_decay_by_matrix_nms():
    predictions = blank()
    plant(predictions, 0, 5, (4, 2, 12, 10), score=0.9)
    plant(predictions, 1, 20, (4, 2, 12, 10), score=0.8)
    plant(predictions, 2, 29, (4, 2, 12, 10), score=0.7, category=1)
    (instances,) = found(predictions)
    # Of equal masks of a category the second keeps exp(-2 * 1^2) = 0.135 of its score; the other category all.
    assert instances.scores.tolist() == pytest.approx([0.9, 0.7, 0.8 * 0.1353], rel=1e-3)
    assert instances.category_ids.tolist() == [0, 1, 0]
    assert len(found(predictions, min_score=0.2)[0]) == 2


def test_limits():
    predictions = blank()
    for index, cell in enumerate((0, 2, 8, 10, 16)):
        plant(predictions, index, cell, (4 * index, 0, 4 * index + 4, 16), score=0.9 - 0.1 * index)
    assert len(found(predictions)[0]) == 5
    assert found(predictions, max_instances=2)[0].scores.tolist() == pytest.approx([0.9, 0.8], rel=1e-4)
    assert found(predictions, max_before_nms=3)[0].scores.tolist() == pytest.approx([0.9, 0.8, 0.7], rel=1e-4)
    assert found(predictions, min_category_score=0.75)[0].scores.tolist() == pytest.approx([0.9, 0.8], rel=1e-4)


def test_thresholds_exclude_what_is_on_them_or_not():
    # "Keep score > 0.1", but "keep decayed score >= 0.05".
    predictions = blank()
    plant(predictions, 0, 5, (4, 2, 12, 10), score=0.5, confidence=200.0)
    predictions.category_logits[0, 0, 5] = 0.0  # the sigmoid is exactly 1/2, maskness exactly 1
    assert len(found(predictions, min_category_score=0.5)[0]) == 0
    assert len(found(predictions, min_score=0.5)[0]) == 1


def test_nothing_comes_of_nothing():
    instances, other = found(blank(2), sizes=[(60, 80), (64, 96)], originals=[(7, 9), (5, 4)])
    assert instances.masks.shape == (0, 7, 9)
    assert other.masks.shape == (0, 5, 4)
    assert instances.embeddings.shape == (0, 3)
    assert instances.masks.dtype == torch.bool


def test_images_of_a_batch_are_apart():
    predictions = blank(3)
    plant(predictions, 0, 5, (4, 2, 12, 10), image=0)
    plant(predictions, 0, 5, (0, 0, 6, 6), image=2)
    assert [len(instances) for instances in found(predictions)] == [1, 0, 1]
    assert box_of(found(predictions)[2].masks[0]) == (0, 0, 24, 24)


def test_half_precision_and_gradients_are_taken():
    predictions = blank()
    plant(predictions, 0, 5, (4, 2, 12, 10))
    half = SoloV2Predictions(
        predictions.category_logits.bfloat16().requires_grad_(),
        predictions.kernels.bfloat16(),
        predictions.embeddings.bfloat16(),
        predictions.mask_features.bfloat16(),
    )
    (instances,) = found(half)
    assert not instances.scores.requires_grad
    assert instances.scores.dtype == instances.embeddings.dtype == torch.float32
    assert box_of(instances.masks[0]) == (16, 8, 48, 40)
