"""The training loop: DenseCL and SOLO alike, one worker or many, from step 0 or from a checkpoint.

All randomness of a step comes from (seed, step, micro-batch, worker), and the stream's position is a function of the
step: a checkpoint needs no generator state, and a resumed run computes what an uninterrupted one would have.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from freesolo.data.order import StreamState, advance
from freesolo.errors import DivergedError, JobError, StoppedError, UsageError
from freesolo.ops.collectives import from_all_workers, rank, sum_over_workers, world_size
from freesolo.settings import LoopSettings, OptimizerSettings
from freesolo.train.learner import Learner
from freesolo.train.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: all that a checkpoint holds beside the learner's weights.

    Attributes:
        step: Optimiser steps done.
        stream: What the stream has still to give.
        bad_samples: Unusable samples met so far, all workers together.
    """

    step: int = 0
    stream: StreamState = field(default_factory=StreamState)
    bad_samples: int = 0


@runtime_checkable
class Batches(Protocol):
    """Where batches come from; `data.ingest.TrainingStream` is one."""

    @property
    def samples(self) -> int:
        """Samples in the data set."""

    def batches(self, state: StreamState, *, steps: int, worker: int, workers: int) -> Iterator[Any]:
        """One worker's batches for the next `steps` steps, each with `content` and `bad`."""


@runtime_checkable
class Recorder(Protocol):
    """Who is told. Called on every worker at the same steps; only worker 0's metrics are for keeps."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """The means over the steps since the last call."""

    def samples(self, step: int, image_ids: tuple[int, ...]) -> None:
        """Which samples a step of this worker used."""

    def look(self, step: int, batch: Any) -> None:
        """Time to look at what the model makes of photos, a batch for example."""

    def calls(self) -> bool:
        """Whether this worker has heard of something that all must decide on together."""

    def decide(self) -> Literal["go on", "save", "stop"]:
        """What all do about it, the same on each; called on all workers together when one of them `calls`."""

    def checkpoint(self, progress: Progress) -> None:
        """Time to save."""


def train(
    learner: Learner,
    stream: Batches,
    settings: LoopSettings,
    optimizer_settings: OptimizerSettings,
    recorder: Recorder,
    *,
    progress: Progress | None = None,
    max_bad_samples: float = 0.0,
) -> Progress:
    """Train until `settings.steps`.

    Args:
        learner: Model, optimiser and device; changed in place.
        stream: The batches.
        settings: How long, how often.
        optimizer_settings: The learning rate's schedule and clipping.
        recorder: Is told of metrics, looks and checkpoints.
        progress: Where to go on from; None: the start.
        max_bad_samples: Share of samples that may be unusable.

    Returns:
        The progress at the end.

    Raises:
        StoppedError: The recorder decided to stop; what was done is saved.
        DivergedError: A loss, the gradient or a weight is not finite. Raised on every worker alike.
        JobError: Too many samples are unusable, or a worker's stream ended with an error. Raised on every worker alike.
        UsageError: A worker's stream ended with one. Raised on every worker alike.
    """
    progress = progress or Progress()
    worker, workers = rank(), world_size()
    steps_left = settings.steps - progress.step
    batches = stream.batches(progress.stream, steps=steps_left, worker=worker, workers=workers)
    module = _synchronised(learner.task.module)
    tally = _Tally(settings, stream.samples, max_bad_samples, progress)

    for step in range(progress.step, settings.steps):
        rate = learning_rate(step, optimizer_settings, settings.steps)
        learner.set_learning_rate(rate)
        passes = _Passes()
        for micro_step in range(settings.accumulation_steps):
            with tally.waiting():
                batch = _next_batch(batches, learner.device)
            recorder.samples(step, batch.content.image_ids)
            generator = _generator(settings.seed, step, micro_step, worker, device=learner.device)
            inputs = learner.task.prepare(batch.content.to(learner.device), generator)
            with _no_sync_before_last(module, micro_step, settings.accumulation_steps):
                with learner.autocast():
                    losses: dict[str, Tensor] = module(inputs, step)
                torch.stack(list(losses.values())).sum().div(settings.accumulation_steps).backward()
            passes.add(losses, batch)
        gradient_norm = learner.clip_gradients(optimizer_settings.gradient_clip_norm)
        learner.step()
        learner.task.after_step(step)

        done = step + 1
        shared = passes.share(done, gradient_norm, calls=recorder.calls())
        tally.add(done, shared)
        decision = recorder.decide() if shared.called else "go on"
        last = done == settings.steps
        if done % settings.log_every == 0 or last:
            recorder.metrics(done, {**tally.means(), "learning_rate": rate, "gradient_norm": float(gradient_norm)})
        if settings.overlay_every and (done % settings.overlay_every == 0 or last):
            recorder.look(done, inputs)
        if done % settings.checkpoint_every == 0 or last or decision != "go on":
            check_weights(learner, done)
            seen = advance(progress.stream, done - progress.step, stream.samples, settings.batch_size, workers)
            recorder.checkpoint(Progress(done, seen, tally.bad_samples))
        if decision == "stop" and not last:
            raise StoppedError(f"stopped at step {done} of {settings.steps}, as asked; run the same again to go on")
    return replace(progress, step=settings.steps)


def _next_batch(batches: Iterator[Any], device: torch.device) -> Any:
    """The next batch, if every worker has one: a worker that stopped alone would leave the others waiting.

    Raises:
        UsageError, JobError: A worker's stream ended with it.
    """
    batch, error = None, None
    try:
        batch = next(batches)
    except (UsageError, JobError) as reason:
        error = reason
    failed = error is not None
    if world_size() > 1:
        failed = bool(sum_over_workers(torch.tensor(float(failed), device=device)) > 0)
    if failed:
        raise next(reason for reason in from_all_workers([error]) if reason is not None)
    return batch


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all workers know of a step.

    Attributes:
        losses: Their means over passes and workers.
        bad_samples: How many samples of the step were unusable.
        bad_here: Those of this worker, in words.
        called: Whether a worker calls for a decision.
    """

    losses: dict[str, float]
    bad_samples: int
    bad_here: list[str]
    called: bool


