"""What a supervision must say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from freesolo.settings import LossSettings
from freesolo.solo.heads.base import Head, Predictions
from freesolo.solo.positives import SumOverWorkers
from freesolo.types import GridTargets, ImageBatch, Instances


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
        """The weighted losses of a batch, whose sum is what to minimise.

        They are multiplied by the number of workers, because distributed training averages the workers' gradients: two
        workers give the gradients of one with both's images. Computed in float32, whatever the predictions are.

        Args:
            head: Makes masks of `predictions`.
            predictions: Of the whole batch.
            targets: Of `assign_targets` for `instances`.
            images: What the network saw, before it was normalised.
            instances: What `trusted` left of the labels, over the padded extent.
            settings: Weights.
            step: Optimiser steps taken so far.
            slots_per_image: From `count_slots`.
            sum_over_workers: Adds a tensor up over the workers that train together.
            num_workers: How many those are.
        """
