"""The training loop on a GPU: nothing in a step waits for the device, bfloat16 learns, resumed equals uninterrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from freesolo.data.augment import contrastive_view
from freesolo.data.order import StreamState
from freesolo.densecl.model import DenseCL
from freesolo.settings import (
    DenseCLModelSettings,
    LoopSettings,
    LossSettings,
    OptimizerSettings,
    SegmentationViewSettings,
    SupervisionKind,
    ViewSettings,
)
from freesolo.solo.task import SoloTask
from freesolo.train.learner import Learner, Task
from freesolo.train.loop import Progress, train
from freesolo.train.tasks import DenseCLTraining, SoloTraining
from freesolo.types import CropPair, ViewPair
from tests.benchmarks.synthetic import photo, segmentation_batch
from tests.small import small_solo

pytestmark = pytest.mark.gpu

SOLO = small_solo(embedding_channels=8)
DENSECL = DenseCLModelSettings(backbone="resnet18", hidden_channels=32, projection_channels=16, queue_length=64)
VIEWS = ViewSettings(size=64)
OPTIMIZER = OptimizerSettings(learning_rate=0.01, warmup_steps=2, gradient_clip_norm=35.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def solo(supervision: SupervisionKind = "free_masks", *, strong: bool = True) -> SoloTraining:
    task = SoloTask(SOLO, supervision, LossSettings(pairwise_warmup_steps=2)).initialise(generator())
    return SoloTraining(task, SegmentationViewSettings(strong=strong))


def densecl() -> DenseCLTraining:
    return DenseCLTraining(DenseCL(DENSECL).initialise(generator()), VIEWS)


def solo_batch(seed: int = 0) -> Any:
    return segmentation_batch(
        4, 3, (64, 90), generator(seed), padded_width=96, smallest=8, largest=50, embedding_channels=8
    )


def crops(seed: int = 0) -> CropPair:
    query, key = (torch.stack([photo(64, 64, generator(100 * seed + n)) for n in range(8)]) for _ in range(2))
    return CropPair(query, key, tuple(range(8 * seed, 8 * seed + 8)))


@contextmanager
def no_waiting() -> Iterator[None]:
    """A call that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed(gpu: torch.device) -> None:
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=gpu).item()


def one_step(learner: Learner, inputs: Any, step: int) -> dict[str, Tensor]:
    with learner.autocast():
        losses: dict[str, Tensor] = learner.task.module(inputs, step)
    torch.stack(list(losses.values())).sum().backward()
    learner.clip_gradients(OPTIMIZER.gradient_clip_norm)
    learner.step()
    learner.task.after_step(step)
    return losses


@pytest.mark.parametrize("supervision", ["masks", "free_masks"])
def test_nothing_in_a_step_of_solo_waits(gpu: torch.device, supervision: SupervisionKind) -> None:
    learner = Learner(solo(supervision), LoopSettings(steps=1, batch_size=4), OPTIMIZER, gpu)
    inputs = (solo_batch().to(gpu),)
    one_step(learner, inputs, 0)  # the optimiser makes its state
    with no_waiting():
        losses = one_step(learner, inputs, 1)
    assert all(loss.isfinite() for loss in losses.values())


def test_nothing_in_a_step_of_densecl_waits(gpu: torch.device) -> None:
    learner = Learner(densecl(), LoopSettings(steps=1, batch_size=8), OPTIMIZER, gpu)
    batch = crops().to(gpu)
    one_step(learner, learner.task.prepare(batch, torch.Generator(gpu).manual_seed(0)), 0)
    with no_waiting():
        views = learner.task.prepare(batch, torch.Generator(gpu).manual_seed(1))
        losses = one_step(learner, views, 1)
    assert all(loss.isfinite() for loss in losses.values())


