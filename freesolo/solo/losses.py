"""What SOLO is trained by: focal and Dice on trusted masks (2003.10152), FreeSOLO's terms on coarse ones (2202.12181).

The parts are pure functions of one mask, cell or embedding each; `free_mask_losses` and `mask_losses` put them together
over a batch and are all that training calls. Everything is computed in float32, whatever the predictions are.

Means are over all workers' positives, by counts that `sum_over_workers` adds up, and multiplied by the number of
workers, because distributed training averages the workers' gradients: two workers give the gradients of one with both's
images. A batch without positives has losses of 0 that depend on every prediction, with gradients of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from freesolo.ops.affinity import pairwise_affinity_terms
from freesolo.ops.masks import boxes_xyxy
from freesolo.settings import LossSettings
from freesolo.solo.heads.base import MASK_STRIDE, Head, Predictions
from freesolo.solo.targets import count_slots, mask_targets
from freesolo.types import GridTargets, Instances

SumOverWorkers: TypeAlias = Callable[[Tensor], Tensor]

EmptyImages: TypeAlias = Literal["unknown", "background"]
"""What an image without instances says of its cells: nothing, or that there is nothing."""

SLOTS_AT_ONCE = 128
"""Masks whose losses are computed together. It bounds memory; results do not depend on it."""

_SMALLEST_DENOMINATOR = 1e-12


def sigmoid_focal_loss(
    logits: Float[Tensor, "B C L"], categories: Int64[Tensor, "B L"], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "B L"]:
    """`-alpha_t (1 - p_t)^gamma log(p_t)` of each cell, summed over the categories.

    Source: Focal loss (arXiv:1708.02002) eq. 5, one sigmoid per category.

    Args:
        logits: Before the sigmoid.
        categories: Category of each cell, C where it is background.
        alpha: Weight of the cell's own category; that of the others is `1 - alpha`.
        gamma: How little cells count that are right already.
    """
    indices = torch.arange(logits.shape[1], device=logits.device)
    own = categories[:, None, :] == indices[None, :, None]
    towards = torch.where(own, logits, -logits).float()  # p_t = sigmoid(towards)
    # 1 - p_t as exp(log), whose slope is finite for every gamma.
    modulation = torch.exp(gamma * functional.logsigmoid(-towards))
    balance = torch.where(own, alpha, 1.0 - alpha)
    return (-balance * modulation * functional.logsigmoid(towards)).sum(dim=1)


def dice_loss(probabilities: Float[Tensor, "N ..."], targets: Float[Tensor, "N ..."]) -> Float[Tensor, " N"]:
    """`1 - 2 sum(p q) / (sum p^2 + sum q^2)` of each row (SOLO, arXiv:1912.04488, eq. 3). Both empty: 1."""
    p, q = probabilities.flatten(1), targets.flatten(1)
    denominator = p.square().sum(dim=1) + q.square().sum(dim=1)
    return 1.0 - 2.0 * (p * q).sum(dim=1) / denominator.clamp(min=_SMALLEST_DENOMINATOR)


def max_projection_loss(probabilities: Float[Tensor, "N h w"], coarse: Float[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """Dice between the maxima of each column of both, plus that of the maxima of each row: where the object is.

    Source: `L_max` of FreeSOLO (arXiv:2202.12181) sec. 3.2, the projection term of BoxInst (arXiv:2012.02310).
    """
    along_x = dice_loss(probabilities.amax(dim=1), coarse.amax(dim=1))
    along_y = dice_loss(probabilities.amax(dim=2), coarse.amax(dim=2))
    return along_x + along_y


def mean_projection_loss(probabilities: Float[Tensor, "N h w"], coarse: Float[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """Dice between the means of each column of both, plus that of the means of each row.

    A hole or a stray pixel of the coarse mask moves its means little, where it may move a maximum from 0 to 1.
    Source: `L_avg` of FreeSOLO (arXiv:2202.12181) sec. 3.2.
    """
    along_x = dice_loss(probabilities.mean(dim=1), coarse.mean(dim=1))
    along_y = dice_loss(probabilities.mean(dim=2), coarse.mean(dim=2))
    return along_x + along_y


def embedding_loss(predicted: Float[Tensor, "P E"], targets: Float[Tensor, "P E"]) -> Float[Tensor, " P"]:
    """Negative cosine similarity, in [-1, 1] (FreeSOLO, arXiv:2202.12181, sec. 3.2); 0 for a vector of zeros."""
    return -functional.cosine_similarity(predicted, targets, dim=1)


def box_regions(masks: Bool[Tensor, "N h w"]) -> Bool[Tensor, "N h w"]:
    """True inside each mask's box; nowhere for an empty mask."""
    left, top, right, bottom = boxes_xyxy(masks)[:, :, None].unbind(dim=1)
    rows = torch.arange(masks.shape[1], device=masks.device)
    columns = torch.arange(masks.shape[2], device=masks.device)
    inside_rows = (top <= rows) & (rows < bottom)
    inside_columns = (left <= columns) & (columns < right)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def pairwise_warmup(step: int, warmup_steps: int) -> float:
    """The pairwise term's share of its weight: from 0 at step 0, in a line, to 1 at `warmup_steps` and after."""
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


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
    slots = _Slots.of(targets, slots_per_image)
    with torch.autocast(predictions.category_logits.device.type, enabled=False):
        counts = _level_counts(slots, len(head.grid_sizes), sum_over_workers)
        losses = {"category": _category_loss(predictions, targets, instances, counts, empty_images, settings)}
        weights = {
            "max_projection": settings.max_projection,
            "mean_projection": settings.mean_projection,
            "pairwise": settings.pairwise * pairwise_warmup(step, settings.pairwise_warmup_steps),
        }
        names = [name for name in weights if getattr(settings, name) > 0]
        terms = _coarse_mask_terms(head, predictions, slots, instances, similarity, names, settings)
        share = _share_of_level_mean(slots, counts)
        losses |= {name: weights[name] * (term * share).sum() for name, term in zip(names, terms, strict=True)}
        if settings.embedding > 0:
            predicted = predictions.embeddings[slots.image, :, slots.cell].float()
            term = embedding_loss(predicted, instances.embeddings[slots.instance].float())
            losses["embedding"] = settings.embedding * (term * share).sum()
        losses["category"] = losses["category"] + predictions.zero()
    return {name: loss * num_workers for name, loss in losses.items()}


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
    slots = _Slots.of(targets, slots_per_image)
    with torch.autocast(predictions.category_logits.device.type, enabled=False):
        counts = _level_counts(slots, len(head.grid_sizes), sum_over_workers)
        masks = mask_targets(instances, MASK_STRIDE)

        def terms_of(chunk: _Chunk) -> Float[Tensor, "1 P"]:
            return dice_loss(chunk.logits.sigmoid(), masks[chunk.instance].float())[None]

        dice = _over_chunks(head, predictions, slots, terms_of, terms=1)[0]
        losses = {
            "category": _category_loss(predictions, targets, instances, counts, empty_images, settings)
            + predictions.zero(),
            "dice": settings.dice * dice.sum() / counts.sum().clamp(min=1.0),
        }
    return {name: loss * num_workers for name, loss in losses.items()}


