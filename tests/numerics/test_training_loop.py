"""The loop: resumed equals uninterrupted bit for bit, with one worker and with two; bad numbers stop it, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from freesolo.config import PackJob
from freesolo.data.order import Order, StreamState, worker_spans
from freesolo.data.probe_photos import PicturedPhoto, ProbePhotos
from freesolo.densecl.model import DenseCL
from freesolo.errors import JobError, StoppedError, UsageError
from freesolo.ops.collectives import rank
from freesolo.settings import DenseCLModelSettings, LoopSettings, LossSettings, OptimizerSettings, ViewSettings
from freesolo.solo.task import SoloTask, concatenate
from freesolo.train.checkpoint import DamagedCheckpointError, load_checkpoint, save_checkpoint, take_snapshot
from freesolo.train.learner import Learner
from freesolo.train.loop import Progress, train
from freesolo.train.plan import Look
from freesolo.train.probe import Probe
from freesolo.train.tasks import DenseCLTraining
from freesolo.types import CropPair, ImageBatch, Instances, SegmentationBatch
from tests.small import small_solo
from tests.workers import on_workers

SIZE = 64
SAMPLES = 10
MODEL = small_solo(
    embedding_channels=8,
    grid_sizes=(8, 6, 4, 3, 2),
    scale_ranges=((1, 24), (12, 48), (24, 96), (48, 192), (96, 512)),
)
OPTIMIZER = OptimizerSettings(learning_rate=0.02, schedule="cosine", warmup_steps=2, gradient_clip_norm=5.0)
JOB = PackJob(photos="p", dataset="d")


def settings(steps: int = 6, **others: Any) -> LoopSettings:
    return LoopSettings(**{"steps": steps, "batch_size": 4, "log_every": 1, "checkpoint_every": 1} | others)


def sample(number: int) -> SegmentationBatch:
    """A photo of noise with one rectangle in it, another one for each number."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (1, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    top, left = 3 * number % 30, 5 * number % 30
    masks[0, top : top + 20, left : left + 24] = True
    instances = Instances(
        image_index=torch.zeros(1, dtype=torch.int64),
        masks=masks,
        category_ids=torch.zeros(1, dtype=torch.int64),
        scores=torch.ones(1),
        embeddings=torch.nn.functional.normalize(torch.randn(1, 8, generator=generator), dim=1),
    )
    return SegmentationBatch(ImageBatch(pixels, torch.tensor([[SIZE, SIZE]]), (number,)), instances)


def segmentation_batch(numbers: list[int]) -> SegmentationBatch:
    return concatenate([sample(number) for number in numbers])


