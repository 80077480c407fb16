"""What learns: a task's module, its optimiser and, if wanted, a running average of its weights."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from freesolo.settings import LoopSettings, OptimizerSettings


@runtime_checkable
class Task(Protocol):
    """What is trained. DenseCL and SOLO each are one (`train.tasks`)."""

    @property
    def module(self) -> nn.Module:
        """Called with (inputs, step), gives named losses whose sum is minimised."""

    def prepare(self, batch: Any, generator: torch.Generator) -> Any:
        """The module's inputs from a batch on the training device: augmentation in batches."""

    def after_step(self, step: int) -> None:
        """What follows an optimiser step, such as a momentum update."""


class Learner:
    """A task with its optimiser on a device.

    Args:
        task: What is trained; its module is moved to the device.
        settings: Precision and averaging.
        optimizer_settings: The optimiser and its constants.
        device: Where to train.
    """

    def __init__(
        self, task: Task, settings: LoopSettings, optimizer_settings: OptimizerSettings, device: torch.device
    ) -> None:
        self.task = task
        self.device = device
        task.module.to(device)
        # As convolutions compute: a step of DenseCL takes 0.58 of the time on an H200, and 0.78 on a CPU.
        task.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parameters = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self._parameters, optimizer_settings)
        self._bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")
        self.average: AveragedModel | None = None
        if settings.ema_decay is not None:
            self.average = AveragedModel(
                task.module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True
            )

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context of forward passes: bfloat16 where it is on."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bfloat16)

    def set_learning_rate(self, rate: float) -> None:
        """Of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale gradients down to `max_norm` where one is given; returns their norm before."""
        return nn.utils.clip_grad_norm_(self._parameters, max_norm if max_norm is not None else float("inf"))

    def step(self) -> None:
        """Apply the gradients and drop them."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.task.module)

    def best_module(self) -> nn.Module:
        """The weights to use: the running average where there is one, else the trained module."""
        return self.average.module if self.average is not None else self.task.module

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "module": self.task.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result."""
        self.task.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _optimizer(parameters: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.method == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=(settings.momentum, 0.999), weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
