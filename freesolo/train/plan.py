"""What a training is made of: the driver sends a plan to the workers, and each of them builds its training by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freesolo.config import Job
from freesolo.data.files import join
from freesolo.data.ingest import TrainingStream
from freesolo.settings import LoopSettings, OptimizerSettings
from freesolo.stages import StageFolder
from freesolo.tracking.witness import TrackedRun
from freesolo.train.learner import Learner


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of a training at a step, beside its losses.

    Attributes:
        metrics: For the journal.
        pictures: RGB by name; the names are the same at each look.
    """

    metrics: Mapping[str, float]
    pictures: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Training:
    """What a worker trains, built in its own process.

    Attributes:
        learner: Model, optimiser, device.
        stream: Its batches.
        optimizer: The schedule.
        save_model: Writes the trained model as a model file.
        look: What is to be seen now, a batch's inputs at hand; on worker 0 alone, which the others wait for. None:
            nothing.
    """

    learner: Learner
    stream: TrainingStream[Any, Any]
    optimizer: OptimizerSettings
    save_model: Callable[[Learner, Path], None]
    look: Callable[[Learner, Any], Look] | None = None


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What the driver sends to the workers.

    Attributes:
        folder: Of the stage; gets `checkpoints/`, `best/`, `metrics.jsonl` and `model.pt`.
        job: The resolved configuration.
        loop: The part of it that says how long and how often.
        tracked: The MLflow run.
        build: Makes the training on a device, in the worker.
    """

    folder: StageFolder
    job: Job
    loop: LoopSettings
    tracked: TrackedRun
    build: Callable[[torch.device], Training]

    @property
    def model_url(self) -> str:
        """Where the trained model goes."""
        return join(self.folder.url, "model.pt")
