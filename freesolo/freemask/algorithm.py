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

from freesolo.ops.masks import Projections, areas, resize_masks_soft
from freesolo.ops.nms import matrix_nms
from freesolo.settings import FreeMaskSettings

# Cosine similarities that differ by less are one value and float32's rounding: a mask made of them would be noise.
_FLAT_SIMILARITY = 1e-5


@dataclass(frozen=True, slots=True)
class FreeMasks:
    """The masks found in one image, best score first. N is 0 for an image in which none was found.

    Attributes:
        masks: At the image's own size, none of them empty, `(N, H, W)`.
        scores: Maskness after Matrix NMS, in [0, 1], `(N,)`.
        embeddings: The query that made each mask, resized to D channels, L2-normalised, `(N, D)`.
        query_index: Which of the Q queries made each mask, `(N,)`.
    """

    masks: Bool[Tensor, "N H W"]
    scores: Float[Tensor, " N"]
    embeddings: Float[Tensor, "N D"]
    query_index: Int64[Tensor, " N"]

    def __len__(self) -> int:
        return self.scores.shape[0]

    def __getitem__(self, index: Tensor | slice) -> FreeMasks:
        """The masks at `index`: a boolean mask, integer indices or a slice."""
        return FreeMasks(self.masks[index], self.scores[index], self.embeddings[index], self.query_index[index])


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
        features = features.float()
        queries = _queries(features, settings.query_scales)
        # One image at a time: its Q x h x w similarities are the largest tensors of the extraction.
        return [
            _masks_of_image(features[image], queries[image], image_sizes[image], settings)
            for image in range(features.shape[0])
        ]


def _queries(features: Float[Tensor, "B E h w"], scales: Sequence[float]) -> Float[Tensor, "B Q E"]:
    """The map at each scale, flattened; a scale that leaves less than a cell leaves one."""
    height, width = features.shape[-2:]
    pyramid = []
    for scale in scales:
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        level = functional.interpolate(features, size=size, mode="bilinear", align_corners=False)
        pyramid.append(level.flatten(2))
    return torch.cat(pyramid, dim=2).transpose(1, 2)


def _masks_of_image(
    features: Float[Tensor, "E h w"],
    queries: Float[Tensor, "Q E"],
    image_size: tuple[int, int],
    settings: FreeMaskSettings,
) -> FreeMasks:
    soft, flat = _soft_masks(features, queries)
    coarse = soft > settings.mask_threshold
    area = areas(coarse)
    valid = (area > 1) & ~flat
    # A dropped query stays as an empty mask, which overlaps none and scores 0: its removal would wait for the device.
    coarse = coarse & valid[:, None, None]
    maskness = (soft * coarse).sum(dim=(1, 2)) / area.clamp(min=1)
    scores = matrix_nms(coarse, maskness, torch.zeros_like(area), sigma=settings.nms_sigma)

    best = scores.argsort(descending=True, stable=True)[: settings.max_instances]
    masks = resize_masks_soft(soft[best], *image_size) > settings.mask_threshold
    found = FreeMasks(masks, scores[best], _embeddings(queries[best], settings.embedding_channels), best)
    return found[valid[best] & (found.scores >= settings.min_maskness) & _plausible(masks, settings)]


def _soft_masks(
    features: Float[Tensor, "E h w"], queries: Float[Tensor, "Q E"]
) -> tuple[Float[Tensor, "Q h w"], Bool[Tensor, " Q"]]:
    """Cosine similarity of each query to each cell, stretched to [0, 1]; and which queries are alike to all cells."""
    keys = functional.normalize(features, dim=0).flatten(1)
    similarity = functional.normalize(queries, dim=1) @ keys
    lowest, highest = similarity.aminmax(dim=1, keepdim=True)
    spread = highest - lowest
    soft = (similarity - lowest) / spread.clamp(min=_FLAT_SIMILARITY)
    return soft.view(-1, *features.shape[1:]), spread[:, 0] < _FLAT_SIMILARITY


def _plausible(masks: Bool[Tensor, "N H W"], settings: FreeMaskSettings) -> Bool[Tensor, " N"]:
    """The released code's filters, for masks at the top border or across the image; and for what the resize emptied."""
    height, width = masks.shape[1:]
    projections = Projections.of(masks)
    rows, columns = projections.rows > 0, projections.columns > 0
    row_count = rows.sum(dim=1)
    plausible = row_count > 0
    if settings.top_border > 0:
        row_sum = (rows * torch.arange(height, device=masks.device)).sum(dim=1)
        plausible &= row_sum > settings.top_border * height * row_count
    if settings.max_width < 1:
        plausible &= columns.sum(dim=1) < settings.max_width * width
    return plausible


def _embeddings(queries: Float[Tensor, "N E"], channels: int) -> Float[Tensor, "N D"]:
    resized = functional.interpolate(queries[:, None], size=channels, mode="linear", align_corners=False)
    return functional.normalize(resized[:, 0], dim=1)
