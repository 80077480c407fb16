"""The witness and the registry against a real MLflow server, which goes away and comes back."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from freesolo.config import PretrainJob
from freesolo.models.model_file import save_model
from freesolo.models.resnet import build_resnet
from freesolo.registry.champion import promote_if_better
from freesolo.registry.versions import register_backbone
from freesolo.registry.weights import resolve_weights
from freesolo.settings import LoopSettings, PretrainSettings, TrackingSettings
from freesolo.tracking.journal import Journal, read_journal
from freesolo.tracking.record import read_record
from freesolo.tracking.server import TrackingServer, resolve_server
from freesolo.tracking.witness import TrackedRun, Witness, deliver_later
from tests.servers import MlflowServer

pytestmark = [
    # Said when `mlflow.pyfunc` is imported, of MLflow's own types.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning:mlflow.utils.warnings_utils"),
]

AT_ONCE = 0.5  # seconds that a call of the training side may take, on a machine that is busy


@pytest.fixture(scope="session")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One for all tests, because it takes seconds to start; some tests kill it."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def server(one_server: MlflowServer) -> MlflowServer:
    """A server that is running."""
    if not one_server.running:
        one_server.start()
    return one_server


@pytest.fixture
def run(one_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    """A run that nobody knows yet, on a machine where nothing is spooled."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    tracking = resolve_server(TrackingSettings(uri=one_server.url), "memory://runs")
    assert tracking == TrackingServer(one_server.url)
    return TrackedRun(str(tmp_path / "runs" / "solo"), "solo", tmp_path.name, tracking)


def history(uri: str, run_id: str | None, metric: str = "loss") -> list[tuple[int, float]]:
    assert run_id is not None
    return sorted((point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, metric))


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def train(journal: Journal, witness: Witness, steps: range) -> float:
    """What a training tells; the longest that a call took, in seconds."""
    slowest = 0.0
    for step in steps:
        began = time.monotonic()
        journal.append(step, {"loss": 1.0 / (step + 1), "images_per_second": 40.0})
        if step % 10 == 0:
            witness.picture("overlay", np.full((8, 8, 3), step % 256, np.uint8), step)
        slowest = max(slowest, time.monotonic() - began)
    return slowest


def losses(steps: range) -> list[tuple[int, float]]:
    return [(step, 1.0 / (step + 1)) for step in steps]


