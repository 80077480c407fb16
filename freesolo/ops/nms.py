"""Suppression of duplicates, with no loop and no wait for the device: Matrix NMS of masks, point NMS of grids."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from freesolo.ops.masks import mask_iou


def matrix_nms(
    masks: Bool[Tensor, "N H W"],
    scores: Float[Tensor, " N"],
    category_ids: Int64[Tensor, " N"],
    *,
    sigma: float = 2.0,
    kernel: Literal["gaussian", "linear"] = "gaussian",
) -> Float[Tensor, " N"]:
    """Decay each score by how much better-scored masks of its category overlap it.

    Source: SOLOv2 (arXiv:2003.10152) sec. 3.4. With masks sorted by score, mask j's score is multiplied by
    `min over i < j of f(IoU_ij) / f(compensate_i)`, `compensate_i = max over k < i of IoU_ki`, where
    `f(x) = exp(-sigma x^2)` (gaussian) or `1 - x` (linear).

    Args:
        masks: In any order. N may be 0.
        scores: In [0, 1].
        category_ids: Only masks of one category suppress each other.
        sigma: Strength of the gaussian kernel.
        kernel: Form of f.

    Returns:
        Decayed scores in the order of the input; never above the scores given. Of equal scores the earlier in the input
        counts as the better one.
    """
    if masks.shape[0] == 0:
        return scores.clone()
    order = scores.argsort(descending=True, stable=True)
    sorted_masks, sorted_categories = masks[order], category_ids[order]
    same_category = sorted_categories[:, None] == sorted_categories[None, :]
    iou = (mask_iou(sorted_masks, sorted_masks) * same_category).triu(diagonal=1)
    compensate = iou.amax(dim=0)[:, None]
    # A pair that does not count has IoU 0, a ratio of 1 or more; row 0 has compensate 0, so the minimum is at most 1.
    # The least of the exponentials is that of the greatest exponent: one exponential a mask, and not one a pair.
    if kernel == "gaussian":
        decay = torch.exp(-sigma * (iou.square() - compensate.square()).amax(dim=0))
    else:
        # A mask with an exact duplicate before it (compensate 1) divides by 0. Clamped, it suppresses no more than that
        # duplicate does: the ratio is huge, or 0 for yet another duplicate.
        decay = ((1.0 - iou) / (1.0 - compensate).clamp(min=1e-12)).amin(dim=0)
    return scores * torch.empty_like(scores).scatter_(0, order, decay.to(scores.dtype))


def point_nms(scores: Float[Tensor, "B C S S"]) -> Float[Tensor, "B C S S"]:
    """Zero every cell that is not the maximum of the 2 x 2 window of itself, its upper, left and upper-left neighbours.

    Source: SOLOv2's released inference (arXiv:2003.10152). Equal neighbours all survive.
    """
    # Padded by one on every side, the window that ends at a cell has the cell's own index; the last row and column go.
    window_max = functional.max_pool2d(scores, kernel_size=2, stride=1, padding=1)[:, :, :-1, :-1]
    return scores * (scores == window_max)
