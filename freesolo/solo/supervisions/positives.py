"""Means over the cells that have an object: what all supervisions count and compute alike.

Means are over all workers' positives, by counts that `sum_over_workers` adds up. A batch without positives has losses
of 0 that depend on every prediction, with gradients of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freesolo.ops.masks import areas
from freesolo.solo.losses import sigmoid_focal_loss
from freesolo.solo.supervisions.base import LossInputs, Positives

EmptyImages: TypeAlias = Literal["unknown", "background"]
"""What an image without instances says of its cells: nothing, or that there is nothing."""

SLOTS_AT_ONCE = 256
"""Masks whose losses are computed together. It bounds what is held for a moment; results do not depend on it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some positives of a batch and their masks.

    Attributes:
        image: Of the batch, `(P,)`.
        instance: Row of `Instances`, `(P,)`.
        logits: Masks before the sigmoid, float32, `(P, h, w)`.
    """

    image: Int64[Tensor, " P"]
    instance: Int64[Tensor, " P"]
    logits: Float[Tensor, "P h w"]


def over_chunks(
    inputs: LossInputs, terms_of: Callable[[Chunk], Float[Tensor, "terms P"]], *, terms: int
) -> Float[Tensor, "terms P"]:
    """The terms of all positives, a chunk at a time.

    What is kept of a chunk for the backward pass is what `terms_of` keeps: two or three maps of each positive, where
    its functions have their gradients written out.
    """
    positives, images = inputs.positives, inputs.predictions.each_image()
    # On a GPU it is the number of calls that costs; a CPU would copy the masks of several images together.
    join = positives.image.device.type != "cpu"
    parts = [inputs.predictions.category_logits.new_zeros(terms, 0, dtype=torch.float32)]
    for pieces in _chunks(positives.per_image, join=join):
        chunk = slice(pieces[0][1].start, pieces[-1][1].stop)
        masks = [inputs.head.mask_logits(images[image], positives.cell[piece]) for image, piece in pieces]
        logits = masks[0] if len(masks) == 1 else torch.cat(masks)
        parts.append(terms_of(Chunk(positives.image[chunk], positives.instance[chunk], logits.float())))
    return torch.cat(parts, dim=1)


def _chunks(per_image: Sequence[int], *, join: bool) -> list[list[tuple[int, slice]]]:
    """Each chunk's images and which positives are theirs: one image, or a part of one, or joined, several with few."""
    chunks: list[list[tuple[int, slice]]] = []
    first, room = 0, 0
    for image, count in enumerate(per_image):
        for start in range(first, first + count, SLOTS_AT_ONCE):
            piece = slice(start, min(start + SLOTS_AT_ONCE, first + count))
            if not join or piece.stop - piece.start > room:
                chunks.append([])
                room = SLOTS_AT_ONCE
            chunks[-1].append((image, piece))
            room -= piece.stop - piece.start
        first += count
    return chunks


def level_counts(inputs: LossInputs) -> Float[Tensor, " levels"]:
    """All workers' positives on each level."""
    levels = torch.arange(len(inputs.head.grid_sizes), device=inputs.positives.level.device)
    return inputs.sum_over_workers((inputs.positives.level == levels[:, None]).sum(dim=1).float())


def share_of_level_mean(positives: Positives, counts: Float[Tensor, " levels"]) -> Float[Tensor, " P"]:
    """What each positive's term is multiplied by, so that the sum is the mean of the levels' means."""
    levels_with_any = (counts > 0).sum()
    return 1.0 / (counts[positives.level] * levels_with_any)


def category_loss(
    inputs: LossInputs, counts: Float[Tensor, " levels"], *, empty_images: EmptyImages
) -> Float[Tensor, ""]:
    """Focal loss over all cells of all images, over the number of positives and one; it depends on every prediction.

    Args:
        inputs: Its `instances` say which images have any.
        counts: Of `level_counts`.
        empty_images: What images without instances are taken for.
    """
    settings, predictions, instances = inputs.settings, inputs.predictions, inputs.instances
    cells = sigmoid_focal_loss(
        predictions.category_logits, inputs.categories, alpha=settings.focal_alpha, gamma=settings.focal_gamma
    )
    if empty_images == "unknown":
        images = torch.arange(len(predictions), device=cells.device)
        occupied = areas(instances.masks) > 0
        has_instances = ((instances.image_index == images[:, None]) & occupied).any(dim=1)
        cells = torch.where(has_instances[:, None], cells, 0.0)
    return settings.category * cells.sum() / (counts.sum() + 1.0) + predictions.zero()
