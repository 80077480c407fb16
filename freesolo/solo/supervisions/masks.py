"""SOLO's supervision: masks that are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from freesolo.settings import LossSettings
from freesolo.solo.heads.base import MASK_STRIDE, Head, Predictions
from freesolo.solo.losses import dice_loss
from freesolo.solo.positives import (
    Chunk,
    EmptyImages,
    Positives,
    SumOverWorkers,
    category_loss,
    level_counts,
    over_chunks,
)
from freesolo.solo.supervisions.base import Supervision
from freesolo.solo.targets import mask_targets
from freesolo.types import GridTargets, ImageBatch, Instances


class Masks(Supervision):
    """Masks are right to the pixel, and a photo without any is background (SOLO, arXiv:1912.04488)."""

    def losses(
        self,
        head: Head[Any],
        predictions: Predictions,
        targets: GridTargets,
        images: ImageBatch,
        instances: Instances,
        settings: LossSettings,
        *,
        step: int,
        slots_per_image: Sequence[int],
        sum_over_workers: SumOverWorkers,
        num_workers: int,
    ) -> dict[str, Float[Tensor, ""]]:
        """See `mask_losses`."""
        del images, step
        return mask_losses(
            head,
            predictions,
            targets,
            instances,
            settings,
            slots_per_image=slots_per_image,
            sum_over_workers=sum_over_workers,
            num_workers=num_workers,
        )


def mask_losses(
    head: Head[Any],
    predictions: Predictions,
    targets: GridTargets,
    instances: Instances,
    settings: LossSettings,
    *,
    slots_per_image: Sequence[int] | None = None,
    empty_images: EmptyImages = "background",
    sum_over_workers: SumOverWorkers = torch.clone,
    num_workers: int = 1,
) -> dict[str, Float[Tensor, ""]]:
    """SOLOv2's losses on masks that are right: focal on every cell, Dice on the positives' masks.

    Source: SOLO (arXiv:1912.04488) sec. 3.3.2, eq. 2 and 3: Dice is averaged over all positives alike.

    Args:
        head: Makes masks of `predictions`.
        predictions: Of the whole batch.
        targets: Of `assign_targets` for `instances`.
        instances: Masks over the padded extent.
        settings: Weights.
        slots_per_image: From `count_slots`; None: counted here, which waits for the device.
        empty_images: What images without instances are taken for.
        sum_over_workers: Adds a tensor up over the workers that train together.
        num_workers: How many those are.

    Returns:
        Weighted losses, whose sum is what to minimise: `category`, `dice`.
    """
    positives = Positives.of(targets, slots_per_image)
    with torch.autocast(predictions.category_logits.device.type, enabled=False):
        counts = level_counts(positives, len(head.grid_sizes), sum_over_workers)
        masks = mask_targets(instances, MASK_STRIDE)

        def terms_of(chunk: Chunk) -> Float[Tensor, "1 P"]:
            return dice_loss(chunk.logits.sigmoid(), masks[chunk.instance].float())[None]

        dice = over_chunks(head, predictions, positives, terms_of, terms=1)[0]
        losses = {
            "category": category_loss(predictions, targets, instances, counts, empty_images, settings)
            + predictions.zero(),
            "dice": settings.dice * dice.sum() / counts.sum().clamp(min=1.0),
        }
    return {name: loss * num_workers for name, loss in losses.items()}
