"""BoxInst's supervision: boxes alone."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from freesolo.solo.losses import box_regions
from freesolo.solo.supervisions.base import LossInputs, Supervision
from freesolo.solo.supervisions.free_masks import coarse_mask_losses
from freesolo.types import Instances


class Boxes(Supervision):
    """A box says where an object ends, and neither how full its rows are nor what it looks like.

    Source: BoxInst (arXiv:2012.02310): the projections' maxima and the pairwise term. Boxes are of annotated photos, so
    one without any is background.
    """

    boxes_alone = True

    def trusted(self, instances: Instances) -> Instances:
        """The boxes, filled: from here on nobody knows the masks."""
        return replace(instances, masks=box_regions(instances.masks))

    def losses(self, inputs: LossInputs) -> dict[str, Float[Tensor, ""]]:
        """`category`, `max_projection`, `pairwise`; see `coarse_mask_losses`."""
        settings = inputs.settings.model_copy(update={"mean_projection": 0.0, "embedding": 0.0})
        return coarse_mask_losses(replace(inputs, settings=settings), empty_images="background")
