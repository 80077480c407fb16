"""BoxInst's supervision: boxes alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from freesolo.solo.losses import box_regions
from freesolo.solo.supervisions.base import LossInputs, Supervision
from freesolo.solo.supervisions.positives import category_loss, level_counts
from freesolo.solo.supervisions.weak_terms import PAIR_COUNT, WeakTerm, pairwise_warmup, weak_terms
from freesolo.types import Instances

_TERMS: tuple[WeakTerm, ...] = ("max_projection", "pairwise")


class Boxes(Supervision):
    """A box says where an object ends, and neither how full its rows are nor what it looks like.

    Source: BoxInst (arXiv:2012.02310). Boxes are of annotated photos, so one without any is background.
    """

    boxes_alone = True

    def trusted(self, instances: Instances) -> Instances:
        """The boxes, filled: from here on nobody knows the masks."""
        return replace(instances, masks=box_regions(instances.masks))

    def losses(self, inputs: LossInputs) -> dict[str, Float[Tensor, ""]]:
        """BoxInst's losses: the projections' maxima over all positives alike, and pairs over all pairs alike.

        A term whose weight is 0 is neither computed nor returned.

        Returns:
            Weighted, the pairwise term by its warm-up too: `category`, `max_projection`, `pairwise`.
        """
        settings = inputs.settings
        with torch.autocast(inputs.predictions.category_logits.device.type, enabled=False):
            counts = level_counts(inputs)
            losses = {"category": category_loss(inputs, counts, empty_images="background")}
            terms = weak_terms(inputs, [name for name in _TERMS if getattr(settings, name) > 0])
            if "max_projection" in terms:
                mean = terms["max_projection"].sum() / counts.sum().clamp(min=1.0)
                losses["max_projection"] = settings.max_projection * mean
            if "pairwise" in terms:
                pairs = inputs.sum_over_workers(terms[PAIR_COUNT].detach().sum()).clamp(min=1.0)
                weight = settings.pairwise * pairwise_warmup(inputs.step, settings.pairwise_warmup_steps)
                losses["pairwise"] = weight * terms["pairwise"].sum() / pairs
        return losses