@dataclass(frozen=True)
class Drawn:
    """A stream over drawn photos, in the order that `data.order` gives, without Ray."""

    content: Callable[[list[int]], Any] = field(default=segmentation_batch, kw_only=True)
    accumulation_steps: int = 1
    bad_at_step: int | None = None
    ends: tuple[int, int] | None = None  # on this worker before this batch

    @property
    def samples(self) -> int:
        return SAMPLES

    def batches(self, state: StreamState, *, steps: int, worker: int, workers: int) -> Iterator[Any]:
        order = Order((4, 6), seed=0)
        spans = worker_spans(state, order.samples, steps=steps, batch_size=4, worker=worker, workers=workers)
        numbers = [n for piece in order.pieces(spans) for n in self._numbers(order, piece)]
        count = 4 // workers // self.accumulation_steps
        for start in range(0, len(numbers), count):
            if self.ends == (worker, start // count):
                raise UsageError("shard-000001.tar: access denied")
            bad = (_Bad(),) if start == self.bad_at_step else ()
            yield _Batch(self.content(numbers[start : start + count]), bad)

    def _numbers(self, order: Order, piece: Any) -> list[int]:
        members = [n for shard in piece.window.shards for n in (range(4) if shard == 0 else range(4, 10))]
        return [members[place] for place in piece.window.permutation()[piece.start : piece.stop]]


@dataclass(frozen=True)
class _Bad:
    key: str = "000007"
    reason: str = "truncated"


@dataclass(frozen=True)
class _Batch:
    content: Any
    bad: tuple[_Bad, ...] = ()


@dataclass(frozen=True)
class WeakView:
    """SOLO on the batch as it is."""

    module: nn.Module

    def prepare(self, batch: SegmentationBatch, generator: torch.Generator) -> tuple[SegmentationBatch, ...]:
        noise = torch.rand(batch.images.pixels.shape, generator=generator)  # so that a step's randomness matters
        images = ImageBatch(batch.images.pixels.float() * 0.9 + 20 * noise, batch.images.sizes, batch.images.image_ids)
        return (SegmentationBatch(images, batch.instances),)

    def after_step(self, step: int) -> None:
        return


@dataclass
class Kept:
    """Keeps all that it is told; saves a checkpoint into `folder` where there is one.

    Worker `caller` calls all to decide after step `decides[0]`, and they decide `decides[1]`.
    """

    learner: Learner
    folder: Path | None = None
    metrics_of: dict[int, dict[str, float]] = field(default_factory=dict)
    ids_of: dict[int, list[int]] = field(default_factory=dict)
    stop_after: int | None = None
    decides: tuple[int, Literal["go on", "save", "stop"]] | None = None
    caller: int = 0
    saved: list[int] = field(default_factory=list)
    _steps_asked: int = 0

    def calls(self) -> bool:
        self._steps_asked += 1
        return self.decides is not None and self._steps_asked == self.decides[0] and rank() == self.caller

    def decide(self) -> Literal["go on", "save", "stop"]:
        assert self.decides is not None
        return self.decides[1]

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.metrics_of[step] = values

    def samples(self, step: int, image_ids: tuple[int, ...]) -> None:
        self.ids_of.setdefault(step, []).extend(image_ids)

    def look(self, step: int, inputs: Any) -> None:
        return

    def checkpoint(self, progress: Progress) -> None:
        self.saved.append(progress.step)
        if self.folder is not None and rank() == 0:
            target = self.folder / str(progress.step)
            target.mkdir(parents=True, exist_ok=True)
            save_checkpoint(target, take_snapshot(self.learner, progress), JOB, "commit")
        if progress.step == self.stop_after:
            raise KeyboardInterrupt


def learner_for(loop: LoopSettings, *, optimizer: OptimizerSettings = OPTIMIZER, seed: int = 0) -> Learner:
    task = SoloTask(MODEL, "free_masks", LossSettings(pairwise_warmup_steps=2))
    task.initialise(torch.Generator().manual_seed(seed))
    return Learner(WeakView(task), loop, optimizer, torch.device("cpu"))


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.task.module.state_dict().items()}


