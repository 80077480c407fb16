"""The two things that the loop trains: a module for the losses, and how a batch becomes its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from freesolo.data.augment import contrastive_view, strong_view
from freesolo.data.copy_paste import copy_paste
from freesolo.densecl.model import DenseCL
from freesolo.settings import SegmentationViewSettings, ViewSettings
from freesolo.solo.task import SoloTask
from freesolo.types import CropPair, SegmentationBatch, ViewPair


@dataclass(frozen=True, slots=True)
class DenseCLTraining:
    """DenseCL (arXiv:2011.09157) on two augmented crops of each photo."""

    module: DenseCL
    views: ViewSettings

    def prepare(self, batch: CropPair, generator: torch.Generator) -> ViewPair:
        """Colours, blur, flips and normalisation of both crops."""
        query = contrastive_view(batch.query, self.views, generator)
        key = contrastive_view(batch.key, self.views, generator)
        return ViewPair(query, key, batch.image_ids)

    def after_step(self, step: int) -> None:
        """The key encoder follows the query encoder."""
        self.module.after_step(step)


@dataclass(frozen=True, slots=True)
class SoloTraining:
    """SOLO on weak and strong views together (FreeSOLO, arXiv:2202.12181, sec. 3.2)."""

    module: SoloTask
    views: SegmentationViewSettings

    def prepare(self, batch: SegmentationBatch, generator: torch.Generator) -> tuple[SegmentationBatch, ...]:
        """The batch as it is and, if the settings say so, a strong view of it with pasted instances."""
        if not self.views.strong:
            return (batch,)
        strong = SegmentationBatch(strong_view(batch.images, self.views, generator), batch.instances)
        if self.views.copy_paste:
            strong = copy_paste(strong, generator)
        return (batch, strong)

    def after_step(self, step: int) -> None:
        """Nothing follows."""