def test_a_server_gets_the_whole_of_a_run(
    server: MlflowServer, run: TrackedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(run.run_url)
    witness = Witness(run, journal)
    job = PretrainJob(dataset="s3://b/photos", pretrain=PretrainSettings(loop=LoopSettings(steps=3, batch_size=32)))
    witness.settings(job)
    witness.dataset("photos", "ab" * 32, "s3://b/photos")
    train(journal, witness, range(50))
    delivery = witness.close(timeout=60)
    journal.close()
    assert (delivery.undelivered, delivery.reason) == (0, None)
    assert capsys.readouterr().out == ""  # a job's last line there is its result
    client = MlflowClient(server.url)
    told = client.get_run(str(witness.run_id))
    assert told.info.status == "FINISHED"
    assert told.data.params["pretrain.loop.steps"] == "3"
    assert told.inputs.dataset_inputs[0].dataset.name == "photos"
    assert history(server.url, witness.run_id) == losses(range(50))
    config = client.download_artifacts(told.info.run_id, "config.yaml", str(tmp_path))
    assert "batch_size: 32" in Path(config).read_text()
    images = client.list_artifacts(told.info.run_id, "images")
    assert len([file for file in images if file.path.endswith(".png")]) == 5


def test_a_server_that_hangs_does_not_hold_up_the_run(server: MlflowServer, run: TrackedRun) -> None:
    journal = Journal(run.run_url)
    witness = Witness(run, journal)
    train(journal, witness, range(10))
    until(lambda: witness.run_id is not None)
    server.pause()
    try:
        assert train(journal, witness, range(10, 200)) < AT_ONCE
        began = time.monotonic()
        delivery = witness.close(timeout=1.0)
        assert time.monotonic() - began < 4.0
    finally:
        server.go_on()
    journal.close()
    assert delivery.undelivered > 0
    assert delivery.reason is not None


def test_a_worker_that_is_killed_is_continued_by_another_process(
    server: MlflowServer, run: TrackedRun, tmp_path: Path
) -> None:
    """As Ray does it: worker 0 dies without warning, and a new one goes on after the last checkpoint."""
    script = f"""
import os, pickle, sys, tempfile, time
tempfile.tempdir = {str(tmp_path / "tmp")!r}
from freesolo.tracking.journal import Journal
from freesolo.tracking.witness import Witness
run = pickle.loads(bytes.fromhex(sys.argv[1]))
journal = Journal(run.run_url)
witness = Witness(run, journal)
for step in range(20):
    journal.append(step, {{"loss": 1.0 / (step + 1), "images_per_second": 40.0}})
    if step == 9:
        journal.flush()  # with the checkpoint
while witness.run_id is None or len(witness._spool) > 0 or witness._courier._entries_left():
    time.sleep(0.05)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script, pickle.dumps(run).hex()], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]
    record = read_record(run.run_url)
    assert record is not None
    assert history(server.url, record.run_id) == losses(range(20))

    journal = Journal(run.run_url, resume_step=10)
    assert len(journal) == 10
    witness = Witness(run, journal)
    train(journal, witness, range(10, 30))
    assert witness.close(timeout=60).reason is None
    journal.close()
    assert witness.run_id == record.run_id
    assert history(server.url, witness.run_id) == losses(range(30))
    assert [entry.step for entry in read_journal(run.run_url)] == list(range(30))
    experiment = MlflowClient(server.url).get_experiment_by_name(run.experiment).experiment_id
    assert len(MlflowClient(server.url).search_runs([experiment])) == 1


def test_models_go_through_a_server(server: MlflowServer, run: TrackedRun, tmp_path: Path) -> None:
    tracking = TrackingServer(server.url)
    journal = Journal(run.run_url)
    witness = Witness(run, journal)
    assert witness.close(timeout=60).reason is None
    journal.close()
    backbone = build_resnet("resnet18").initialise(torch.Generator().manual_seed(0))
    for number, run_id in enumerate((witness.run_id, None), start=1):
        file = tmp_path / f"{number}.pt"
        save_model(file, "backbone", {"backbone": "resnet18"}, backbone.state_dict(), {"number": number})
        registered = register_backbone(file, "backbone", tracking, experiment="freesolo", run_id=run_id)
        assert registered.version == str(number)
        decision = promote_if_better("backbone", registered.version, {"segm/AP50": 0.1}, "a" * 64, server=tracking)
        assert decision.promoted == (number == 1)
        resolved = resolve_weights("models:/backbone@candidate", tmp_path / "cache", server=tracking)
        assert resolved.path.read_bytes() == file.read_bytes()
    assert resolve_weights("models:/backbone@champion", tmp_path / "cache", server=tracking).version == "1"
    version = MlflowClient(server.url).get_model_version("backbone", "1")
    assert version.run_id == witness.run_id


# --- these kill the server, and come last because each start takes seconds -----------------------------------------


def test_a_server_that_is_killed_midway_and_comes_back_gets_all_once(server: MlflowServer, run: TrackedRun) -> None:
    journal = Journal(run.run_url)
    witness = Witness(run, journal, max_pause_seconds=1.0)
    train(journal, witness, range(20))
    until(lambda: witness.run_id is not None and len(history(server.url, witness.run_id)) == 20)
    server.kill()
    assert train(journal, witness, range(20, 60)) < AT_ONCE
    journal.flush()
    assert [entry.step for entry in read_journal(run.run_url)] == list(range(60))  # the run's own truth is whole
    server.start()
    delivery = witness.close(timeout=60)
    journal.close()
    assert (delivery.undelivered, delivery.reason) == (0, None)
    assert history(server.url, witness.run_id) == losses(range(60))
    assert MlflowClient(server.url).get_run(str(witness.run_id)).info.status == "FINISHED"


def test_a_server_that_never_comes_back_is_reported_and_told_later(server: MlflowServer, run: TrackedRun) -> None:
    journal = Journal(run.run_url)
    witness = Witness(run, journal, max_pause_seconds=1.0)
    train(journal, witness, range(20))
    until(lambda: witness.run_id is not None and len(history(server.url, witness.run_id)) == 20)
    server.kill()
    train(journal, witness, range(20, 50))
    began = time.monotonic()
    delivery = witness.close(timeout=2.0)
    assert time.monotonic() - began < 5.0
    journal.close()
    assert delivery.undelivered >= 33  # 30 entries, 3 pictures, perhaps samples of the machine
    assert f"{server.url} does not answer" in str(delivery.reason)
    assert str(delivery).startswith(f"{delivery.undelivered} of {delivery.sent + delivery.undelivered} records not")

    server.start()
    later = deliver_later(run.run_url)
    assert (later.undelivered, later.reason) == (0, None)
    assert history(server.url, witness.run_id) == losses(range(50))
    record = read_record(run.run_url)
    assert record is not None
    assert record.run_id == witness.run_id
    images = MlflowClient(server.url).list_artifacts(str(record.run_id), "images")
    assert len([file for file in images if file.path.endswith(".png")]) == 5


def test_a_server_that_is_down_at_the_start_and_comes_later_gets_all(one_server: MlflowServer, run: TrackedRun) -> None:
    one_server.kill()
    journal = Journal(run.run_url)
    began = time.monotonic()
    witness = Witness(run, journal, max_pause_seconds=1.0)
    assert time.monotonic() - began < 5.0
    assert train(journal, witness, range(40)) < AT_ONCE
    assert witness.run_id is None
    one_server.start()
    until(lambda: witness.run_id is not None)
    assert train(journal, witness, range(40, 60)) < AT_ONCE
    delivery = witness.close(timeout=60)
    journal.close()
    assert (delivery.undelivered, delivery.reason) == (0, None)
    assert history(one_server.url, witness.run_id) == losses(range(60))
