"""What a mask, a cell or an embedding loses: pure functions, which the supervisions put together over a batch.

Focal and Dice are SOLO's (arXiv:1912.04488), the projections and the embedding FreeSOLO's (arXiv:2202.12181).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from freesolo.ops.masks import boxes_xyxy

_SMALLEST_DENOMINATOR = 1e-12


def sigmoid_focal_loss(
    logits: Float[Tensor, "B C L"], categories: Int64[Tensor, "B L"], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "B L"]:
    """`-alpha_t (1 - p_t)^gamma log(p_t)` of each cell, summed over the categories.

    Source: Focal loss (arXiv:1708.02002) eq. 5, one sigmoid per category.

    Args:
        logits: Before the sigmoid.
        categories: Category of each cell, C where it is background.
        alpha: Weight of the cell's own category; that of the others is `1 - alpha`.
        gamma: How little cells count that are right already.
    """
    indices = torch.arange(logits.shape[1], device=logits.device)
    own = categories[:, None, :] == indices[None, :, None]
    towards = torch.where(own, logits, -logits).float()  # p_t = sigmoid(towards)
    # 1 - p_t as exp(log), whose slope is finite for every gamma.
    modulation = torch.exp(gamma * functional.logsigmoid(-towards))
    balance = torch.where(own, alpha, 1.0 - alpha)
    return (-balance * modulation * functional.logsigmoid(towards)).sum(dim=1)


def dice_loss(probabilities: Float[Tensor, "N ..."], targets: Float[Tensor, "N ..."]) -> Float[Tensor, " N"]:
    """`1 - 2 sum(p q) / (sum p^2 + sum q^2)` of each row (SOLO, arXiv:1912.04488, eq. 3). Both empty: 1."""
    p, q = probabilities.flatten(1), targets.flatten(1)
    denominator = p.square().sum(dim=1) + q.square().sum(dim=1)
    return 1.0 - 2.0 * (p * q).sum(dim=1) / denominator.clamp(min=_SMALLEST_DENOMINATOR)


def max_projection_loss(probabilities: Float[Tensor, "N h w"], coarse: Float[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """Dice between the maxima of each column of both, plus that of the maxima of each row: where the object is.

    Source: `L_max` of FreeSOLO (arXiv:2202.12181) sec. 3.2, the projection term of BoxInst (arXiv:2012.02310).
    """
    along_x = dice_loss(probabilities.amax(dim=1), coarse.amax(dim=1))
    along_y = dice_loss(probabilities.amax(dim=2), coarse.amax(dim=2))
    return along_x + along_y


def mean_projection_loss(probabilities: Float[Tensor, "N h w"], coarse: Float[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """Dice between the means of each column of both, plus that of the means of each row.

    A hole or a stray pixel of the coarse mask moves its means little, where it may move a maximum from 0 to 1.
    Source: `L_avg` of FreeSOLO (arXiv:2202.12181) sec. 3.2.
    """
    along_x = dice_loss(probabilities.mean(dim=1), coarse.mean(dim=1))
    along_y = dice_loss(probabilities.mean(dim=2), coarse.mean(dim=2))
    return along_x + along_y


def embedding_loss(predicted: Float[Tensor, "P E"], targets: Float[Tensor, "P E"]) -> Float[Tensor, " P"]:
    """Negative cosine similarity, in [-1, 1] (FreeSOLO, arXiv:2202.12181, sec. 3.2); 0 for a vector of zeros."""
    return -functional.cosine_similarity(predicted, targets, dim=1)


def box_regions(masks: Bool[Tensor, "N h w"]) -> Bool[Tensor, "N h w"]:
    """True inside each mask's box; nowhere for an empty mask."""
    left, top, right, bottom = boxes_xyxy(masks)[:, :, None].unbind(dim=1)
    rows = torch.arange(masks.shape[1], device=masks.device)
    columns = torch.arange(masks.shape[2], device=masks.device)
    inside_rows = (top <= rows) & (rows < bottom)
    inside_columns = (left <= columns) & (columns < right)
    return inside_rows[:, :, None] & inside_columns[:, None, :]
