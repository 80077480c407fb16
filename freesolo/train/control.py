"""Who may follow and stop a training, beside the process that it runs for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ray.train import UserCallback

from freesolo.termination import on_termination


@dataclass(frozen=True, slots=True)
class TrainingControl:
    """By default SIGTERM stops a training, and nobody is told of its checkpoints.

    Attributes:
        callbacks: Ray Train's, called in its controller's process with what is reported at each checkpoint.
        stoppable: Given how to ask the workers to save and stop; they can be asked while its block lasts.
    """

    callbacks: tuple[UserCallback, ...] = ()
    stoppable: Callable[[Callable[[], object]], AbstractContextManager[None]] = on_termination


BY_SIGNALS = TrainingControl()
