"""What a training tells of itself with a checkpoint: of each metric the last value, before it was interrupted too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from freesolo.config import PretrainJob
from freesolo.config_file import parse_config
from freesolo.data.collate import collate_crops
from freesolo.data.ingest import TrainingStream
from freesolo.data.order import Order
from freesolo.data.shards import DatasetManifest
from freesolo.data.views import ContrastiveView
from freesolo.settings import ViewSettings
from freesolo.stages import StageFolder
from freesolo.tracking.journal import Journal, read_journal
from freesolo.tracking.witness import TrackedRun
from freesolo.train.learner import Learner
from freesolo.train.loop import Progress
from freesolo.train.plan import Training, TrainingPlan
from freesolo.train.recorder import RunRecorder


class Nothing:
    """A task of one weight."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)

    def prepare(self, batch: Any, generator: torch.Generator) -> Any:
        return batch

    def after_step(self, step: int) -> None:
        pass


def begun_at(step: int, folder: Path) -> RunRecorder:
    """The recorder of a worker alone, which hears nothing."""
    raw = {"dataset": "d", "tracking": {"uri": "off"}, "pretrain": {"loop": {"steps": 9, "batch_size": 1}}}
    job = parse_config(PretrainJob, raw, source="test")
    loop, optimizer = job.pretrain.loop, job.pretrain.optimizer
    manifest = DatasetManifest(1, (), annotated=False, categories=(), skipped=())
    view = ContrastiveView(ViewSettings())
    stream: TrainingStream[Any, Any] = TrainingStream("d", manifest, None, view, collate_crops, Order((), 0), 1, 0.0)
    training = Training(
        Learner(Nothing(), loop, optimizer, torch.device("cpu")), stream, optimizer, lambda learner, path: None
    )
    stage = StageFolder(str(folder), "run", "pretrain")
    plan = TrainingPlan(stage, job, loop, TrackedRun(stage.url, "run", "freesolo", None), lambda device: training)
    silent = SimpleNamespace(remote=lambda *_: None)
    board = SimpleNamespace(stop_wanted=silent, begin=silent, tell=silent)
    return RunRecorder(plan, training, Progress(step), frozenset(), board)


def test_a_resumed_training_knows_what_was_told_before_and_nothing_of_steps_that_will_be_done_again(
    tmp_path: Path,
) -> None:
    journal = Journal(StageFolder(str(tmp_path), "run", "pretrain").url)
    for step, metrics in ((2, {"loss": 3.0}), (2, {"probe/top1": 0.5}), (4, {"loss": 2.0}), (6, {"loss": 1.0})):
        journal.append(step, metrics)
    journal.close()
    with begun_at(5, tmp_path) as recorder:
        assert recorder.last_metrics == {"loss": 2.0, "probe/top1": 0.5}
        recorder.metrics(6, {"loss": 1.5})
        assert recorder.last_metrics == {"loss": 1.5, "probe/top1": 0.5}
    entries = read_journal(StageFolder(str(tmp_path), "run", "pretrain").url)
    assert [(entry.step, dict(entry.metrics)) for entry in entries][-2:] == [(4, {"loss": 2.0}), (6, {"loss": 1.5})]


@pytest.mark.parametrize("step", [0, 5])
def test_a_training_that_told_nothing_yet_knows_nothing(tmp_path: Path, step: int) -> None:
    with begun_at(step, tmp_path) as recorder:
        assert recorder.last_metrics == {}
