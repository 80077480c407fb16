"""Free Mask: from a backbone's feature map to scored coarse masks, without any label.

Source: FreeSOLO (arXiv:2202.12181) sec. 3.1, with the settings and filters of its released code.

Legend of shapes beyond that of `freesolo.types`:
    h, w  height and width of the feature map
    Q     queries: cells of the feature map at all scales, the first scale's first, row by row
    N     masks kept
    H, W  height and width of the image as the user has it, before any resize
    D     channels of a stored embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from freesolo.ops.column_runs import ColumnRuns
from freesolo.ops.gram import gram
from freesolo.ops.masks import Projections, areas
from freesolo.ops.nms import matrix_nms
from freesolo.settings import FreeMaskSettings

# Cosine similarities that differ by less are one value and float32's rounding: a mask made of them would be noise.
_FLAT_SIMILARITY = 1e-5
_SHORTEST = 1e-12  # of a vector that is divided by its length


@dataclass(frozen=True, slots=True)
class FreeMasks:
    """The masks found in one image, best score first. N is 0 for an image in which none was found.

    Attributes:
        masks: Of the image's own size, none of them empty.
        scores: Maskness after Matrix NMS, in [0, 1], `(N,)`.
        embeddings: The query that made each mask, resized to D channels, L2-normalised, `(N, D)`.
        query_index: Which of the Q queries made each mask, `(N,)`.
    """

    masks: ColumnRuns
    scores: Float[Tensor, " N"]
    embeddings: Float[Tensor, "N D"]
    query_index: Int64[Tensor, " N"]

    def __len__(self) -> int:
        return self.scores.shape[0]


def free_masks(
    features: Float[Tensor, "B E h w"],
    image_sizes: Sequence[tuple[int, int]],
    settings: FreeMaskSettings,
) -> list[FreeMasks]:
    """Find coarse object masks in each image.

    Every cell of the feature map, at several scales, asks where the map looks like itself; where the answer is clear,
    it is an object's mask. The result depends on the features alone: no randomness, ties go to the earlier query.

    Args:
        features: A stage's map, not normalised, of images that were resized to one size: no part of it is padding.
        image_sizes: Original height and width of each image.
        settings: Scales, thresholds and filters.

    Returns:
        One record an image, in order, on the features' device; an empty one where nothing was found.

    Raises:
        ValueError: If there are not as many sizes as images.
    """
    if len(image_sizes) != features.shape[0]:
        raise ValueError(f"{len(image_sizes)} image sizes for {features.shape[0]} feature maps")
    # bfloat16 similarities, as autocast would make them, are too coarse to normalise and to threshold.
    with torch.no_grad(), torch.autocast(device_type=features.device.type, enabled=False):
        # One image at a time: its Q x h x w similarities are the largest tensors of the extraction.
        return [_masks_of_image(one, size, settings) for one, size in zip(features.float(), image_sizes, strict=True)]


def _masks_of_image(
    features: Float[Tensor, "E h w"], image_size: tuple[int, int], settings: FreeMaskSettings
) -> FreeMasks:
    cells = features.flatten(1).T.contiguous()
    soft, flat = _soft_masks(features, cells, settings.query_scales)
    coarse = soft > settings.mask_threshold
    area = areas(coarse)
    inside = functional.threshold(soft, settings.mask_threshold, 0.0)
    maskness = inside.sum(dim=(1, 2)) / area.clamp(min=1)
    # No mask is scored above its maskness, nor is one decayed by what is scored below it: those that will be dropped
    # for their score may be dropped here, before pairs are looked at.
    query_index = ((area > 1) & ~flat & (maskness >= settings.min_maskness)).nonzero()[:, 0]
    soft, coarse, maskness = soft[query_index], coarse[query_index], maskness[query_index]
    scores = matrix_nms(coarse, maskness, torch.zeros_like(query_index), sigma=settings.nms_sigma)

    best = scores.argsort(descending=True, stable=True)[: settings.max_instances]
    best = best[scores[best] >= settings.min_maskness]
    masks = ColumnRuns.enlarged(soft[best], *image_size, settings.mask_threshold)
    plausible = _plausible(masks.projections(), settings)
    masks, best = masks[plausible], best[plausible]
    query_index = query_index[best]
    embeddings = _embeddings(cells, (features.shape[1], features.shape[2]), settings)[query_index]
    return FreeMasks(masks, scores[best], embeddings, query_index)


def _soft_masks(
    features: Float[Tensor, "E h w"], cells: Float[Tensor, "cells E"], scales: Sequence[float]
) -> tuple[Float[Tensor, "Q h w"], Bool[Tensor, " Q"]]:
    """Cosine similarity of each query to each cell, stretched to [0, 1]; and which queries are alike to all cells."""
    height, width = features.shape[1:]
    products = _products(features, cells, scales)
    # A query is a mean of cells, so its product with itself is the same mean of its products with them.
    own = [_at_scale(level, scale).flatten(1).diagonal() for level, scale in zip(products, scales, strict=True)]
    query_lengths = torch.cat(own).clamp(min=_SHORTEST**2).sqrt()[:, None]
    soft = torch.cat(products).flatten(1)
    soft /= cells.norm(dim=1).clamp(min=_SHORTEST)
    # Not `aminmax`, which takes ten times as long on a CPU.
    lowest, highest = soft.amin(dim=1, keepdim=True), soft.amax(dim=1, keepdim=True)
    # A query's length stretches its row, and so changes nothing but what is flat.
    spread, least_spread = highest - lowest, _FLAT_SIMILARITY * query_lengths
    soft -= lowest
    soft /= spread.maximum(least_spread)
    return soft.view(-1, height, width), (spread < least_spread)[:, 0]


def _products(
    features: Float[Tensor, "E h w"], cells: Float[Tensor, "cells E"], scales: Sequence[float]
) -> list[Float[Tensor, "_ h w"]]:
    """The dot products of the queries of each scale with all cells."""
    height, width = features.shape[1:]
    if 1.0 not in scales:
        return [(_at_scale(features, scale).flatten(1).T @ cells.T).view(-1, height, width) for scale in scales]
    # What is resized is the same if it is multiplied first.
    of_cells = gram(cells).view(-1, height, width)
    return [_at_scale(of_cells, scale).flatten(1).T.reshape(-1, height, width) for scale in scales]


def _at_scale(features: Float[Tensor, "C h w"], scale: float) -> Float[Tensor, "C _ _"]:
    """A map, resized; a scale that leaves less than a cell leaves one."""
    height, width = features.shape[1:]
    size = (max(1, int(height * scale)), max(1, int(width * scale)))
    if size == (height, width):
        return features
    return functional.interpolate(features[None], size=size, mode="bilinear", align_corners=False)[0]


def _plausible(projections: Projections, settings: FreeMaskSettings) -> Bool[Tensor, " N"]:
    """The released code's filters, for masks at the top border or across the image; and for what the resize emptied."""
    rows, columns = projections.rows > 0, projections.columns > 0
    height, width = rows.shape[1], columns.shape[1]
    row_count = rows.sum(dim=1)
    plausible = row_count > 0
    if settings.top_border > 0:
        row_sum = (rows * torch.arange(height, device=rows.device)).sum(dim=1)
        plausible &= row_sum > settings.top_border * height * row_count
    if settings.max_width < 1:
        plausible &= columns.sum(dim=1) < settings.max_width * width
    return plausible


def _embeddings(
    cells: Float[Tensor, "cells E"], map_size: tuple[int, int], settings: FreeMaskSettings
) -> Float[Tensor, "Q D"]:
    """The queries, resized to D channels: first, because that makes less of what the scales resize."""
    size = settings.embedding_channels
    resized = functional.interpolate(cells[:, None], size=size, mode="linear", align_corners=False)[:, 0]
    features = resized.T.unflatten(1, map_size)
    queries = torch.cat([_at_scale(features, scale).flatten(1).T for scale in settings.query_scales])
    return functional.normalize(queries, dim=1)