def test_the_same_random_numbers_make_the_same_views(gpu: torch.device) -> None:
    batch = crops().to(gpu)
    first, second, other = (
        contrastive_view(batch.query, VIEWS, torch.Generator(gpu).manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@dataclass(frozen=True)
class Batch:
    content: Any
    bad: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Repeated:
    """The same few batches over and over, on the host."""

    make: Callable[[int], Any]
    batch_size: int
    different: int = 3

    @property
    def samples(self) -> int:
        return self.different * self.batch_size

    def batches(self, state: StreamState, *, steps: int, worker: int, workers: int) -> Iterator[Any]:
        unseen = sum(len(span) for span in state.unseen)
        done = (state.next_epoch * self.samples - unseen) // self.batch_size
        for step in range(done, done + steps):
            yield Batch(self.make(step % self.different))


@dataclass
class Kept:
    """Keeps what it is told, and the whole state at one step."""

    learner: Learner
    keep_at: int | None = None
    metrics_of: dict[int, dict[str, float]] = field(default_factory=dict)
    kept: tuple[Progress, dict[str, Any]] | None = None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.metrics_of[step] = values

    def samples(self, step: int, image_ids: tuple[int, ...]) -> None:
        return

    def look(self, step: int, batch: Any) -> None:
        return

    def calls(self) -> bool:
        return False

    def decide(self) -> Literal["go on", "save", "stop"]:
        return "go on"

    def checkpoint(self, progress: Progress) -> None:
        if progress.step == self.keep_at:
            state = self.learner.state_dict()
            self.kept = (progress, {name: _copy(value) for name, value in state.items()})


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: _copy(one) for name, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list) else value


TRAININGS: dict[str, tuple[Callable[[], Task], Callable[[int], Any], int]] = {
    "SOLO": (solo, solo_batch, 4),
    "DenseCL": (densecl, crops, 8),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_resumed_goes_on_as_uninterrupted(gpu: torch.device, name: str) -> None:
    """To rounding: sums on a GPU are added in any order."""
    make, batches, size = TRAININGS[name]
    loop = LoopSettings(steps=6, batch_size=size, log_every=1, checkpoint_every=1, precision="float32")
    whole = Learner(make(), loop, OPTIMIZER, gpu)
    kept = Kept(whole, keep_at=3)
    train(whole, Repeated(batches, size), loop, OPTIMIZER, kept)
    assert kept.kept is not None
    progress, state = kept.kept
    resumed = Learner(make(), loop, OPTIMIZER, gpu)
    resumed.load_state_dict(state)
    again = Kept(resumed)
    train(resumed, Repeated(batches, size), loop, OPTIMIZER, again, progress=progress)
    assert list(again.metrics_of) == [4, 5, 6]
    for step in again.metrics_of:
        for key, value in kept.metrics_of[step].items():
            if key.startswith("loss"):
                assert again.metrics_of[step][key] == pytest.approx(value, rel=2e-2, abs=1e-4), (step, key)


@pytest.mark.parametrize("supervision", ["masks", "free_masks"])
def test_bfloat16_overfits_as_float32_does(gpu: torch.device, supervision: SupervisionKind) -> None:
    losses = {}
    optimizer = OptimizerSettings(method="adamw", learning_rate=1e-3)
    for precision in ("float32", "bfloat16"):
        loop = LoopSettings(steps=60, batch_size=4, log_every=10, checkpoint_every=100, precision=precision)
        learner = Learner(solo(supervision, strong=False), loop, optimizer, gpu)
        kept = Kept(learner)
        train(learner, Repeated(solo_batch, 4, different=1), loop, optimizer, kept)
        losses[precision] = [kept.metrics_of[step]["loss"] for step in (10, 60)]
    for first, last in losses.values():
        assert last < first
    assert losses["bfloat16"][1] == pytest.approx(losses["float32"][1], rel=0.15)


def test_views_of_a_batch_are_a_pair(gpu: torch.device) -> None:
    pair = densecl().prepare(crops().to(gpu), torch.Generator(gpu).manual_seed(0))
    assert isinstance(pair, ViewPair)
    assert pair.query.device.type == pair.key.device.type == "cuda"
    assert not torch.equal(pair.query, pair.key)