class _Passes:
    """The passes of one step on this worker."""

    def __init__(self) -> None:
        self._losses: list[dict[str, Tensor]] = []
        self._image_ids: list[int] = []
        self._bad: list[str] = []

    def add(self, losses: dict[str, Tensor], batch: Any) -> None:
        self._losses.append({name: loss.detach() for name, loss in losses.items()})
        self._image_ids += batch.content.image_ids
        self._bad += [f"{bad.key} ({bad.reason})" for bad in batch.bad]

    def share(self, step: int, gradient_norm: Tensor, *, calls: bool) -> _Shared:
        """Share the step among the workers, so that all stop together when one has to.

        Args:
            step: That was done.
            gradient_norm: Its gradients'.
            calls: Whether this worker calls for a decision.

        Raises:
            DivergedError: A loss or the gradient is not finite.
        """
        names = list(self._losses[0])
        sums = [torch.stack([losses[name] for losses in self._losses]).sum() / len(self._losses) for name in names]
        counted = torch.tensor([len(self._bad), calls], dtype=torch.float32, device=sums[0].device)
        shared = torch.cat([torch.stack([*sums, gradient_norm]).float(), counted])
        *means, norm, bad, called = (sum_over_workers(shared) / world_size()).tolist()
        if not np.isfinite([*means, norm]).all():
            # The losses may be finite where their gradients are not; those have been averaged, and are nobody's own.
            finite_here = bool(torch.stack(sums).isfinite().all()) and not np.isfinite(means).all()
            culprits = from_all_workers([] if finite_here else self._image_ids)
            everything = zip([*names, "gradient norm"], [*means, norm], strict=True)
            values = ", ".join(f"{name}={value:g}" for name, value in everything)
            what = "the gradient" if np.isfinite(means).all() else "a loss"
            raise DivergedError(f"step {step}: {what} is not finite ({values}); image ids of the batch: {culprits}")
        return _Shared(dict(zip(names, means, strict=True)), round(bad * world_size()), self._bad, called > 0)


class _Tally:
    """Losses and times of the steps since they were last told of, and the unusable samples of all."""

    def __init__(self, settings: LoopSettings, samples: int, max_bad_samples: float, progress: Progress) -> None:
        self._settings = settings
        self._samples = samples
        self._max_bad_samples = max_bad_samples
        self.bad_samples = progress.bad_samples
        self._bad_here: list[str] = []
        self._losses: dict[str, float] = {}
        self._steps = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Whose time is that of waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def add(self, step: int, shared: _Shared) -> None:
        """Count a step that was done.

        Raises:
            JobError: More samples are unusable than may be.
        """
        self.bad_samples += shared.bad_samples
        self._bad_here += shared.bad_here[: 5 - len(self._bad_here)]
        allowed = self._max_bad_samples * max(self._samples, step * self._settings.batch_size)
        if self.bad_samples > allowed:
            named = from_all_workers(self._bad_here)
            raise JobError(
                f"step {step}: {self.bad_samples} unusable samples, more than the {allowed:g} that "
                f"stream.max_bad_samples={self._max_bad_samples:g} allows; first: {'; '.join(map(str, named[:5]))}"
            )
        for name, mean in shared.losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + mean
        self._steps += 1

    def means(self) -> dict[str, float]:
        """Mean losses and rates since the last call."""
        elapsed = time.perf_counter() - self._since
        values = {f"loss/{name}": total / self._steps for name, total in self._losses.items()}
        values["loss"] = sum(values.values())
        values["images_per_second"] = self._steps * self._settings.batch_size / elapsed
        values["data_wait_share"] = self._waited / elapsed
        values["bad_samples"] = float(self.bad_samples)
        self._losses, self._steps, self._waited, self._since = {}, 0, 0.0, time.perf_counter()
        return values


def check_weights(learner: Learner, step: int) -> None:
    """See that what will be saved is worth going on from; the same on every worker.

    Raises:
        DivergedError: A weight is not finite; names its tensor.
    """
    names, weights = zip(*learner.task.module.named_parameters(), strict=True)
    finite = torch.stack([weight.detach().isfinite().all() for weight in weights]).tolist()
    if not all(finite):
        raise DivergedError(f"step {step}: {names[finite.index(False)]} is not finite any more; nothing was saved")


def _generator(*numbers: int, device: torch.device) -> torch.Generator:
    """A generator that is a function of some numbers and nothing else."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def _synchronised(module: nn.Module) -> nn.Module:
    if world_size() == 1:
        return module
    # Buffers are not broadcast: queues are equal by construction, and batch statistics are each worker's own.
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`broadcast_buffers` is deprecated", FutureWarning
        )  # torch < 2.13 has no other
        return DistributedDataParallel(module, broadcast_buffers=False)


def _no_sync_before_last(
    module: nn.Module, micro_step: int, micro_steps: int
) -> contextlib.AbstractContextManager[None]:
    if isinstance(module, DistributedDataParallel) and micro_step < micro_steps - 1:
        return module.no_sync()
    return contextlib.nullcontext()