@dataclass(frozen=True, slots=True)
class _Slots:
    """The positives of a batch alone, in the order of images, and how many each image has.

    Attributes:
        instance: Row of `Instances`, `(P,)`.
        image: Image of the batch, `(P,)`.
        level: Pyramid level, `(P,)`.
        cell: Index among all levels' cells, `(P,)`.
        per_image: Of each image of the batch.
    """

    instance: Int64[Tensor, " P"]
    image: Int64[Tensor, " P"]
    level: Int64[Tensor, " P"]
    cell: Int64[Tensor, " P"]
    per_image: tuple[int, ...]

    @classmethod
    def of(cls, targets: GridTargets, per_image: Sequence[int] | None) -> _Slots:
        """The valid slots, which come first."""
        per_image = count_slots(targets).wait() if per_image is None else tuple(per_image)
        total = sum(per_image)
        return cls(
            instance=targets.instance[:total],
            image=targets.image[:total],
            level=targets.level[:total],
            cell=targets.cell[:total],
            per_image=per_image,
        )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some positives of one image and their masks.

    Attributes:
        image: Of the batch.
        instance: Row of `Instances`, `(P,)`.
        logits: Masks before the sigmoid, float32, `(P, h, w)`.
    """

    image: int
    instance: Int64[Tensor, " P"]
    logits: Float[Tensor, "P h w"]


def _over_chunks(
    head: Head[Any],
    predictions: Predictions,
    slots: _Slots,
    terms_of: Callable[[_Chunk], Tensor],
    *,
    terms: int,
) -> Float[Tensor, "terms P"]:
    """The terms of all positives, a chunk of one image's at a time.

    Masks and what is derived from them are computed again for the backward pass instead of kept: kept, they would be
    tens of maps at stride 4 for each positive, more than the network's own activations.
    """

    def of_chunk(one: Predictions, image: int, cell: Tensor, instance: Tensor) -> Tensor:
        logits = head.mask_logits(one, cell)
        return terms_of(_Chunk(image, instance, logits.float()))

    parts = [predictions.category_logits.new_zeros(terms, 0, dtype=torch.float32)]
    start = 0
    for image, (one, count) in enumerate(zip(predictions.each_image(), slots.per_image, strict=True)):
        end = start + count
        for first in range(start, end, SLOTS_AT_ONCE):
            chunk = slice(first, min(first + SLOTS_AT_ONCE, end))
            part: Tensor = checkpoint(
                of_chunk,
                one,
                image,
                slots.cell[chunk],
                slots.instance[chunk],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            parts.append(part)
        start = end
    return torch.cat(parts, dim=1)


def _coarse_mask_terms(
    head: Head[Any],
    predictions: Predictions,
    slots: _Slots,
    instances: Instances,
    similarity: Float[Tensor, "B K h w"],
    names: Sequence[str],
    settings: LossSettings,
) -> Float[Tensor, "terms P"]:
    """The terms called `names`, of each positive, unweighted."""
    masks = mask_targets(instances, MASK_STRIDE)
    regions = box_regions(masks)

    def pairwise(chunk: _Chunk) -> Tensor:
        pairs = pairwise_affinity_terms(
            chunk.logits,
            similarity[chunk.image][None],
            torch.zeros_like(chunk.instance),
            regions[chunk.instance],
            min_similarity=settings.pairwise_min_similarity,
        )
        return pairs.loss_sum / pairs.pair_count.clamp(min=1.0)

    def terms_of(chunk: _Chunk) -> Tensor:
        probabilities, coarse = chunk.logits.sigmoid(), masks[chunk.instance].float()
        functions = {
            "max_projection": lambda: max_projection_loss(probabilities, coarse),
            "mean_projection": lambda: mean_projection_loss(probabilities, coarse),
            "pairwise": lambda: pairwise(chunk),
        }
        return torch.stack([functions[name]() for name in names])

    if not names:
        return similarity.new_zeros(0, slots.cell.shape[0])
    return _over_chunks(head, predictions, slots, terms_of, terms=len(names))


def _level_counts(slots: _Slots, num_levels: int, sum_over_workers: SumOverWorkers) -> Float[Tensor, " levels"]:
    """All workers' positives on each level."""
    levels = torch.arange(num_levels, device=slots.level.device)
    return sum_over_workers((slots.level == levels[:, None]).sum(dim=1).float())


