"""The cells of a batch that have an object, and means over them: what all supervisions count and compute alike.

Means are over all workers' positives, by counts that `sum_over_workers` adds up. A batch without positives has losses
of 0 that depend on every prediction, with gradients of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from freesolo.settings import LossSettings
from freesolo.solo.heads.base import Head, Predictions
from freesolo.solo.losses import sigmoid_focal_loss
from freesolo.solo.targets import count_slots
from freesolo.types import GridTargets, Instances

SumOverWorkers: TypeAlias = Callable[[Tensor], Tensor]

EmptyImages: TypeAlias = Literal["unknown", "background"]
"""What an image without instances says of its cells: nothing, or that there is nothing."""

SLOTS_AT_ONCE = 128
"""Masks whose losses are computed together. It bounds memory; results do not depend on it."""


@dataclass(frozen=True, slots=True)
class Positives:
    """The positives of a batch alone, in the order of images, and how many each image has.

    Attributes:
        instance: Row of `Instances`, `(P,)`.
        image: Image of the batch, `(P,)`.
        level: Pyramid level, `(P,)`.
        cell: Index among all levels' cells, `(P,)`.
        per_image: Of each image of the batch.
    """

    instance: Int64[Tensor, " P"]
    image: Int64[Tensor, " P"]
    level: Int64[Tensor, " P"]
    cell: Int64[Tensor, " P"]
    per_image: tuple[int, ...]

    @classmethod
    def of(cls, targets: GridTargets, per_image: Sequence[int] | None) -> Positives:
        """The valid positives, which come first."""
        per_image = count_slots(targets).wait() if per_image is None else tuple(per_image)
        total = sum(per_image)
        return cls(
            instance=targets.instance[:total],
            image=targets.image[:total],
            level=targets.level[:total],
            cell=targets.cell[:total],
            per_image=per_image,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some positives of one image and their masks.

    Attributes:
        image: Of the batch.
        instance: Row of `Instances`, `(P,)`.
        logits: Masks before the sigmoid, float32, `(P, h, w)`.
    """

    image: int
    instance: Int64[Tensor, " P"]
    logits: Float[Tensor, "P h w"]


def over_chunks(
    head: Head[Any],
    predictions: Predictions,
    positives: Positives,
    terms_of: Callable[[Chunk], Tensor],
    *,
    terms: int,
) -> Float[Tensor, "terms P"]:
    """The terms of all positives, a chunk of one image's at a time.

    Masks and what is derived from them are computed again for the backward pass instead of kept: kept, they would be
    tens of maps at stride 4 for each positive, more than the network's own activations.
    """

    def of_chunk(one: Predictions, image: int, cell: Tensor, instance: Tensor) -> Tensor:
        logits = head.mask_logits(one, cell)
        return terms_of(Chunk(image, instance, logits.float()))

    parts = [predictions.category_logits.new_zeros(terms, 0, dtype=torch.float32)]
    start = 0
    for image, (one, count) in enumerate(zip(predictions.each_image(), positives.per_image, strict=True)):
        end = start + count
        for first in range(start, end, SLOTS_AT_ONCE):
            chunk = slice(first, min(first + SLOTS_AT_ONCE, end))
            part: Tensor = checkpoint(
                of_chunk,
                one,
                image,
                positives.cell[chunk],
                positives.instance[chunk],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            parts.append(part)
        start = end
    return torch.cat(parts, dim=1)


def level_counts(positives: Positives, num_levels: int, sum_over_workers: SumOverWorkers) -> Float[Tensor, " levels"]:
    """All workers' positives on each level."""
    levels = torch.arange(num_levels, device=positives.level.device)
    return sum_over_workers((positives.level == levels[:, None]).sum(dim=1).float())


def share_of_level_mean(positives: Positives, counts: Float[Tensor, " levels"]) -> Float[Tensor, " P"]:
    """What each positive's term is multiplied by, so that the sum is the mean of the levels' means."""
    levels_with_any = (counts > 0).sum()
    return 1.0 / (counts[positives.level] * levels_with_any)


def category_loss(
    predictions: Predictions,
    targets: GridTargets,
    instances: Instances,
    counts: Float[Tensor, " levels"],
    empty_images: EmptyImages,
    settings: LossSettings,
) -> Float[Tensor, ""]:
    """Focal loss over all cells of all images, over the number of positives and one.

    Args:
        predictions: Of the whole batch.
        targets: Its categories are those of the cells.
        instances: Say which images have any.
        counts: Of `level_counts`.
        empty_images: What images without instances are taken for.
        settings: Weights.
    """
    cells = sigmoid_focal_loss(
        predictions.category_logits, targets.categories, alpha=settings.focal_alpha, gamma=settings.focal_gamma
    )
    if empty_images == "unknown":
        images = torch.arange(len(predictions), device=cells.device)
        occupied = instances.masks.flatten(1).any(dim=1)
        has_instances = ((instances.image_index == images[:, None]) & occupied).any(dim=1)
        cells = torch.where(has_instances[:, None], cells, 0.0)
    return settings.category * cells.sum() / (counts.sum() + 1.0)
