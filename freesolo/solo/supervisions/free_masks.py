"""FreeSOLO's supervision: coarse masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from freesolo.ops.affinity import colour_similarity, pairwise_affinity_terms
from freesolo.solo.heads.base import MASK_STRIDE
from freesolo.solo.losses import box_regions, embedding_loss, max_projection_loss, mean_projection_loss
from freesolo.solo.supervisions.base import LossInputs, Supervision
from freesolo.solo.supervisions.positives import (
    Chunk,
    EmptyImages,
    category_loss,
    level_counts,
    over_chunks,
    share_of_level_mean,
)
from freesolo.solo.targets import mask_targets


class FreeMasks(Supervision):
    """Coarse masks are trusted for where an object is, not for its outline (FreeSOLO, arXiv:2202.12181, sec. 3.2).

    # Deviation: the cells of an image without coarse masks are not trained. The paper's data has no such images, ours
    does: there Free Mask found nothing that it would vouch for, which does not make it background.
    """

    def losses(self, inputs: LossInputs) -> dict[str, Float[Tensor, ""]]:
        """See `coarse_mask_losses`."""
        return coarse_mask_losses(inputs, empty_images="unknown")


def coarse_mask_losses(inputs: LossInputs, *, empty_images: EmptyImages) -> dict[str, Float[Tensor, ""]]:
    """The losses on masks that say where an object is, not its outline.

    Source: FreeSOLO (arXiv:2202.12181) sec. 3.2. Each mask and embedding term is averaged over the positives of a
    level, then over the levels that have any.

    # Deviation: a positive's pairwise term is the mean over the pairs that it selects; BoxInst's is the mean over all
    positives' pairs at once, where large objects count more.

    Args:
        inputs: Its instances have embeddings, unless `settings.embedding` is 0. A term whose weight is 0 is neither
            computed nor returned.
        empty_images: What images without instances are taken for.

    Returns:
        Weighted, the pairwise term by its warm-up too: `category`, `max_projection`, `mean_projection`, `pairwise`,
        `embedding`.

    Raises:
        ValueError: If embeddings are trained and the instances' are of another length, or missing.
    """
    settings, positives = inputs.settings, inputs.positives
    if settings.embedding > 0:
        _check_embeddings(inputs)
    weights = {
        "max_projection": settings.max_projection,
        "mean_projection": settings.mean_projection,
        "pairwise": settings.pairwise * pairwise_warmup(inputs.step, settings.pairwise_warmup_steps),
    }
    names = [name for name in weights if getattr(settings, name) > 0]
    with torch.autocast(inputs.predictions.category_logits.device.type, enabled=False):
        counts = level_counts(inputs)
        share = share_of_level_mean(positives, counts)
        losses = {"category": category_loss(inputs, counts, empty_images=empty_images)}
        terms = _coarse_mask_terms(inputs, names)
        losses |= {name: weights[name] * (term * share).sum() for name, term in zip(names, terms, strict=True)}
        if settings.embedding > 0:
            predicted = inputs.predictions.embeddings[positives.image, :, positives.cell].float()
            term = embedding_loss(predicted, inputs.instances.embeddings[positives.instance].float())
            losses["embedding"] = settings.embedding * (term * share).sum()
    return losses


def pairwise_warmup(step: int, warmup_steps: int) -> float:
    """The pairwise term's share of its weight: from 0 at step 0, in a line, to 1 at `warmup_steps` and after."""
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


def _coarse_mask_terms(inputs: LossInputs, names: Sequence[str]) -> Float[Tensor, "terms P"]:
    """The terms called `names`, of each positive, unweighted."""
    if not names:
        return torch.zeros(0, len(inputs.positives.cell), device=inputs.positives.cell.device)
    masks = mask_targets(inputs.instances, MASK_STRIDE)
    regions = box_regions(masks)
    # Of a strong view as it is: its colours are jittered and it has erased patches, the same that the network sees.
    similarity = colour_similarity(inputs.images.pixels, inputs.images.valid_pixels(), stride=MASK_STRIDE)

    def pairwise(chunk: Chunk) -> Tensor:
        pairs = pairwise_affinity_terms(
            chunk.logits,
            similarity,
            chunk.image,
            regions[chunk.instance],
            min_similarity=inputs.settings.pairwise_min_similarity,
        )
        return pairs.loss_sum / pairs.pair_count.clamp(min=1.0)

    def terms_of(chunk: Chunk) -> Tensor:
        probabilities, coarse = chunk.logits.sigmoid(), masks[chunk.instance].float()
        functions = {
            "max_projection": lambda: max_projection_loss(probabilities, coarse),
            "mean_projection": lambda: mean_projection_loss(probabilities, coarse),
            "pairwise": lambda: pairwise(chunk),
        }
        return torch.stack([functions[name]() for name in names])

    return over_chunks(inputs, terms_of, terms=len(names))


def _check_embeddings(inputs: LossInputs) -> None:
    given, expected = inputs.instances.embeddings.shape[1], inputs.predictions.embeddings.shape[1]
    if given != expected:
        raise ValueError(
            f"the labels' embeddings have {given} channels and the head's {expected}: set model.embedding_channels="
            f"{given}, or losses.embedding=0 for labels without embeddings"
        )