def _share_of_level_mean(slots: _Slots, counts: Float[Tensor, " levels"]) -> Float[Tensor, " P"]:
    """What each positive's term is multiplied by, so that the sum is the mean of the levels' means."""
    levels_with_any = (counts > 0).sum()
    return 1.0 / (counts[slots.level] * levels_with_any)


def _category_loss(
    predictions: Predictions,
    targets: GridTargets,
    instances: Instances,
    counts: Float[Tensor, " levels"],
    empty_images: EmptyImages,
    settings: LossSettings,
) -> Float[Tensor, ""]:
    cells = sigmoid_focal_loss(
        predictions.category_logits, targets.categories, alpha=settings.focal_alpha, gamma=settings.focal_gamma
    )
    if empty_images == "unknown":
        images = torch.arange(len(predictions), device=cells.device)
        occupied = instances.masks.flatten(1).any(dim=1)
        has_instances = ((instances.image_index == images[:, None]) & occupied).any(dim=1)
        cells = torch.where(has_instances[:, None], cells, 0.0)
    return settings.category * cells.sum() / (counts.sum() + 1.0)


def _check_embeddings(instances: Instances, predictions: Predictions) -> None:
    given, expected = instances.embeddings.shape[1], predictions.embeddings.shape[1]
    if given != expected:
        raise ValueError(
            f"the labels' embeddings have {given} channels and the head's {expected}: set model.embedding_channels="
            f"{given}, or losses.embedding=0 for labels without embeddings"
        )
