"""Training under Ray Train: workers die, runs are submitted again, and still each sample is used once an epoch."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from freesolo.config import PretrainJob, TrainJob
from freesolo.config_file import parse_config
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest, read_shard
from freesolo.errors import JobError, UsageError
from freesolo.jobs import pretrain_stage, train_stage
from freesolo.models.model_file import load_model
from freesolo.stages import StageFolder
from freesolo.tracking.journal import read_journal
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN
from tests.small import small_solo

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(1200),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]

SCENES = 24


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An annotated data set of 24 scenes in 4 shards."""
    folder = tmp_path_factory.mktemp("scenes")
    annotations = compose_scenes(str(folder / "photos"), SCENES, size=96, seed=0)
    pack(annotations, str(folder / "data"), samples_per_shard=6)
    return str(folder / "data")


def pretrain_job(
    dataset: str, *, steps: int, workers: int, probe: dict[str, object] | None = None, **loop: object
) -> PretrainJob:
    raw = {
        "dataset": dataset,
        "resources": {"workers": workers},
        "tracking": {"uri": "off"},
        "pretrain": {
            "model": {
                "backbone": "resnet18",
                "hidden_channels": 32,
                "projection_channels": 16,
                "queue_length": 64,
            },
            "views": {"size": 32},
            "probe": probe or {},
            "optimizer": {"learning_rate": 0.01},
            "loop": {"steps": steps, "batch_size": 8, "log_every": 1, "record_samples": True, **loop},
        },
    }
    return parse_config(PretrainJob, raw, source="test")


def solo_job(dataset: str, *, steps: int, **train: object) -> TrainJob:
    raw = {
        "dataset": dataset,
        "tracking": {"uri": "off"},
        "train": {
            "model": small_solo().model_dump(mode="json"),
            "supervision": "masks",
            "views": {"short_sides": [64], "strong": False},
            "optimizer": {"learning_rate": 0.01},
            "loop": {"steps": steps, "batch_size": 4, "log_every": 1},
            **train,
        },
    }
    return parse_config(TrainJob, raw, source="test")


def samples_of_steps(stage: StageFolder) -> dict[int, list[int]]:
    """The image ids that each step used, all workers together, as the run wrote them down."""
    used: dict[int, list[int]] = {}
    for path in sorted(Path(stage.url, "samples").glob("*.json")):
        for step, image_ids in json.loads(path.read_text()):
            used.setdefault(step, []).extend(image_ids)
    return used


def kill_and_damage(checkpoints: Path, killed: list[int]) -> None:
    """When there are two checkpoints to go on from, SIGKILL a train worker, and flip a bit of the newer of the two."""
    # The manager's snapshot is what a restart goes by: it is written once a checkpoint is committed.
    snapshot = checkpoints / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        committed = sorted(set(re.findall(r"step-\d{8}", snapshot.read_text()))) if snapshot.exists() else []
        workers = [
            process.pid
            for process in psutil.Process().children(recursive=True)  # of this test's own cluster
            if "RayTrainWorker" in _name(process)
        ]
        if len(committed) > 1 and workers:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])
            flip_a_bit(checkpoints / committed[-1] / "learner.pt")
            return
        time.sleep(0.02)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has just ended


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.trainings
def test_a_killed_worker_costs_no_sample_repeats_none_and_changes_no_bit(scenes: str, tmp_path: Path) -> None:
    """Two workers, one SIGKILLed in mid-epoch: 18 steps of 8 are 6 epochs of 24 samples, each sample once in each.

    The newest checkpoint is damaged besides: the run goes on from the one before.
    """
    stage = StageFolder(str(tmp_path), "run", "pretrain")
    job = pretrain_job(scenes, steps=18, workers=2, checkpoint_every=2)
    killed: list[int] = []
    killer = threading.Thread(target=kill_and_damage, args=(Path(stage.url, "checkpoints"), killed))
    killer.start()
    result = pretrain_stage(job, stage)
    killer.join()
    assert killed, "no worker was killed: the run was over too soon"
    assert result.counts == {"images": SCENES, "steps": 18}

    ids = sorted(
        sample.image_id for shard in read_dataset_manifest(scenes).shards for sample in read_shard(scenes, shard)
    )
    used = samples_of_steps(stage)
    assert sorted(used) == list(range(18))
    for epoch in range(6):
        assert sorted(number for step in range(3 * epoch, 3 * epoch + 3) for number in used[step]) == ids, epoch
    steps = Counter(entry.step for entry in read_journal(stage.url))
    assert steps == Counter(range(1, 19)), "the journal has each step once"
    model = load_model(Path(result.outputs["model"]), "backbone")
    assert model.settings == {"backbone": "resnet18"}
    undisturbed = pretrain_stage(job, StageFolder(str(tmp_path), "undisturbed", "pretrain"))
    expected = load_model(Path(undisturbed.outputs["model"]), "backbone").state_dict
    for name, tensor in model.state_dict.items():
        assert torch.equal(tensor, expected[name]), f"{name} differs from an undisturbed run's"

    assert pretrain_stage(job, stage) == result, "a finished stage is not done again"
    with pytest.raises(UsageError, match=r"pretrain.loop.steps: 18, now 19"):
        pretrain_stage(pretrain_job(scenes, steps=19, workers=2, checkpoint_every=2), stage)


