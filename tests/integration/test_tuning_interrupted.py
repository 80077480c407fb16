"""Sweeps that are killed, stopped or lose a worker, with real trainings: the same again goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image
from ray import tune

from freesolo.config import TrainJob, TuneJob
from freesolo.config_file import dump_config, load_config
from freesolo.data.pack import pack
from freesolo.errors import JobError
from freesolo.jobs import train_stage
from freesolo.models.model_file import save_model
from freesolo.solo.model import Segmenter
from freesolo.stages import StageFolder
from freesolo.sweep import Sweep
from freesolo.tracking.journal import read_journal
from freesolo.tracking.record import read_record
from freesolo.trials import run_trials
from freesolo.tuning import tune_stage
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN
from tests.small import small_solo
from tests.sweeps import last_loss, pack_scenes, tune_job

pytestmark = [
    pytest.mark.trainings,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(1800),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `pack_scenes`."""
    return pack_scenes(tmp_path_factory.mktemp("scenes"))


def pack_plates(folder: Path, count: int, *, seed: int) -> str:
    """An annotated data set of bright squares that nearly fill their photos, which a few steps learn to find."""
    random = np.random.default_rng(seed)
    annotations, images = [], []
    (folder / "photos").mkdir(parents=True)
    for number in range(1, count + 1):
        left, top = (int(start) for start in random.integers(2, 10, 2))
        pixels = random.integers(40, 80, (96, 96, 3), dtype=np.uint8)
        pixels[top : top + 84, left : left + 84] += 130
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 96, "width": 96})
        corners = [left, top, left + 84, top, left + 84, top + 84, left, top + 84]
        box = {"bbox": [left, top, 84, 84], "area": 84 * 84, "segmentation": [corners]}
        annotations.append({"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, **box})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "plate"}]}
    (folder / "photos" / "annotations.json").write_text(json.dumps(document))
    pack(str(folder / "photos" / "annotations.json"), str(folder / "data"), samples_per_shard=4)
    return str(folder / "data")


def test_a_sweep_whose_driver_is_killed_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """Two trials in turn; when the second has a checkpoint behind it, all of the job's processes are killed.

    They have losses that cannot be compared, so the best is by what the models find in other photos: the one that is
    not taught its masks has a loss less, and finds less.
    """
    plates = pack_plates(tmp_path / "plates", 8, seed=0)
    held_out = pack_plates(tmp_path / "held-out", 4, seed=1)
    space = {"train.losses.dice": {"grid": [0.0, 3.0]}}
    settings = {"scheduler": "none", "max_concurrent": 1, "evaluation_metric": "segm/AR100"}
    job = tune_job(plates, {"uri": "off"}, space=space, steps=8, held_out=held_out, **settings)
    folder = StageFolder(str(tmp_path), "run", "tune")
    trials = [Path(tmp_path, "run", f"trial-{number:05d}") for number in range(2)]
    with submitted(job, folder) as (process, log):
        try:
            wait_for_checkpoint(trials[1], process, log, step=2)
        finally:
            kill_all(process)
    assert [(trial / "result.json").exists() for trial in trials] == [True, False], "killed in the middle"
    before = (trials[0] / "model.pt").stat().st_mtime_ns

    result = tune_stage(job, folder)
    assert result.counts["trials finished"] == 2
    assert (trials[0] / "model.pt").stat().st_mtime_ns == before, "what was finished is not done again"
    for number, trial in enumerate(trials):
        assert [entry.step for entry in read_journal(str(trial))] == list(range(1, 9)), trial
        losses = json.loads((trial / "settings.json").read_text())["train"]["losses"]
        assert losses["dice"] == job.trials()[number]["train.losses.dice"]
    (told,) = [entry.metrics for entry in read_journal(folder.url) if "trial-00000/segm/AR100" in entry.metrics]
    recalls = [told[f"{trial.name}/segm/AR100"] for trial in trials]
    assert last_loss(folder, "trial-00000") < last_loss(folder, "trial-00001")
    assert 0 <= recalls[0] < recalls[1]
    assert result.outputs["trial"] == "trial-00001"
    assert result.metrics["segm/AR100"] == recalls[1]
    table = (Path(folder.url) / "trials.md").read_text()
    assert "| trial | train.losses.dice | loss | segm/AR100 | step | state |" in table
    undisturbed = StageFolder(str(tmp_path), "undisturbed", "solo")
    train_stage(job.trial_job(job.trials()[1]), undisturbed)
    assert last_loss(undisturbed, "solo") == last_loss(folder, trials[1].name), "the trial that was killed"


@contextmanager
def submitted(
    job: TuneJob, folder: StageFolder, *, address: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`jobs/tune_solo.py` in another process, and where its output goes; without an address it has a Ray of its own."""
    config, log = Path(folder.storage, "sweep.yaml"), Path(folder.storage, "job.log")
    config.write_text(dump_config(job))
    arguments = ["--config", str(config), "--run-name", folder.run_name, "--storage", folder.storage]
    with log.open("wb") as output:
        process = subprocess.Popen(
            # SIGINT is ignored by what a shell starts in the background, these tests for one.
            ["env", "--default-signal=INT", sys.executable, "jobs/tune_solo.py", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        yield process, log


def newest_checkpoint(trial: Path) -> int:
    """The step of a trial's newest; 0: it has none."""
    return max((int(path.parent.name[5:13]) for path in trial.glob("checkpoints/step-*/learner.pt")), default=0)


def wait_for_checkpoint(trial: Path, process: subprocess.Popen[bytes], log: Path, *, step: int) -> None:
    """Until a trial has one of a step, or of a later one."""
    deadline = time.monotonic() + 900  # A trial before it, beside another file's trainings: 400 were not enough once.
    while newest_checkpoint(trial) < step:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all that it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(30)


@pytest.mark.slow
def test_a_signal_has_the_trainings_of_a_sweep_saved_and_the_same_again_goes_on(scenes: str, tmp_path: Path) -> None:
    """Two trials, one after the other: SIGTERM, and the same again until Ctrl-C."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    rates = {"train.optimizer.learning_rate": {"grid": [1.0e-3, 3.0e-3]}}
    job = tune_job(scenes, {"uri": uri}, steps=1000, scheduler="none", max_concurrent=1, space=rates)
    loop = job.train.loop.model_copy(update={"checkpoint_every": 8})
    job = job.model_copy(update={"train": job.train.model_copy(update={"loop": loop})})
    folder = StageFolder(str(tmp_path), "run", "tune")
    trial, other = (Path(tmp_path, "run", f"trial-{number:05d}") for number in range(2))
    stopped_at = 0
    for number, code, said in (
        (signal.SIGTERM, 143, "stopped with 0 of 2 trials done, as asked; run the same again to go on"),
        (signal.SIGINT, 130, "interrupted; run the same again to go on"),
    ):
        with submitted(job, folder, address=ray.get_runtime_context().gcs_address) as (process, log):
            try:
                wait_for_checkpoint(trial, process, log, step=stopped_at + 8)
                process.send_signal(number)
                assert process.wait(120) == code, log.read_text()[-4000:]
            finally:
                if process.poll() is None:
                    kill_all(process)
        assert f"error: {said}" in log.read_text()
        client = MlflowClient(uri)
        steps = [entry.step for entry in read_journal(str(trial))]
        assert steps == list(range(1, len(steps) + 1))
        assert newest_checkpoint(trial) == len(steps), "what was done since the last checkpoint is not lost"
        assert not list((trial / ".lease").glob("*.json")), "nobody has to wait"
        record = read_record(str(trial))
        assert record is not None
        assert client.get_run(str(record.run_id)).info.status == "KILLED"
        stopped_at = newest_checkpoint(trial)
        assert not other.exists()
        assert not Path(folder.url, "result.json").exists()


def test_a_trial_that_is_stopped_at_the_end_of_a_sweep_has_the_time_it_takes(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials in turn, the second is stopped at its first report, and takes longer than Tune's patience of 10 s."""

    class SlowToStop(tune.Trainable):
        def setup(self, config: dict[str, Any], *, sweep: Sweep, board: Any) -> None:  # type: ignore[override]
            self._number, self._folder = config["trial"], Path(sweep.folder_of(config["trial"]).url)
            self._folder.mkdir(parents=True)
            self._steps = 0

        def step(self) -> dict[str, Any]:
            self._steps += 2
            if self._steps == 8:
                (self._folder / "result.json").touch()
            return {"step": self._steps, "metric": float(self._number), "done": self._steps == 8}

        def stop_training(self) -> None:
            time.sleep(20)
            (self._folder / "saved").touch()

        def cleanup(self) -> None:
            if self._steps < 8 and not (self._folder / "saved").exists():
                self.stop_training()

    monkeypatch.setattr("freesolo.trials.Trial", SlowToStop)
    job = tune_job(scenes, {"uri": "off"}, steps=8, scheduler="asha", reduction_factor=2.0)
    sweep = Sweep(StageFolder(str(tmp_path), "run", "tune"), "loss", ({}, {}), (job, job), at_once=1)
    before = signal.getsignal(signal.SIGINT)
    assert run_trials(sweep, job.tune) == {}
    assert sweep.finished(0)
    assert sweep.stopped(1) == {"step": 2, "metric": 1.0}
    assert Path(sweep.folder_of(1).url, "saved").exists()
    assert signal.getsignal(signal.SIGINT) is before, "Tune's handler does not stay"


def write_segmenter(path: Path, *, seed: int) -> bytes:
    """A model file of random weights; returns what is in it."""
    segmenter = Segmenter(small_solo())
    segmenter.initialise(torch.Generator().manual_seed(seed))
    save_model(
        path, "segmenter", settings=small_solo().model_dump(), state_dict=dict(segmenter.state_dict()), lineage={}
    )
    return path.read_bytes()


def kill_worker_of(trial: Path, killed: list[int]) -> None:
    """When a trial has a checkpoint behind it, SIGKILL its train worker."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if list(trial.glob("checkpoints/step-*/learner.pt")):
            for process in psutil.Process().children(recursive=True):  # of this test's own cluster
                with suppress(psutil.NoSuchProcess):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_a_trial_that_lost_its_worker_goes_on_and_one_that_diverges_has_failed(scenes: str, tmp_path: Path) -> None:
    """Two trials in turn, of which the first diverges; in the second a worker is lost, where none may be.

    What they start from is gone by the time that the sweep is submitted again: it has a copy of its own.
    """
    start = tmp_path / "start.pt"
    started_from = write_segmenter(start, seed=0)
    space = {"train.optimizer.learning_rate": {"grid": [1.0e30, 1.0e-2]}}
    job = tune_job(scenes, {"uri": "off"}, steps=20, scheduler="median", max_concurrent=1, space=space)
    job = job.model_copy(
        update={
            "resources": job.resources.model_copy(update={"max_failures": 0}),
            "train": job.train.model_copy(update={"initial_weights": str(start)}),
        }
    )
    folder = StageFolder(str(tmp_path), "run", "tune")
    killed: list[int] = []
    killer = threading.Thread(target=kill_worker_of, args=(Path(folder.sibling("trial-00001").url), killed))
    killer.start()
    lost = (
        r"^1 of 2 trials did not come to their end, trial-00001 for one: .*worker 0: .*; run the same again to go on$"
    )
    with pytest.raises(JobError, match=lost):
        tune_stage(job, folder)
    killer.join()
    assert killed
    assert not Path(folder.url, "result.json").exists()

    start.unlink()
    result = tune_stage(job, folder)
    assert result.outputs["trial"] == "trial-00001"
    assert (result.counts["trials finished"], result.counts["trials failed"]) == (1, 1)
    assert [entry.step for entry in read_journal(folder.sibling("trial-00001").url)] == list(range(1, 21))
    best = load_config(TrainJob, result.outputs["config"]).train.initial_weights
    for trial in ("trial-00000", "trial-00001"):
        settings = json.loads(Path(folder.sibling(trial).url, "settings.json").read_text())
        assert settings["train"]["initial_weights"] == best
    assert Path(str(best)).read_bytes() == started_from
