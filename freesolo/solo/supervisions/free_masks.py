"""FreeSOLO's supervision: coarse masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from freesolo.ops.affinity import colour_similarity, pairwise_affinity_terms
from freesolo.settings import LossSettings
from freesolo.solo.heads.base import MASK_STRIDE, Head, Predictions
from freesolo.solo.losses import box_regions, embedding_loss, max_projection_loss, mean_projection_loss
from freesolo.solo.positives import (
    Chunk,
    EmptyImages,
    Positives,
    SumOverWorkers,
    category_loss,
    level_counts,
    over_chunks,
    share_of_level_mean,
)
from freesolo.solo.supervisions.base import Supervision
from freesolo.solo.targets import mask_targets
from freesolo.types import GridTargets, ImageBatch, Instances


class FreeMasks(Supervision):
    """Coarse masks are trusted for where an object is, not for its outline (FreeSOLO, arXiv:2202.12181, sec. 3.2)."""

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
        """See `free_mask_losses`."""
        return free_mask_losses(
            head,
            predictions,
            targets,
            instances,
            similarity_of(images),
            settings,
            step=step,
            slots_per_image=slots_per_image,
            sum_over_workers=sum_over_workers,
            num_workers=num_workers,
        )


def similarity_of(images: ImageBatch) -> Float[Tensor, "B K h w"]:
    """How alike neighbouring pixels' colours are, at the stride of masks.

    Of a strong view as it is: its colours are jittered and it has erased patches, the same that the network sees.
    """
    return colour_similarity(images.pixels, images.valid_pixels(), stride=MASK_STRIDE)


def free_mask_losses(
    head: Head[Any],
    predictions: Predictions,
    targets: GridTargets,
    instances: Instances,
    similarity: Float[Tensor, "B K h w"],
    settings: LossSettings,
    *,
    step: int,
    slots_per_image: Sequence[int] | None = None,
    empty_images: EmptyImages = "unknown",
    sum_over_workers: SumOverWorkers = torch.clone,
    num_workers: int = 1,
) -> dict[str, Float[Tensor, ""]]:
    """FreeSOLO's losses on coarse masks, which are trusted for where an object is, not for its outline.

    Source: FreeSOLO (arXiv:2202.12181) sec. 3.2. Each mask and embedding term is averaged over the positives of a
    level, then over the levels that have any. A positive's pairwise term is the mean over the pairs that it selects
    (BoxInst's is the mean over all positives' pairs at once, where large objects count more).

    # Deviation: by default the cells of an image without coarse masks are not trained. The paper's data has no such
    # images, ours does: there Free Mask found nothing that it would vouch for, which does not make it background.

    Args:
        head: Makes masks of `predictions`.
        predictions: Of the whole batch.
        targets: Of `assign_targets` for `instances`.
        instances: Coarse masks over the padded extent, with embeddings unless `settings.embedding` is 0.
        similarity: From `freesolo.ops.affinity.colour_similarity`, at stride 4.
        settings: Weights. A term whose weight is 0 is neither computed nor returned.
        step: Optimiser steps taken so far, for the warm-up of the pairwise term.
        slots_per_image: From `count_slots`; None: counted here, which waits for the device.
        empty_images: What images without instances are taken for.
        sum_over_workers: Adds a tensor up over the workers that train together.
        num_workers: How many those are.

    Returns:
        Weighted losses, whose sum is what to minimise: `category`, `max_projection`, `mean_projection`, `pairwise`,
        `embedding`.

    Raises:
        ValueError: If embeddings are trained and the instances' are of another length, or missing.
    """
    if settings.embedding > 0:
        _check_embeddings(instances, predictions)
    positives = Positives.of(targets, slots_per_image)
    with torch.autocast(predictions.category_logits.device.type, enabled=False):
        counts = level_counts(positives, len(head.grid_sizes), sum_over_workers)
        losses = {"category": category_loss(predictions, targets, instances, counts, empty_images, settings)}
        weights = {
            "max_projection": settings.max_projection,
            "mean_projection": settings.mean_projection,
            "pairwise": settings.pairwise * pairwise_warmup(step, settings.pairwise_warmup_steps),
        }
        names = [name for name in weights if getattr(settings, name) > 0]
        terms = _coarse_mask_terms(head, predictions, positives, instances, similarity, names, settings)
        share = share_of_level_mean(positives, counts)
        losses |= {name: weights[name] * (term * share).sum() for name, term in zip(names, terms, strict=True)}
        if settings.embedding > 0:
            predicted = predictions.embeddings[positives.image, :, positives.cell].float()
            term = embedding_loss(predicted, instances.embeddings[positives.instance].float())
            losses["embedding"] = settings.embedding * (term * share).sum()
        losses["category"] = losses["category"] + predictions.zero()
    return {name: loss * num_workers for name, loss in losses.items()}


def pairwise_warmup(step: int, warmup_steps: int) -> float:
    """The pairwise term's share of its weight: from 0 at step 0, in a line, to 1 at `warmup_steps` and after."""
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


def _coarse_mask_terms(
    head: Head[Any],
    predictions: Predictions,
    positives: Positives,
    instances: Instances,
    similarity: Float[Tensor, "B K h w"],
    names: Sequence[str],
    settings: LossSettings,
) -> Float[Tensor, "terms P"]:
    """The terms called `names`, of each positive, unweighted."""
    masks = mask_targets(instances, MASK_STRIDE)
    regions = box_regions(masks)

    def pairwise(chunk: Chunk) -> Tensor:
        pairs = pairwise_affinity_terms(
            chunk.logits,
            similarity[chunk.image][None],
            torch.zeros_like(chunk.instance),
            regions[chunk.instance],
            min_similarity=settings.pairwise_min_similarity,
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

    if not names:
        return similarity.new_zeros(0, positives.cell.shape[0])
    return over_chunks(head, predictions, positives, terms_of, terms=len(names))


def _check_embeddings(instances: Instances, predictions: Predictions) -> None:
    given, expected = instances.embeddings.shape[1], predictions.embeddings.shape[1]
    if given != expected:
        raise ValueError(
            f"the labels' embeddings have {given} channels and the head's {expected}: set model.embedding_channels="
            f"{given}, or losses.embedding=0 for labels without embeddings"
        )