@pytest.mark.trainings
def test_a_training_is_looked_at_and_has_the_bits_of_one_that_is_not(scenes: str, tmp_path: Path) -> None:
    """By worker 0 of two, while the other waits; in the journal beside the losses of the same steps."""
    plain = pretrain_job(scenes, steps=5, workers=2)
    seen = pretrain_job(scenes, steps=5, workers=2, overlay_every=2, probe={"photos": 6, "picture_size": 64})
    stages = [StageFolder(str(tmp_path), name, "pretrain") for name in ("plain", "seen")]
    models = []
    for job, stage in zip((plain, seen), stages, strict=True):
        result = pretrain_stage(job, stage)
        models.append(load_model(Path(result.outputs["model"]), "backbone").state_dict)
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name
    entries = read_journal(stages[1].url)
    looks = [entry for entry in entries if any(name.startswith("probe/") for name in entry.metrics)]
    assert [entry.step for entry in looks] == [2, 4, 5]
    assert set(looks[0].metrics) == {"probe/retrieval_top1", "probe/cells_top1"}  # one category: no k-NN
    assert [entry.step for entry in entries if "loss" in entry.metrics] == [1, 2, 3, 4, 5]


def test_a_probe_without_a_data_set_is_refused_at_once(scenes: str, tmp_path: Path) -> None:
    job = pretrain_job(scenes, steps=1, workers=1, probe={"dataset": str(tmp_path / "nothing")})
    with pytest.raises(UsageError, match="nothing: no data set there"):
        pretrain_stage(job, StageFolder(str(tmp_path), "run", "pretrain"))


@pytest.mark.slow
def test_a_run_that_lost_too_many_workers_goes_on_when_it_is_submitted_again(scenes: str, tmp_path: Path) -> None:
    """A worker lost where none may be: one line that says so. Again, with the newest checkpoint damaged: to the end."""
    stage = StageFolder(str(tmp_path), "run", "pretrain")
    job = pretrain_job(scenes, steps=18, workers=2, checkpoint_every=2)
    brittle = job.model_copy(update={"resources": job.resources.model_copy(update={"max_failures": 0})})
    killed: list[int] = []
    killer = threading.Thread(target=kill_and_damage, args=(Path(stage.url, "checkpoints"), killed))
    killer.start()
    with pytest.raises(JobError, match=rf"^{stage.url}: training failed: .*run the same again to go on$"):
        pretrain_stage(brittle, stage)
    killer.join()
    assert pretrain_stage(job, stage).counts == {"images": SCENES, "steps": 18}
    used = samples_of_steps(stage)
    assert sorted(used) == list(range(18))
    assert all(len(set(used[3 * n] + used[3 * n + 1] + used[3 * n + 2])) == SCENES for n in range(6))


@pytest.mark.trainings
def test_a_bad_loss_stops_a_training_and_names_its_batch(scenes: str, tmp_path: Path) -> None:
    """A learning rate that leaves no weight finite: the run ends with an error, and is not started again and again."""
    exploding = solo_job(scenes, steps=8, optimizer={"learning_rate": 1.0e30})
    started = time.monotonic()
    with pytest.raises(JobError, match=r"a loss is not finite .*image ids of the batch"):
        train_stage(exploding, StageFolder(str(tmp_path), "run", "exploding"))
    assert time.monotonic() - started < 300


def test_more_workers_than_the_cluster_holds_are_refused_at_once(scenes: str, tmp_path: Path) -> None:
    job = pretrain_job(scenes, steps=2, workers=8)
    with pytest.raises(
        UsageError, match=r"resources.workers=8 of 1 CPUs each, and 1 CPU to read data, do not fit .* it has 6 CPUs"
    ):
        pretrain_stage(job, StageFolder(str(tmp_path), "run", "pretrain"))
