"""BoxInst's supervision: boxes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from freesolo.settings import LossSettings
from freesolo.solo.heads.base import Head, Predictions
from freesolo.solo.losses import box_regions
from freesolo.solo.positives import SumOverWorkers
from freesolo.solo.supervisions.base import Supervision
from freesolo.solo.supervisions.free_masks import free_mask_losses, similarity_of
from freesolo.types import GridTargets, ImageBatch, Instances


class Boxes(Supervision):
    """A box says where an object ends, and neither how full its rows are nor what it looks like.

    Source: BoxInst (arXiv:2012.02310): the projections' maxima and the pairwise term. Boxes are of annotated photos, so
    one without any is background.
    """

    boxes_alone = True

    def trusted(self, instances: Instances) -> Instances:
        """The boxes, filled: from here on nobody knows the masks."""
        return replace(instances, masks=box_regions(instances.masks))

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
        """`category`, `max_projection`, `pairwise`; see `free_mask_losses`."""
        return free_mask_losses(
            head,
            predictions,
            targets,
            instances,
            similarity_of(images),
            settings.model_copy(update={"mean_projection": 0.0, "embedding": 0.0}),
            step=step,
            slots_per_image=slots_per_image,
            empty_images="background",
            sum_over_workers=sum_over_workers,
            num_workers=num_workers,
        )
