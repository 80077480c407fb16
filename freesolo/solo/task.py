"""SOLO as something to train: views of a batch in, losses out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from freesolo.ops.affinity import colour_similarity
from freesolo.ops.collectives import sum_over_workers, world_size
from freesolo.ops.images import normalize
from freesolo.settings import LossSettings, SoloModelSettings
from freesolo.solo.heads.base import MASK_STRIDE
from freesolo.solo.losses import box_regions, free_mask_losses, mask_losses
from freesolo.solo.model import Segmenter
from freesolo.solo.targets import assign_targets, count_slots
from freesolo.types import ImageBatch, Instances, SegmentationBatch

Supervision = Literal["free_masks", "masks", "boxes"]


class SoloTask(nn.Module):
    """A segmenter and the losses that it is trained by.

    Every parameter is in the graph of every step, so distributed training needs no search for unused ones.

    Attributes:
        segmenter: What is trained.
        supervision: Whether masks are coarse, right, or not looked at: BoxInst (arXiv:2012.02310) has boxes alone.
        losses: Weights.
    """

    def __init__(self, model: SoloModelSettings, supervision: Supervision, losses: LossSettings) -> None:
        """Build the network; its values are undefined until `initialise` or a checkpoint sets them."""
        super().__init__()
        self.segmenter = Segmenter(model)
        self.supervision = supervision
        # A box says where an object ends, and neither how full its rows are nor what it looks like.
        boxes = {"mean_projection": 0.0, "embedding": 0.0}
        self.losses = losses.model_copy(update=boxes) if supervision == "boxes" else losses

    def forward(self, views: Sequence[SegmentationBatch], step: int) -> dict[str, Float[Tensor, ""]]:
        """The weighted losses of one step, whose sum is what to minimise.

        Views of a batch are trained together, as one batch. The pairwise term compares the colours of each view as it
        is: in a strong view those are jittered and have erased patches, the same that the network sees.

        Args:
            views: Weak alone, or weak and strong; all over one padded extent, divisible by 32. Pixels in 0..255.
            step: Optimiser steps taken so far.

        Returns:
            See `free_mask_losses` and `mask_losses`.

        Raises:
            ValueError: If the extents differ or are not divisible by 32.
        """
        batch = concatenate(views)
        instances = batch.instances
        if self.supervision == "boxes":  # from here on nobody knows the masks
            instances = replace(instances, masks=box_regions(instances.masks))
        height, width = batch.images.pixels.shape[-2:]
        targets = assign_targets(instances, len(batch), height, width, self.segmenter.settings)
        counts = count_slots(targets)  # sent before the forward pass, so that nothing waits for it after
        predictions = self.segmenter(normalize(batch.images.pixels))
        slots_per_image = counts.wait()
        if self.supervision == "masks":
            return mask_losses(
                self.segmenter.head,
                predictions,
                targets,
                instances,
                self.losses,
                slots_per_image=slots_per_image,
                sum_over_workers=sum_over_workers,
                num_workers=world_size(),
            )
        similarity = colour_similarity(batch.images.pixels, batch.images.valid_pixels(), stride=MASK_STRIDE)
        return free_mask_losses(
            self.segmenter.head,
            predictions,
            targets,
            instances,
            similarity,
            self.losses,
            step=step,
            empty_images="background" if self.supervision == "boxes" else "unknown",
            slots_per_image=slots_per_image,
            sum_over_workers=sum_over_workers,
            num_workers=world_size(),
        )

    def initialise(self, generator: torch.Generator) -> SoloTask:
        """Set every parameter and buffer from `generator`."""
        self.segmenter.initialise(generator)
        return self

    def after_step(self, step: int) -> None:
        """Nothing: all that SOLO keeps between steps are its parameters."""
        del step


def concatenate(batches: Sequence[SegmentationBatch]) -> SegmentationBatch:
    """Several batches as one, their images in order.

    Raises:
        ValueError: If there is none, or padded extents differ.
    """
    if not batches:
        raise ValueError("there are no views to train on")
    extents = {tuple(batch.images.pixels.shape[-2:]) for batch in batches}
    if len(extents) > 1:
        raise ValueError(f"views are padded to different extents, {sorted(extents)}: pad them to one")
    first_images = [sum(len(earlier) for earlier in batches[:position]) for position in range(len(batches))]
    parts = [batch.instances for batch in batches]
    return SegmentationBatch(
        images=ImageBatch(
            pixels=torch.cat([batch.images.pixels for batch in batches]),
            sizes=torch.cat([batch.images.sizes for batch in batches]),
            image_ids=tuple(image_id for batch in batches for image_id in batch.images.image_ids),
        ),
        instances=Instances(
            image_index=torch.cat([part.image_index + first for part, first in zip(parts, first_images, strict=True)]),
            masks=torch.cat([part.masks for part in parts]),
            category_ids=torch.cat([part.category_ids for part in parts]),
            scores=torch.cat([part.scores for part in parts]),
            embeddings=torch.cat([part.embeddings for part in parts]),
        ),
    )
