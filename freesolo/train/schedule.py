"""The learning rate as a function of the step, and what follows from it."""

from __future__ import annotations

import math

from freesolo.settings import OptimizerSettings


def learning_rate(step: int, settings: OptimizerSettings, steps: int) -> float:
    """The learning rate of a step.

    Linear warm-up from `warmup_factor` of the scheduled rate, then the schedule: `constant`, `step` (times 0.1 at each
    milestone) or `cosine` (to 0 at the end, SGDR, arXiv:1608.03983, without restarts).

    Args:
        step: From 0.
        settings: Of the optimiser.
        steps: In the whole training.
    """
    rate = settings.learning_rate
    if settings.schedule == "step":
        rate *= 0.1 ** sum(step >= milestone for milestone in settings.milestones)
    elif settings.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
    if step < settings.warmup_steps:
        progress = step / settings.warmup_steps
        rate *= settings.warmup_factor * (1 - progress) + progress
    return rate
