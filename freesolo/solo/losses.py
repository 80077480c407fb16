"""What a mask, a cell or an embedding loses: pure functions, which the supervisions put together over a batch.

Focal and Dice are SOLO's (arXiv:1912.04488), the projections and the embedding FreeSOLO's (arXiv:2202.12181).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def mask_dice_loss(logits: Float[Tensor, "N h w"], targets: Bool[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """`dice_loss` of masks before the sigmoid; it keeps one map of each for the gradient."""
    loss: Tensor = _MaskDice.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _MaskDice(torch.autograd.Function):
    """`1 - 2 n / d` of `p = sigmoid(x)`, with its gradient written out: `(4 n p / d - 2 q) / d * p (1 - p)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        p, q = logits.sigmoid().flatten(1), targets.flatten(1)
        overlap = torch.where(q, p, 0.0).sum(dim=1)
        denominator = torch.linalg.vecdot(p, p) + q.sum(dim=1)
        denominator = denominator.clamp(min=_SMALLEST_DENOMINATOR)
        ctx.save_for_backward(p, q, overlap, denominator)
        ctx.shape = logits.shape
        loss: Tensor = 1.0 - 2.0 * overlap / denominator
        return loss

    @staticmethod
    def backward(ctx: Any, *of_loss: Tensor) -> tuple[Tensor, None]:
        p, q, overlap, denominator = ctx.saved_tensors
        scale = (of_loss[0] / denominator)[:, None]
        gradient = torch.where(q, -2.0 * scale, 0.0).addcmul_(p, 4.0 * scale * (overlap / denominator)[:, None])
        gradient.mul_(p).mul_(1.0 - p)
        return gradient.view(ctx.shape), None


@dataclass(frozen=True, slots=True)
class SoftProjections:
    """Masks of values from 0 to 1, seen along each axis.

    Attributes:
        column_maxima: Of each column, `(N, w)`.
        row_maxima: Of each row, `(N, h)`.
        column_means: Of each column, `(N, w)`.
        row_means: Of each row, `(N, h)`.
    """

    column_maxima: Float[Tensor, "N w"]
    row_maxima: Float[Tensor, "N h"]
    column_means: Float[Tensor, "N w"]
    row_means: Float[Tensor, "N h"]

    @classmethod
    def of(cls, masks: Float[Tensor, "N h w"]) -> SoftProjections:
        """Of such masks."""
        return cls(masks.amax(dim=1), masks.amax(dim=2), masks.mean(dim=1), masks.mean(dim=2))

    @classmethod
    def of_logits(cls, logits: Float[Tensor, "N h w"]) -> SoftProjections:
        """Of masks before the sigmoid; it keeps one map of each for the gradient.

        Of equal maxima the gradient goes to one.
        """
        return cls(*_Projected.apply(logits))  # type: ignore[no-untyped-call]

    def take(self, rows: Int64[Tensor, " P"]) -> SoftProjections:
        """Those of some masks."""
        return SoftProjections(
            self.column_maxima[rows], self.row_maxima[rows], self.column_means[rows], self.row_means[rows]
        )


class _Projected(torch.autograd.Function):
    """`SoftProjections.of` the sigmoid, whose gradient is one map: of means everywhere, of maxima where they are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, ...]:
        column_maxima, ctx.row_of = logits.max(dim=1)
        row_maxima, ctx.column_of = logits.max(dim=2)
        probabilities = logits.sigmoid()
        ctx.save_for_backward(probabilities)
        return column_maxima.sigmoid(), row_maxima.sigmoid(), probabilities.mean(dim=1), probabilities.mean(dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (probabilities,) = ctx.saved_tensors
        of_column_maxima, of_row_maxima, of_column_means, of_row_means = gradients
        _, height, width = probabilities.shape
        gradient: Tensor = (of_column_means / height)[:, None, :] + (of_row_means / width)[:, :, None]
        gradient.scatter_add_(1, ctx.row_of[:, None, :], of_column_maxima[:, None, :])
        gradient.scatter_add_(2, ctx.column_of[:, :, None], of_row_maxima[:, :, None])
        return gradient.mul_(probabilities).mul_(1.0 - probabilities)


def max_projection_loss(predicted: SoftProjections, coarse: SoftProjections) -> Float[Tensor, " N"]:
    """Dice between the maxima of each column of both, plus that of the maxima of each row: where the object is.

    Source: `L_max` of FreeSOLO (arXiv:2202.12181) sec. 3.2, the projection term of BoxInst (arXiv:2012.02310).
    """
    along_x = dice_loss(predicted.column_maxima, coarse.column_maxima)
    return along_x + dice_loss(predicted.row_maxima, coarse.row_maxima)


def mean_projection_loss(predicted: SoftProjections, coarse: SoftProjections) -> Float[Tensor, " N"]:
    """Dice between the means of each column of both, plus that of the means of each row.

    A hole or a stray pixel of the coarse mask moves its means little, where it may move a maximum from 0 to 1.
    Source: `L_avg` of FreeSOLO (arXiv:2202.12181) sec. 3.2.
    """
    along_x = dice_loss(predicted.column_means, coarse.column_means)
    return along_x + dice_loss(predicted.row_means, coarse.row_means)


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
