"""SOLO as something to train: views of a batch in, losses out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from freesolo.ops.collectives import sum_over_workers, world_size
from freesolo.ops.images import normalize
from freesolo.settings import LossSettings, SoloModelSettings, SupervisionKind
from freesolo.solo.model import Segmenter
from freesolo.solo.supervisions.base import LossInputs, Positives, Supervision
from freesolo.solo.supervisions.boxes import Boxes
from freesolo.solo.supervisions.free_masks import FreeMasks
from freesolo.solo.supervisions.masks import Masks
from freesolo.solo.targets import assign_targets, count_slots
from freesolo.types import ImageBatch, Instances, SegmentationBatch

SUPERVISIONS: dict[SupervisionKind, Supervision] = {"free_masks": FreeMasks(), "masks": Masks(), "boxes": Boxes()}
"""By `TrainSettings.supervision`."""


class SoloTask(nn.Module):
    """A segmenter and the losses that it is trained by.

    Every parameter is in the graph of every step, so distributed training needs no search for unused ones.

    Attributes:
        segmenter: What is trained.
        supervision: What labels are trusted for.
        losses: Weights.
    """

    def __init__(self, model: SoloModelSettings, supervision: SupervisionKind, losses: LossSettings) -> None:
        """Build the network; its values are undefined until `initialise` or a checkpoint sets them."""
        super().__init__()
        self.segmenter = Segmenter(model)
        self.supervision = SUPERVISIONS[supervision]
        self.losses = losses

    def forward(self, views: Sequence[SegmentationBatch], step: int) -> dict[str, Float[Tensor, ""]]:
        """The weighted losses of one step, whose sum is what to minimise: two workers' gradients are one's with both's.

        Views of a batch are trained together, as one batch.

        Args:
            views: Weak alone, or weak and strong; all over one padded extent, divisible by 32. Pixels in 0..255.
            step: Optimiser steps taken so far.

        Returns:
            Of the supervision.

        Raises:
            ValueError: If the extents differ or are not divisible by 32.
        """
        batch = concatenate(views)
        instances = self.supervision.trusted(batch.instances)
        height, width = batch.images.pixels.shape[-2:]
        targets = assign_targets(instances, len(batch), height, width, self.segmenter.settings)
        counts = count_slots(targets)  # sent before the forward pass, so that nothing waits for it after
        predictions = self.segmenter(normalize(batch.images.pixels))
        inputs = LossInputs(
            self.segmenter.head,
            predictions,
            targets.categories,
            Positives.of(targets, counts.wait()),
            batch.images,
            instances,
            self.losses,
            step,
            sum_over_workers,
        )
        # Distributed training averages the workers' gradients, and these losses add up to those of the whole batch.
        return {name: loss * world_size() for name, loss in self.supervision.losses(inputs).items()}

    def initialise(self, generator: torch.Generator) -> SoloTask:
        """Set every parameter and buffer from `generator`."""
        self.segmenter.initialise(generator)
        return self


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
