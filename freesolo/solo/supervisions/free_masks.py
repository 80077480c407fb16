"""FreeSOLO's supervision: coarse masks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from freesolo.solo.losses import embedding_loss
from freesolo.solo.supervisions.base import LossInputs, Supervision
from freesolo.solo.supervisions.positives import category_loss, level_counts, share_of_level_mean
from freesolo.solo.supervisions.weak_terms import PAIR_COUNT, WeakTerm, pairwise_warmup, weak_terms


class FreeMasks(Supervision):
    """Coarse masks are trusted for where an object is, not for its outline (FreeSOLO, arXiv:2202.12181, sec. 3.2).

    # Deviation: the cells of an image without coarse masks are not trained. The paper's data has no such images, ours
    does: there Free Mask found nothing that it would vouch for, which does not make it background.
    """

    def losses(self, inputs: LossInputs) -> dict[str, Float[Tensor, ""]]:
        """FreeSOLO's losses: each mask and embedding term is averaged over a level's positives, then over the levels.

        A term whose weight is 0 is neither computed nor returned.

        # Deviation: a positive's pairwise term is the mean over the pairs that it selects, so that it is averaged as
        the others are; BoxInst's is the mean over all positives' pairs at once, where large objects count more.

        Args:
            inputs: Its instances have embeddings, unless `settings.embedding` is 0.

        Returns:
            Weighted, the pairwise term by its warm-up too: `category`, `max_projection`, `mean_projection`,
            `pairwise`, `embedding`.

        Raises:
            ValueError: If embeddings are trained and the instances' are of another length, or missing.
        """
        settings, positives = inputs.settings, inputs.positives
        if settings.embedding > 0:
            _check_embeddings(inputs)
        weights: dict[WeakTerm, float] = {
            "max_projection": settings.max_projection,
            "mean_projection": settings.mean_projection,
            "pairwise": settings.pairwise * pairwise_warmup(inputs.step, settings.pairwise_warmup_steps),
        }
        names = [name for name in weights if getattr(settings, name) > 0]
        with torch.autocast(inputs.predictions.category_logits.device.type, enabled=False):
            counts = level_counts(inputs)
            share = share_of_level_mean(positives, counts)
            losses = {"category": category_loss(inputs, counts, empty_images="unknown")}
            terms = weak_terms(inputs, names)
            if "pairwise" in terms:
                terms["pairwise"] = terms["pairwise"] / terms[PAIR_COUNT].clamp(min=1.0)
            losses |= {name: weights[name] * (terms[name] * share).sum() for name in names}
            if settings.embedding > 0:
                predicted = inputs.predictions.embeddings[positives.image, :, positives.cell].float()
                term = embedding_loss(predicted, inputs.instances.embeddings[positives.instance].float())
                losses["embedding"] = settings.embedding * (term * share).sum()
        return losses


def _check_embeddings(inputs: LossInputs) -> None:
    given, expected = inputs.instances.embeddings.shape[1], inputs.predictions.embeddings.shape[1]
    if given != expected:
        raise ValueError(
            f"the labels' embeddings have {given} channels and the head's {expected}: set model.embedding_channels="
            f"{given}, or losses.embedding=0 for labels without embeddings"
        )
