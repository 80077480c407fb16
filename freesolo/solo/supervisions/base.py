"""What a supervision is given, and what it must say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freesolo.settings import LossSettings
from freesolo.solo.heads.base import Head, Predictions
from freesolo.solo.targets import count_slots
from freesolo.types import GridTargets, ImageBatch, Instances

SumOverWorkers: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Positives:
    """The cells of a batch that have an object, in the order of images, and how many each image has.

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
    def of(cls, targets: GridTargets, per_image: Sequence[int] | None = None) -> Positives:
        """The valid slots, which come first; `per_image` is of `count_slots`, None: counted here, which waits."""
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
class LossInputs:
    """All that the losses of one step are computed from, of the whole batch.

    Attributes:
        head: Makes masks of `predictions`.
        predictions: Of any precision; losses are computed in float32.
        categories: Of every cell, C where it has no object, `(B, L)`.
        positives: The cells that have one, of `assign_targets` for `instances`.
        images: What the network saw, before it was normalised.
        instances: What `Supervision.trusted` left of the labels, over the padded extent.
        settings: Weights.
        step: Optimiser steps taken so far.
        sum_over_workers: Adds a tensor up over the workers that train together.
    """

    head: Head[Any]
    predictions: Predictions
    categories: Int64[Tensor, "B L"]
    positives: Positives
    images: ImageBatch
    instances: Instances
    settings: LossSettings
    step: int = 0
    sum_over_workers: SumOverWorkers = torch.clone


class Supervision(ABC):
    """What labels are trusted for, and the losses that follow from it. It keeps nothing.

    Attributes:
        boxes_alone: Whether masks are filled boxes from where rows are made on, so that nothing can learn from them.
    """

    boxes_alone: ClassVar[bool] = False

    def trusted(self, instances: Instances) -> Instances:
        """What targets and losses may know of the labels: by default all of it."""
        return instances

    @abstractmethod
    def losses(self, inputs: LossInputs) -> dict[str, Float[Tensor, ""]]:
        """The weighted losses of a batch, whose sum is what to minimise: of this worker's images, over all workers'.

        The workers' losses add up to those of one worker with all images: means are over all workers' positives.
        """
