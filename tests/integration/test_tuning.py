"""Sweeps under Ray Tune, with real trainings: some are stopped early, and the best is kept."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient

from freesolo.config import TrainJob
from freesolo.config_file import load_config
from freesolo.data.files import join
from freesolo.data.shards import read_dataset_manifest
from freesolo.errors import JobError, UsageError
from freesolo.jobs import train_stage
from freesolo.stages import StageFolder
from freesolo.tracking.record import read_record
from freesolo.tuning import tune_stage
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN
from tests.sweeps import RATES, last_loss, pack_scenes, tune_job

pytestmark = [
    pytest.mark.trainings,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(1200),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]
OF_A_TRIAL = ("metrics.jsonl", "model.pt", "result.json", "stopped.json")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `pack_scenes`."""
    return pack_scenes(tmp_path_factory.mktemp("scenes"))


def test_six_trainings_the_slow_learners_are_stopped_and_the_best_is_registered(scenes: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    job = tune_job(scenes, {"uri": uri, "registered_model": "solo"}, steps=8, scheduler="asha", reduction_factor=2.0)
    job = job.model_copy(update={"label_fraction": 0.75})  # two trials at once train on the same part of the photos
    folder = StageFolder(str(tmp_path), "run", "tune")
    result = tune_stage(job, folder)
    counts = result.counts
    assert counts["trials"] == 6
    assert counts["trials finished"] >= 1
    assert counts["trials stopped early"] >= 1
    assert counts["trials failed"] == 0
    subset = join(folder.run_url, f"labelled-{read_dataset_manifest(scenes).digest[:8]}-0.75-seed-0")
    assert read_dataset_manifest(subset).samples == 6

    names = [f"trial-{number:05d}" for number in range(6)]
    finished = [name for name in names if Path(folder.sibling(name).url, "result.json").exists()]
    stopped = [name for name in names if name not in finished]
    assert len(finished) == counts["trials finished"]
    best = min(finished, key=lambda name: last_loss(folder, name))
    assert result.outputs["trial"] == best
    assert result.metrics == {"loss": last_loss(folder, best)}
    rate = RATES[names.index(best)]
    assert json.loads(result.outputs["values"]) == {"train.optimizer.learning_rate": rate}

    client = MlflowClient(uri)
    parent = read_record(folder.url)
    assert parent is not None
    for name in names:
        record = read_record(folder.sibling(name).url)
        assert record is not None
        run = client.get_run(str(record.run_id))
        assert run.info.status == ("FINISHED" if name in finished else "KILLED"), name
        assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    version = client.get_model_version_by_alias("solo", "candidate")
    assert result.outputs["registered"] == f"models:/solo/{version.version}"
    assert len(client.search_model_versions("name = 'solo'")) == 1
    record = read_record(folder.sibling(best).url)
    assert record is not None
    assert version.run_id == record.run_id

    # What was stopped has given back what it had: the cluster is as free as before.
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)
    for name in stopped:
        assert not list(Path(folder.sibling(name).url, ".lease").glob("*.json")), name

    again = load_config(TrainJob, result.outputs["config"])
    assert again.train.optimizer.learning_rate == rate
    assert again.tracking.registered_model == "solo"
    off = again.model_copy(update={"tracking": again.tracking.model_copy(update={"uri": "off"})})
    alone = train_stage(off, StageFolder(str(tmp_path), "alone", "solo"))
    assert alone.metrics["loss"] == last_loss(folder, best), "the same settings train the same model"
    assert tune_stage(job, folder) == result, "a finished sweep is not done again"

    kept = [path for name in names for path in (Path(folder.sibling(name).url, file) for file in OF_A_TRIAL)]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept if path.exists()}
    Path(folder.url, "result.json").unlink()
    assert replace(tune_stage(job, folder), seconds=result.seconds) == result, "as if only its end had been lost"
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept if path.exists()} == before


def test_a_trial_that_diverges_is_the_worst_and_where_all_do_the_sweep_says_why(scenes: str, tmp_path: Path) -> None:
    space = {"train.optimizer.learning_rate": {"grid": [1.0e30]}}
    job = tune_job(scenes, {"uri": "off"}, scheduler="median", space=space)
    with pytest.raises(JobError, match=r"none of 1 trials went to the end: step .* a loss is not finite"):
        tune_stage(job, StageFolder(str(tmp_path), "run", "tune"))


def test_what_cannot_be_is_refused_before_anything_is_started(scenes: str, tmp_path: Path) -> None:
    job = tune_job(scenes, {"uri": "off"})
    folder = StageFolder(str(tmp_path), "run", "tune")
    nowhere = job.model_copy(update={"dataset": str(tmp_path / "nowhere")})
    with pytest.raises(UsageError, match="nowhere"):
        tune_stage(nowhere, folder)
    large = job.model_copy(update={"resources": job.resources.model_copy(update={"cpus_per_worker": 6})})
    with pytest.raises(UsageError, match="do not fit the Ray cluster: it has 6 CPUs"):
        tune_stage(large, folder)
    with pytest.raises(UsageError, match=r"evaluation_dataset: .* is what is trained on"):
        tune_stage(job.model_copy(update={"evaluation_dataset": scenes}), folder.sibling("another"))
    assert not list(tmp_path.rglob("trial-*"))
