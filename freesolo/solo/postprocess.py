"""From what a SOLOv2 head says to instances in the photos' own pixels (arXiv:2003.10152 sec. 3.3, released settings).

candidates  (cell, category) pairs that pass the point NMS and the least category score, those of one image
score       category score, times maskness, times Matrix NMS's decay
extents     mask features h x w; padded input 4h x 4w; the image in it, unpadded; the original photo
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from freesolo.ops.masks import areas, resize_masks_soft
from freesolo.ops.nms import matrix_nms, point_nms
from freesolo.settings import InferenceSettings, SoloModelSettings
from freesolo.solo.heads.base import MASK_STRIDE, Head, Predictions
from freesolo.types import Instances

MASKS_AT_ONCE = 256
"""Masks made or enlarged together. It bounds memory; results do not depend on it."""


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Masks that one image's cells propose.

    Attributes:
        cell: Index among all levels' cells, `(M,)`.
        category_ids: `(M,)`.
        scores: `(M,)`.
    """

    cell: Int64[Tensor, " M"]
    category_ids: Int64[Tensor, " M"]
    scores: Float[Tensor, " M"]

    def __getitem__(self, index: Tensor) -> _Candidates:
        return _Candidates(self.cell[index], self.category_ids[index], self.scores[index])


@torch.no_grad()
def instances_from_predictions(
    head: Head[Any],
    predictions: Predictions,
    image_sizes: Int64[Tensor, "B 2"],
    original_sizes: Sequence[tuple[int, int]],
    settings: InferenceSettings,
    model: SoloModelSettings,
) -> list[Instances]:
    """The instances of each image of a batch, best first.

    Source: SOLOv2 (arXiv:2003.10152) sec. 3.3 and its released inference: point NMS on the category scores; least
    category score; masks, binarised; those smaller than their level's stride dropped; scores times maskness; the best
    `max_before_nms`; Matrix NMS; least score; the best `max_instances`; masks at the original size.

    Args:
        head: Makes masks of `predictions`.
        predictions: Of a batch; in training's or evaluation's precision.
        image_sizes: Height and width of each image in the padded input, without the padding.
        original_sizes: Height and width of each photo as it is stored.
        settings: Thresholds and limits.
        model: Grids and strides.

    Returns:
        One record an image, `image_index` all 0: masks of the original size, none of them empty, L2-normalised
        embeddings, scores in descending order. Waits for the device.
    """
    sizes: list[list[int]] = image_sizes.tolist()
    suppressed = _suppress_points(predictions.category_logits.float().sigmoid(), model.grid_sizes)
    return [
        _instances_of_image(head, one, scores, (size[0], size[1]), original, settings, model)
        for one, scores, size, original in zip(
            predictions.each_image(), suppressed.unbind(0), sizes, original_sizes, strict=True
        )
    ]


def _suppress_points(scores: Float[Tensor, "B C L"], grid_sizes: Sequence[int]) -> Float[Tensor, "B C L"]:
    levels = scores.split_with_sizes([size * size for size in grid_sizes], dim=2)
    grids = [level.reshape(*level.shape[:2], size, size) for level, size in zip(levels, grid_sizes, strict=True)]
    return torch.cat([point_nms(grid).flatten(2) for grid in grids], dim=2)


def _instances_of_image(
    head: Head[Any],
    predictions: Predictions,
    category_scores: Float[Tensor, "C L"],
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    settings: InferenceSettings,
    model: SoloModelSettings,
) -> Instances:
    """All steps after the point NMS, for a batch of one image."""
    category_ids, cell = (category_scores > settings.min_category_score).nonzero().unbind(dim=1)
    candidates = _Candidates(cell, category_ids, category_scores[category_ids, cell])
    candidates = _score_masks(head, predictions, candidates, settings, model)
    candidates = _best(candidates, settings.max_before_nms)
    soft = _soft_masks(head, predictions, candidates.cell)
    decayed = matrix_nms(
        soft > settings.mask_threshold, candidates.scores, candidates.category_ids, sigma=settings.nms_sigma
    )
    kept = decayed.argsort(descending=True, stable=True)[: settings.max_instances]
    kept = kept[decayed[kept] >= settings.min_score]
    masks = _enlarge(soft[kept], image_size, original_size, settings.mask_threshold)
    embeddings = functional.normalize(predictions.embeddings[0, :, candidates.cell[kept]].T.float(), dim=1)
    instances = Instances(
        image_index=torch.zeros_like(kept),
        masks=masks,
        category_ids=candidates.category_ids[kept],
        scores=decayed[kept],
        embeddings=embeddings,
    )
    return instances[areas(masks) > 0]  # an empty mask has no box


def _score_masks(
    head: Head[Any],
    predictions: Predictions,
    candidates: _Candidates,
    settings: InferenceSettings,
    model: SoloModelSettings,
) -> _Candidates:
    """Multiply scores by maskness, the mean of the soft mask inside the binary one; drop masks that are too small."""
    area, maskness = [candidates.scores.new_zeros(0)], [candidates.scores.new_zeros(0)]
    for cells in candidates.cell.split_with_sizes(_chunks(candidates.cell.shape[0])):
        soft = _soft_masks(head, predictions, cells)
        binary = soft > settings.mask_threshold
        area.append(areas(binary).float())
        maskness.append((soft * binary).flatten(1).sum(dim=1) / area[-1].clamp(min=1.0))
    scored = _Candidates(candidates.cell, candidates.category_ids, candidates.scores * torch.cat(maskness))
    return scored[torch.cat(area) >= _stride_of_cells(candidates.cell, model)]


def _best(candidates: _Candidates, count: int) -> _Candidates:
    return candidates[candidates.scores.argsort(descending=True, stable=True)[:count]]


def _soft_masks(head: Head[Any], predictions: Predictions, cell: Int64[Tensor, " M"]) -> Float[Tensor, "M h w"]:
    return head.mask_logits(predictions, cell).float().sigmoid()


def _stride_of_cells(cell: Int64[Tensor, " M"], model: SoloModelSettings) -> Int64[Tensor, " M"]:
    strides = torch.tensor(model.strides, device=cell.device)
    cells = torch.tensor([size * size for size in model.grid_sizes], device=cell.device)
    return strides.repeat_interleave(cells)[cell]


def _enlarge(
    soft: Float[Tensor, "M h w"], image_size: tuple[int, int], original_size: tuple[int, int], threshold: float
) -> Bool[Tensor, "M H W"]:
    """Masks at the original size: to the padded input, cropped to the image, to the photo, binary."""
    padded_size = (soft.shape[1] * MASK_STRIDE, soft.shape[2] * MASK_STRIDE)
    enlarged = [torch.zeros(0, *original_size, dtype=torch.bool, device=soft.device)]
    for masks in soft.split_with_sizes(_chunks(soft.shape[0])):
        cropped = resize_masks_soft(masks, *padded_size)[:, : image_size[0], : image_size[1]]
        enlarged.append(resize_masks_soft(cropped, *original_size) > threshold)
    return torch.cat(enlarged)


def _chunks(count: int) -> list[int]:
    full, rest = divmod(count, MASKS_AT_ONCE)
    return [MASKS_AT_ONCE] * full + [rest] * (rest > 0)