def run_whole_and_resumed(
    folder: Path, loop: LoopSettings, stop: int, optimizer: OptimizerSettings = OPTIMIZER
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The final weights of an uninterrupted run, and of one that stopped and went on from its checkpoint."""
    whole = learner_for(loop, optimizer=optimizer)
    train(whole, Drawn(loop.accumulation_steps), loop, optimizer, Kept(whole))
    first = learner_for(loop, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        train(first, Drawn(loop.accumulation_steps), loop, optimizer, Kept(first, folder, stop_after=stop))
    if distributed.is_initialized():
        distributed.barrier()
    second = learner_for(loop, optimizer=optimizer, seed=99)  # other weights, which the checkpoint must replace
    progress = load_checkpoint(folder / str(stop), second)
    train(second, Drawn(loop.accumulation_steps), loop, optimizer, Kept(second), progress=progress)
    return weights(whole), weights(second)


@pytest.mark.parametrize(
    ("others", "method"),
    [({}, "sgd"), ({"accumulation_steps": 2}, "sgd"), ({"ema_decay": 0.9}, "sgd"), ({}, "adamw")],
    ids=["plain", "accumulated", "averaged", "adamw"],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, others: dict[str, Any], method: Literal["sgd", "adamw"]) -> None:
    optimizer = OPTIMIZER.model_copy(update={"method": method})
    whole, resumed = run_whole_and_resumed(tmp_path, settings(**others), 3, optimizer)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def _two_workers(worker: int, folder: Path) -> None:
    whole, resumed = run_whole_and_resumed(folder, settings(), stop=3)
    # Batch norm's running statistics are each worker's own, and only worker 0's are kept in a checkpoint.
    names = [name for name in whole if worker == 0 or "running" not in name]
    torch.save([name for name in names if not torch.equal(whole[name], resumed[name])], folder / f"differ-{worker}.pt")
    torch.save(whole, folder / f"whole-{worker}.pt")
    learner = learner_for(settings())
    kept = Kept(learner)
    with pytest.raises(UsageError, match=r"^shard-000001\.tar: access denied$"):
        train(learner, Drawn(ends=(1, 2)), settings(), OPTIMIZER, kept)
    (folder / f"stopped-{worker}.json").write_text(json.dumps(list(kept.metrics_of)))


def test_a_run_that_was_told_to_stop_is_saved_and_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    loop = settings(checkpoint_every=100)
    whole = learner_for(loop)
    train(whole, Drawn(), loop, OPTIMIZER, Kept(whole))
    first = learner_for(loop)
    with pytest.raises(StoppedError, match=r"^stopped at step 2 of 6, as asked; run the same again to go on$"):
        train(first, Drawn(), loop, OPTIMIZER, Kept(first, tmp_path, decides=(2, "stop")))
    second = learner_for(loop, seed=99)
    train(second, Drawn(), loop, OPTIMIZER, Kept(second), progress=load_checkpoint(tmp_path / "2", second))
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize(("decision", "saved"), [("go on", [6]), ("save", [4, 6])])
def test_what_is_decided_is_done_once(decision: Literal["go on", "save"], saved: list[int]) -> None:
    loop = settings(checkpoint_every=100)
    learner = learner_for(loop)
    kept = Kept(learner, decides=(4, decision))
    train(learner, Drawn(), loop, OPTIMIZER, kept)
    assert kept.saved == saved


def test_a_run_that_is_told_to_stop_at_its_last_step_is_done() -> None:
    loop = settings(checkpoint_every=100)
    learner = learner_for(loop)
    kept = Kept(learner, decides=(6, "stop"))
    assert train(learner, Drawn(), loop, OPTIMIZER, kept).step == 6
    assert kept.saved == [6]


def _stopped_by_one(worker: int, folder: Path) -> None:
    learner = learner_for(settings())
    kept = Kept(learner, decides=(3, "stop"), caller=1)
    try:
        train(learner, Drawn(), settings(checkpoint_every=100), OPTIMIZER, kept)
    except StoppedError:
        torch.save(kept.saved, folder / f"saved-{worker}.pt")


def test_all_workers_stop_together_whoever_called(tmp_path: Path) -> None:
    on_workers(2, _stopped_by_one, tmp_path)
    assert [torch.load(tmp_path / f"saved-{worker}.pt") for worker in range(2)] == [[3], [3]]


def test_two_workers_resume_as_if_uninterrupted_and_stop_together(tmp_path: Path) -> None:
    """Also when the stream of one of them has an error: the other would wait for it in the next collective."""
    on_workers(2, _two_workers, tmp_path)
    for worker in range(2):
        assert torch.load(tmp_path / f"differ-{worker}.pt") == []
        assert json.loads((tmp_path / f"stopped-{worker}.json").read_text()) == [1, 2]
    first, second = (torch.load(tmp_path / f"whole-{worker}.pt") for worker in range(2))
    for name, value in first.items():
        if "running" not in name:
            assert torch.equal(value, second[name]), name


def crop_pair(numbers: list[int]) -> CropPair:
    pixels = torch.cat([sample(number).images.pixels for number in numbers])
    return CropPair(pixels[..., :32, :32], pixels[..., 16:48, 16:48], tuple(numbers))


@dataclass
class Looking(Kept):
    """Looks when it is time to."""

    probe: Probe | None = None
    looks: dict[int, Look] = field(default_factory=dict)

    def look(self, step: int, inputs: Any) -> None:
        if self.probe is not None:
            self.looks[step] = self.probe.look(self.learner, inputs)


def pretraining_learner(loop: LoopSettings, seed: int = 0) -> Learner:
    model = DenseCL(
        DenseCLModelSettings(backbone="resnet18", hidden_channels=16, projection_channels=8, queue_length=8)
    )
    model.initialise(torch.Generator().manual_seed(seed))
    return Learner(DenseCLTraining(model, ViewSettings(size=32)), loop, OPTIMIZER, torch.device("cpu"))


def some_photos() -> ProbePhotos:
    pixels = np.stack([sample(number).images.pixels[0].permute(1, 2, 0).numpy() for number in range(20, 26)])
    left, right = (np.tile(np.array([x, 8, 32, 32], np.float32), (6, 1)) for x in (0, 16))
    return ProbePhotos(
        query=pixels[:, 8:40, :32],
        key=pixels[:, 8:40, 16:48],
        query_boxes_xywh=left,
        key_boxes_xywh=right,
        objects=pixels[:, :32, :32],
        categories=np.arange(6) % 2,
        photos=np.arange(6),
        pictured=(PicturedPhoto("photo", pixels[0], ((0.4, 0.5), (0.9, 0.5))),),
    )


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_training_that_is_looked_at_has_the_bits_of_one_that_is_not(tmp_path: Path, ema_decay: float | None) -> None:
    """Uninterrupted or resumed: and after a resume the same is seen."""
    loop = settings(overlay_every=2, ema_decay=ema_decay)
    probe = Probe(some_photos(), ViewSettings(size=32), seed=0)
    unseen = pretraining_learner(loop)
    train(unseen, Drawn(content=crop_pair), loop, OPTIMIZER, Kept(unseen))
    whole = pretraining_learner(loop)
    kept = Looking(whole, tmp_path, probe=probe)
    train(whole, Drawn(content=crop_pair), loop, OPTIMIZER, kept)
    resumed = pretraining_learner(loop, seed=99)
    seen_again = Looking(resumed, probe=probe)
    progress = load_checkpoint(tmp_path / "3", resumed)
    train(resumed, Drawn(content=crop_pair), loop, OPTIMIZER, seen_again, progress=progress)

    for name, value in weights(unseen).items():
        assert torch.equal(value, weights(whole)[name]), name
        assert torch.equal(value, weights(resumed)[name]), name
    assert list(kept.looks) == [2, 4, 6]
    assert list(seen_again.looks) == [4, 6]
    for step, look in seen_again.looks.items():
        assert look.metrics == kept.looks[step].metrics
        assert np.array_equal(look.pictures["similarity"], kept.looks[step].pictures["similarity"])
    assert not np.array_equal(kept.looks[2].pictures["similarity"], kept.looks[6].pictures["similarity"])


def test_each_sample_is_used_once_an_epoch() -> None:
    loop = settings(steps=5)  # 20 samples: two epochs of 10
    learner = learner_for(loop)
    kept = Kept(learner)
    train(learner, Drawn(), loop, OPTIMIZER, kept)
    used = [number for step in range(5) for number in kept.ids_of[step]]
    assert sorted(used[:10]) == sorted(used[10:]) == list(range(10))


def test_metrics_are_means_of_named_losses_and_their_sum() -> None:
    loop = settings(steps=2)
    learner = learner_for(loop)
    kept = Kept(learner)
    train(learner, Drawn(), loop, OPTIMIZER, kept)
    values = kept.metrics_of[2]
    parts = [value for name, value in values.items() if name.startswith("loss/")]
    assert len(parts) == 5
    assert values["loss"] == pytest.approx(sum(parts))
    assert values["gradient_norm"] > 0
    assert 0 <= values["data_wait_share"] <= 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images() -> None:
    loop = settings()
    learner = learner_for(loop)
    with torch.no_grad():
        learner.task.module.segmenter.backbone.conv1.weight.fill_(float("nan"))
    with pytest.raises(
        JobError, match=r"step 1: a loss is not finite .*image ids of the batch: \[\d+, \d+, \d+, \d+\]"
    ):
        train(learner, Drawn(), loop, OPTIMIZER, Kept(learner))


def test_bad_samples_are_counted_and_named_above_the_budget() -> None:
    loop = settings()
    learner = learner_for(loop)
    with pytest.raises(JobError, match=r"1 unusable samples, more than the 0 .* first: 000007 \(truncated\)"):
        train(learner, Drawn(bad_at_step=4), loop, OPTIMIZER, Kept(learner), max_bad_samples=0.0)
    learner = learner_for(loop)
    kept = Kept(learner)
    train(learner, Drawn(bad_at_step=4), loop, OPTIMIZER, kept, max_bad_samples=0.1)
    assert kept.metrics_of[6]["bad_samples"] == 1


class Regression(nn.Module):
    """Mean square of a weighted sum of each image's mean colours: each image counts the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))

    def forward(self, batch: SegmentationBatch, step: int) -> dict[str, Tensor]:
        return {"square": (batch.images.pixels.float().mean(dim=(2, 3)) / 255 @ self.weight).square().mean()}


@dataclass(frozen=True)
class Unaugmented:
    """The batch as it is."""

    module: nn.Module

    def prepare(self, batch: SegmentationBatch, generator: torch.Generator) -> SegmentationBatch:
        return batch

    def after_step(self, step: int) -> None:
        return


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    results = []
    for accumulation_steps in (1, 2, 4):
        loop = LoopSettings(steps=4, batch_size=4, accumulation_steps=accumulation_steps)
        learner = Learner(Unaugmented(Regression()), loop, OPTIMIZER, torch.device("cpu"))
        train(learner, Drawn(accumulation_steps), loop, OPTIMIZER, Kept(learner))
        results.append(weights(learner)["weight"])
    assert not torch.equal(results[0], Regression().weight)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


class Cliff(Regression):
    """A loss of 0, with gradients without end."""

    def forward(self, batch: SegmentationBatch, step: int) -> dict[str, Tensor]:
        return {"cliff": (self.weight - self.weight.detach()).sqrt().sum()}


def test_gradients_that_are_not_finite_stop_the_run_though_the_loss_is_finite() -> None:
    loop = LoopSettings(steps=1, batch_size=4)
    learner = Learner(Unaugmented(Cliff()), loop, OPTIMIZER, torch.device("cpu"))
    kept = Kept(learner)
    with pytest.raises(
        JobError, match=r"^step 1: the gradient is not finite \(cliff=0, gradient norm=inf\); image ids"
    ):
        train(learner, Drawn(), loop, OPTIMIZER, kept)
    assert kept.saved == []


@dataclass
class Poisoning(Kept):
    """Makes a weight NaN when it is told of the metrics: after the losses were looked at."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        with torch.no_grad():
            self.learner.task.module.weight[1] = float("nan")


def test_weights_that_are_not_finite_are_not_saved() -> None:
    loop = LoopSettings(steps=1, batch_size=4)
    learner = Learner(Unaugmented(Regression()), loop, OPTIMIZER, torch.device("cpu"))
    kept = Poisoning(learner)
    with pytest.raises(JobError, match=r"^step 1: weight is not finite any more; nothing was saved$"):
        train(learner, Drawn(), loop, OPTIMIZER, kept)
    assert kept.saved == []


def test_the_average_follows_the_weights_and_is_what_is_kept() -> None:
    loop = settings(steps=3, ema_decay=0.5)
    learner = learner_for(loop)
    train(learner, Drawn(), loop, OPTIMIZER, Kept(learner))
    assert learner.best_module() is not learner.task.module
    plain = learner_for(settings(steps=3))
    assert plain.best_module() is plain.task.module


def test_a_snapshot_is_of_its_step_whatever_is_learned_before_it_is_written(tmp_path: Path) -> None:
    loop = settings(steps=4, ema_decay=0.5)
    learner, copy = learner_for(loop), learner_for(loop, seed=1)
    train(learner, Drawn(), loop.model_copy(update={"steps": 2}), OPTIMIZER, Kept(learner))
    snapshot = take_snapshot(learner, Progress(step=2))
    (tmp_path / "at-once").mkdir()
    save_checkpoint(tmp_path / "at-once", snapshot, JOB, "commit")
    train(learner, Drawn(), loop, OPTIMIZER, Kept(learner), progress=Progress(step=2))
    (tmp_path / "later").mkdir()
    save_checkpoint(tmp_path / "later", snapshot, JOB, "commit")
    assert (tmp_path / "later" / "learner.pt").read_bytes() == (tmp_path / "at-once" / "learner.pt").read_bytes()
    assert load_checkpoint(tmp_path / "later", copy) == Progress(step=2)
    names = [name for name, weights in learner.task.module.named_parameters() if weights.requires_grad]
    learned, saved = learner.task.module.state_dict(), copy.task.module.state_dict()
    assert names
    assert not any(torch.equal(learned[name], saved[name]) for name in names), "the learner went on"


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def count_a_step_more(file: Path) -> None:
    file.write_text(file.read_text().replace('"step": 3', '"step": 4'))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("learner.pt", Path.unlink, "learner.pt is missing"),
        ("learner.pt", cut_short, "learner.pt is not what was saved"),
        ("learner.pt", flip_a_bit, "learner.pt is not what was saved"),
        ("progress.json", Path.unlink, "progress.json cannot be read"),
        ("progress.json", cut_short, "progress.json cannot be read"),
        ("progress.json", count_a_step_more, "progress.json was altered"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(
    tmp_path: Path, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    loop = settings()
    save_checkpoint(tmp_path, take_snapshot(learner_for(loop, seed=1), Progress(step=3)), JOB, "commit")
    damage(tmp_path / name)
    learner = learner_for(loop)
    before = {key: value.clone() for key, value in learner.task.module.state_dict().items()}
    with pytest.raises(DamagedCheckpointError, match=rf"^checkpoint {tmp_path}: {reason}"):
        load_checkpoint(tmp_path, learner)
    assert all(torch.equal(value, before[key]) for key, value in learner.task.module.state_dict().items())


def test_a_checkpoint_with_nan_in_it_is_a_damaged_one(tmp_path: Path) -> None:
    loop = settings()
    spoiled = learner_for(loop, seed=1)
    with torch.no_grad():
        spoiled.task.module.segmenter.backbone.conv1.weight[0, 0, 0, 0] = float("nan")
    save_checkpoint(tmp_path, take_snapshot(spoiled, Progress(step=3)), JOB, "commit")
    reason = r"learner.pt cannot be read: module.segmenter.backbone.conv1.weight has values that are NaN or infinite$"
    with pytest.raises(DamagedCheckpointError, match=rf"^checkpoint {tmp_path}: {reason}"):
        load_checkpoint(tmp_path, learner_for(loop))


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    loop = settings()
    save_checkpoint(tmp_path, take_snapshot(learner_for(loop), Progress()), JOB, "commit")
    record = json.loads((tmp_path / "progress.json").read_text())
    (tmp_path / "progress.json").write_text(json.dumps(record | {"format_version": 1}))
    with pytest.raises(UsageError, match="written in format 1, this freesolo reads 2"):
        load_checkpoint(tmp_path, learner_for(loop))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    loop = settings()
    learner = learner_for(loop)
    save_checkpoint(tmp_path, take_snapshot(learner, Progress()), JOB, "commit")
    other = SoloTask(
        MODEL.model_copy(update={"head": MODEL.head.model_copy(update={"tower_channels": 64})}),
        "free_masks",
        LossSettings(),
    )
    other.initialise(torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match="another architecture"):
        load_checkpoint(tmp_path, Learner(WeakView(other), loop, OPTIMIZER, torch.device("cpu")))
