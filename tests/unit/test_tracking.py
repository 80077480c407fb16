"""The witness against a real MLflow on SQLite; a real server is in tests/integration/test_tracking_server.py."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from freesolo.cli import main
from freesolo.config import PretrainJob
from freesolo.config_file import load_config
from freesolo.data.lease import LeaseError, held
from freesolo.errors import JobError, UsageError
from freesolo.settings import LoopSettings, PretrainSettings, TrackingSettings
from freesolo.tracking.courier import Courier, Delivery
from freesolo.tracking.journal import Journal
from freesolo.tracking.record import RECORD_NAME, read_record
from freesolo.tracking.server import TrackingServer, explain, request_limits, resolve_server
from freesolo.tracking.witness import TrackedRun, Witness, deliver_later


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def storage(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job's storage folder with MLflow's database in it, on a machine where nothing is spooled."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = tmp_path / "storage"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    return str(folder)


@pytest.fixture
def server(storage: str) -> TrackingServer:
    server = resolve_server(TrackingSettings(), storage)
    assert server is not None
    return server


@pytest.fixture
def client(server: TrackingServer) -> MlflowClient:
    return MlflowClient(server.uri)


class Running:
    """A run with its journal and witness, as a train worker has them."""

    def __init__(self, run: TrackedRun, resume_step: int = 0) -> None:
        self.journal = Journal(run.run_url, resume_step=resume_step)
        self.witness = Witness(run, self.journal, max_pause_seconds=0.25)

    def end(self, status: str = "FINISHED", timeout: float = 60.0) -> Any:
        delivery = self.witness.close(status, timeout=timeout)
        self.journal.close()
        return delivery


@pytest.fixture
def run(storage: str, server: TrackingServer) -> TrackedRun:
    return TrackedRun(f"{storage}/runs/solo", "solo", "freesolo", server)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(run: TrackedRun, resume_step: int = 0) -> Running:
        started.append(Running(run, resume_step))
        return started[-1]

    yield start
    for one in started:
        one.end("KILLED", timeout=5.0)


def pretrain_job() -> PretrainJob:
    return PretrainJob(dataset="s3://b/photos", pretrain=PretrainSettings(loop=LoopSettings(steps=3, batch_size=32)))


def history(client: MlflowClient, run_id: str | None, metric: str) -> list[tuple[int, float]]:
    assert run_id is not None
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, metric))


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    return [file.path for file in client.list_artifacts(run_id, folder)]


# --- what MLflow is told -------------------------------------------------------------------------------------------


def test_mlflow_gets_the_whole_of_a_run(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient, tmp_path: Path
) -> None:
    page = tmp_path / "gallery"
    page.mkdir()
    (page / "index.html").write_text("<p>")
    running = start(run)
    witness = running.witness
    witness.settings(pretrain_job())
    witness.dataset("photos", "ab" * 32, "s3://b/photos")
    witness.tags({"stage": "solo"})
    witness.artifact(page, "reports")
    witness.artifact(page / "index.html")
    for step in range(0, 50, 10):
        running.journal.append(step, {"loss": 1 / (step + 1), "images_per_second": 40.0})
    delivery = running.end()
    assert (delivery.undelivered, delivery.reason) == (0, None)

    record = read_record(run.run_url)
    assert record is not None
    assert record.run_id == witness.run_id
    told = client.get_run(witness.run_id)
    assert told.info.status == "FINISHED"
    assert told.info.run_name == "solo"
    assert told.data.params["pretrain.loop.batch_size"] == "32"
    assert told.data.params["pretrain.optimizer.schedule"] == "cosine"
    assert told.data.tags["stage"] == "solo"
    assert told.data.tags["code_version"]
    assert history(client, witness.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(0, 50, 10)]
    assert "system/cpu_utilization_percentage" in told.data.metrics
    assert "system/process_memory_usage_megabytes" in told.data.metrics
    assert artifacts(client, told.info.run_id) == ["config.yaml", "index.html", "reports"]
    assert artifacts(client, told.info.run_id, "reports/gallery") == ["reports/gallery/index.html"]

    (dataset_input,) = told.inputs.dataset_inputs
    assert (dataset_input.dataset.name, dataset_input.dataset.source_type) == ("photos", "s3")
    assert dataset_input.dataset.digest == ("ab" * 32)[:36]
    assert {tag.key: tag.value for tag in dataset_input.tags} == {
        "mlflow.data.context": "training",
        "digest": "ab" * 32,
    }


def test_the_configuration_reads_back_equal(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient, tmp_path: Path
) -> None:
    running = start(run)
    running.witness.settings(pretrain_job())
    running.end()
    path = client.download_artifacts(str(running.witness.run_id), "config.yaml", str(tmp_path))
    assert load_config(PretrainJob, path) == pretrain_job()


def test_files_lie_in_the_storage_folder(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient, storage: str
) -> None:
    running = start(run)
    running.end()
    location = client.get_run(str(running.witness.run_id)).info.artifact_uri
    assert location.startswith(f"{storage}/mlartifacts/freesolo/")


def test_pictures_of_steps_come_from_bytes_and_pixels(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient, tmp_path: Path
) -> None:
    pixels = np.zeros((8, 10, 3), np.uint8)
    pixels[:, :5] = (255, 0, 10)
    png = BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    running = start(run)
    running.witness.picture("overlay/0", pixels, 100)
    running.witness.picture("overlay/0", png.getvalue(), 200)
    running.witness.picture("grey", pixels[..., 0], 100)
    assert running.end().reason is None
    names = [path for path in artifacts(client, str(running.witness.run_id), "images") if path.endswith(".png")]
    assert sorted(name.split("+timestamp")[0] for name in names) == [
        "images/grey+step+100",
        "images/overlay~0+step+100",
        "images/overlay~0+step+200",
    ]
    for name in names:
        with Image.open(client.download_artifacts(str(running.witness.run_id), name, str(tmp_path))) as image:
            expected = pixels[..., 0] if "grey" in name else pixels
            assert np.array_equal(np.asarray(image), expected)


def test_a_stage_is_the_child_of_its_pipeline_whichever_comes_first(
    start: Callable[..., Running], run: TrackedRun, server: TrackingServer, client: MlflowClient, storage: str
) -> None:
    parent_url = f"{storage}/runs/pipeline"
    child = start(TrackedRun(run.run_url, "solo", "freesolo", server, parent_run_url=parent_url))
    child.journal.append(0, {"loss": 1.0})
    parent = start(TrackedRun(parent_url, "pipeline", "freesolo", server))
    assert child.end().reason is None
    assert parent.end().reason is None
    tags = client.get_run(str(child.witness.run_id)).data.tags
    assert tags["mlflow.parentRunId"] == parent.witness.run_id


def test_not_a_number_and_infinity_reach_mlflow(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    running = start(run)
    running.journal.append(0, {"nan": math.nan, "inf": math.inf})
    assert running.end().reason is None
    assert math.isnan(client.get_run(str(running.witness.run_id)).data.metrics["nan"])


# --- resuming ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_opens_the_same_run_and_sends_no_step_twice(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    first = start(run)
    for step in range(5):
        first.journal.append(step, {"loss": float(step)})
    first.witness.picture("overlay", pixels, 2)
    first.journal.flush()
    assert first.end("FAILED").reason is None
    assert client.get_run(str(first.witness.run_id)).info.status == "FAILED"

    second = start(run, resume_step=2)  # the last checkpoint was before step 2
    for step in range(2, 8):
        second.journal.append(step, {"loss": float(step), "new": 1.0})
    second.witness.picture("overlay", pixels, 2)
    second.witness.picture("overlay", pixels, 6)
    deadline = time.monotonic() + 30.0
    while client.get_run(str(first.witness.run_id)).info.status != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert second.end().reason is None

    assert second.witness.run_id == first.witness.run_id
    assert history(client, second.witness.run_id, "loss") == [(step, float(step)) for step in range(8)]
    assert [step for step, _ in history(client, second.witness.run_id, "new")] == list(range(2, 8))
    pictures = [name for name in artifacts(client, str(second.witness.run_id), "images") if name.endswith(".png")]
    assert [name.split("+")[2] for name in pictures] == ["2", "6"]
    assert client.get_run(str(second.witness.run_id)).info.status == "FINISHED"
    assert len(client.search_runs([client.get_experiment_by_name("freesolo").experiment_id])) == 1


def test_a_run_whose_id_was_lost_is_found_by_its_token(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    first = start(run)
    first.end()
    record = Path(run.run_url) / RECORD_NAME
    record.write_text(record.read_text().replace(f'"{first.witness.run_id}"', "null"))
    second = start(run)
    second.end()
    assert second.witness.run_id == first.witness.run_id


def test_a_run_that_was_deleted_is_made_anew(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    first = start(run)
    first.end()
    client.delete_run(str(first.witness.run_id))
    second = start(run, resume_step=0)
    second.journal.append(0, {"loss": 1.0})
    assert second.end().reason is None
    assert second.witness.run_id != first.witness.run_id
    assert history(client, second.witness.run_id, "loss") == [(0, 1.0)]


def test_a_run_whose_folder_was_deleted_is_another_run(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    first = start(run)
    first.journal.append(0, {"loss": 1.0})
    first.end()
    shutil.rmtree(run.run_url)
    second = start(run)
    second.journal.append(0, {"loss": 2.0})
    second.end()
    assert second.witness.run_id != first.witness.run_id
    assert history(client, second.witness.run_id, "loss") == [(0, 2.0)]


def test_another_server_gets_all_of_a_resumed_run(
    start: Callable[..., Running], run: TrackedRun, empty_database: Path, tmp_path: Path
) -> None:
    first = start(run)
    first.journal.append(0, {"loss": 1.0})
    first.end()
    shutil.copyfile(empty_database, tmp_path / "other.db")
    other = TrackingServer(f"sqlite:///{tmp_path}/other.db", str(tmp_path / "files"))
    second = start(TrackedRun(run.run_url, run.name, run.experiment, other), resume_step=1)
    second.journal.append(1, {"loss": 2.0})
    assert second.end().reason is None
    assert history(MlflowClient(other.uri), second.witness.run_id, "loss") == [(0, 1.0), (1, 2.0)]


def test_a_parameter_that_a_resumed_run_changes_is_reported_and_the_others_arrive(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    first = start(run)
    first.witness.params({"steps": 10, "seed": 0})
    first.end()
    second = start(run)
    second.witness.params({"steps": 20, "seed": 0, "extra": "yes"})
    delivery = second.end()
    assert delivery.undelivered == 1
    assert "MLflow keeps the first value of steps" in str(delivery.reason)
    params = client.get_run(str(second.witness.run_id)).data.params
    assert params == {"steps": "10", "seed": "0", "extra": "yes"}


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_names_that_mlflow_refuses_are_respelled(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    """A label set may have any name, and so its settings and metrics. A resumed run sends nothing twice."""
    name = "labels.Free Mask (R50, 800 px)"
    for step in range(2):
        running = start(run)
        running.witness.params({name: "s3://b/labels"})
        running.witness.tags({name: "yes"})
        running.journal.append(step, {name: 1.0})
        delivery = running.end()
        assert (delivery.undelivered, delivery.reason) == (0, None)
    spelled = "labels.Free Mask _R50_ 800 px_"
    told = client.get_run(str(running.witness.run_id)).data
    assert told.params[spelled] == "s3://b/labels"
    assert told.tags[spelled] == "yes"
    assert history(client, running.witness.run_id, spelled) == [(0, 1.0), (1, 1.0)]


def test_names_that_would_be_odd_paths_or_are_too_long(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    """A category may have any name."""
    names = {"a/": "a/_", "/b": "_/b", "c//d": "c/_/d", "../e": "__/e", "f/./g": "f/_/g", "x" * 300: "x" * 250}
    running = start(run)
    running.journal.append(0, {"loss": 1.0, **dict.fromkeys(names, 2.0)})
    running.witness.params(dict.fromkeys(names, "3"))
    assert running.end().reason is None
    told = client.get_run(str(running.witness.run_id)).data
    assert {told.metrics[spelled] for spelled in names.values()} == {2.0}
    assert {told.params[spelled] for spelled in names.values()} == {"3"}
    assert told.metrics["loss"] == 1.0


def test_a_metric_that_mlflow_refuses_costs_no_other(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    # Of a machine whose clock was before 1970.
    Path(run.run_url).mkdir(parents=True)
    lines = [
        '{"step": 0, "time_ms": 5, "metrics": {"loss": 1.0}}',
        '{"step": 1, "time_ms": -5, "metrics": {"loss": 2.0}}',
    ]
    Path(run.run_url, "metrics.jsonl").write_text("\n".join([*lines, ""]))
    running = start(run, resume_step=2)
    running.journal.append(2, {"loss": 3.0})
    delivery = running.end()
    assert delivery.undelivered == 1
    assert delivery.reason
    assert history(client, running.witness.run_id, "loss") == [(0, 1.0), (2, 3.0)]


def test_bytes_that_are_no_picture_are_reported(start: Callable[..., Running], run: TrackedRun) -> None:
    running = start(run)
    running.witness.picture("overlay", b"not a picture", 0)
    delivery = running.end()
    assert delivery.undelivered == 1
    assert "a picture's bytes are not an image" in str(delivery.reason)


def test_a_server_that_is_away_is_reported_and_told_later(
    start: Callable[..., Running], run: TrackedRun, client: MlflowClient
) -> None:
    # The database's place is taken by a folder: nothing can open it.
    database = Path(run.run_url).parents[1] / "mlflow.db"
    hidden = database.rename(database.with_suffix(".hidden"))
    database.mkdir()
    running = start(run)
    running.journal.append(0, {"loss": 1.0})
    running.witness.text("note.txt", "hello")
    delivery = running.end(timeout=2.0)
    assert delivery.sent == 0
    assert delivery.undelivered >= 3  # the entry, the text, the code's version, a sample of the machine
    assert "mlflow.db" in str(delivery.reason)
    assert running.witness.run_id is None

    database.rmdir()
    hidden.rename(database)
    later = deliver_later(run.run_url)
    assert (later.undelivered, later.reason) == (0, None)
    assert later.sent == delivery.undelivered
    record = read_record(run.run_url)
    assert record is not None
    assert history(client, record.run_id, "loss") == [(0, 1.0)]
    told = client.get_run(str(record.run_id))
    assert told.info.status == "FINISHED"
    assert artifacts(client, str(record.run_id)) == ["note.txt"]
    assert deliver_later(run.run_url).undelivered == 0
    assert history(client, record.run_id, "loss") == [(0, 1.0)]


def test_a_run_under_way_is_not_delivered_for_it(start: Callable[..., Running], run: TrackedRun) -> None:
    running = start(run)
    running.journal.append(0, {"loss": 1.0})
    with held(f"{run.run_url}/.lease"), pytest.raises(LeaseError, match="is at work on this"):
        deliver_later(run.run_url)
    assert running.end().reason is None


def test_what_is_delivered_stays_as_the_run_wrote_it(
    start: Callable[..., Running], run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job that follows may write while a delivery ends."""
    running = start(run)
    running.journal.append(0, {"loss": 1.0})
    running.end()
    written = Path(run.run_url, "metrics.jsonl")
    later = written.read_text() + '{"step": 1, "time_ms": 5, "metrics": {"loss": 0.5}}\n'
    close = Courier.close

    def close_late(self: Courier, *arguments: Any) -> Delivery:
        delivery = close(self, *arguments)
        written.write_text(later)
        return delivery

    monkeypatch.setattr(Courier, "close", close_late)
    deliver_later(run.run_url)
    assert written.read_text() == later


def test_deliver_sends_a_run_and_its_stages_what_they_missed(
    start: Callable[..., Running],
    run: TrackedRun,
    server: TrackingServer,
    client: MlflowClient,
    capsys: pytest.CaptureFixture[str],
) -> None:
    database = Path(run.run_url).parents[1] / "mlflow.db"
    hidden = database.rename(database.with_suffix(".hidden"))
    database.mkdir()
    # The stage's name comes before the run's: it can only be delivered when the run has been.
    whole = TrackedRun(f"{run.run_url}/pipeline", "nightly", "freesolo", server)
    stage = TrackedRun(f"{run.run_url}/free-masks", "free-masks", "freesolo", server, whole.run_url)
    for tracked in (whole, stage):
        running = start(tracked)
        running.journal.append(0, {"images": 7.0})
        assert running.end(timeout=0.5).sent == 0
        Path(tracked.run_url, "settings.json").write_text("{}")
    assert main(["deliver", run.run_url, "--timeout", "0.5"]) == 1
    assert "not delivered" in capsys.readouterr().out

    database.rmdir()
    hidden.rename(database)
    assert main(["deliver", run.run_url]) == 0
    parent, child = (read_record(tracked.run_url) for tracked in (whole, stage))
    assert parent is not None
    assert child is not None
    assert history(client, child.run_id, "images") == [(0, 7.0)]
    assert client.get_run(str(child.run_id)).data.tags["mlflow.parentRunId"] == parent.run_id
    assert capsys.readouterr().out.count("records delivered") == 2


def test_deliver_names_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deliver", str(tmp_path)]) == 2
    assert "not a run that MLflow was told of" in capsys.readouterr().err


def test_a_full_disk_does_not_stop_the_run(
    start: Callable[..., Running], run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(run)

    def no_space(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("freesolo.tracking.spool.Spool.put", no_space)
        running.witness.text("note.txt", "hello")
    delivery = running.end()
    assert "text could not be kept to be sent: [Errno 28] No space left on device" in str(delivery.reason)


def test_without_a_server_the_run_keeps_its_journal(start: Callable[..., Running], storage: str) -> None:
    server = resolve_server(TrackingSettings(uri="off"), storage)
    assert server is None
    running = start(TrackedRun(f"{storage}/runs/quiet", "quiet", "freesolo", server))
    running.witness.settings(pretrain_job())
    running.witness.picture("overlay", np.zeros((4, 4, 3), np.uint8), 0)
    running.journal.append(0, {"loss": 1.0})
    delivery = running.end()
    assert (delivery.sent, delivery.undelivered, delivery.reason) == (0, 0, None)
    assert running.witness.run_id is None
    assert [file.name for file in Path(f"{storage}/runs/quiet").iterdir()] == ["metrics.jsonl"]
    with pytest.raises(UsageError, match="never to be sent"):
        deliver_later(f"{storage}/runs/quiet")


def test_a_broken_record_is_named(start: Callable[..., Running], run: TrackedRun) -> None:
    start(run).end()
    (Path(run.run_url) / RECORD_NAME).write_text("{}")
    with pytest.raises(JobError, match=r"mlflow_run\.json: not a record"):
        Witness(run, Journal(run.run_url))


def test_nothing_is_left_on_the_machine(start: Callable[..., Running], run: TrackedRun, tmp_path: Path) -> None:
    running = start(run)
    running.journal.append(0, {"loss": 1.0})
    running.witness.picture("overlay", np.zeros((4, 4, 3), np.uint8), 0)
    assert running.end().reason is None
    assert list((tmp_path / "tmp").glob("*/*")) == []  # neither the spool nor the journal


# --- where the server is -------------------------------------------------------------------------------------------


def test_local_storage_needs_no_server(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TrackingServer(f"sqlite:///{storage}/mlflow.db", f"{storage}/mlartifacts")
    assert resolve_server(TrackingSettings(), storage) == expected
    assert resolve_server(TrackingSettings(), f"file://{storage}") == expected
    monkeypatch.chdir(Path(storage).parent)
    assert resolve_server(TrackingSettings(), "storage") == expected


def test_settings_go_before_the_environment(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-the-environment:5000")
    assert resolve_server(TrackingSettings(), storage) == TrackingServer("http://from-the-environment:5000")
    assert resolve_server(TrackingSettings(uri="http://mlflow:5000"), "s3://bucket/x") == TrackingServer(
        "http://mlflow:5000"
    )
    assert resolve_server(TrackingSettings(uri="off"), storage) is None


def test_a_database_keeps_files_in_the_storage() -> None:
    server = resolve_server(TrackingSettings(uri="postgresql://db/mlflow"), "s3://bucket/x")
    assert server == TrackingServer("postgresql://db/mlflow", "s3://bucket/x/mlartifacts")


def test_remote_storage_without_a_server_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match=r"memory://x .*set tracking\.uri or MLFLOW_TRACKING_URI .*tracking\.uri=off"):
        resolve_server(TrackingSettings(), "memory://x")


@pytest.mark.parametrize("uri", ["mlruns", "/var/mlruns", "file:///var/mlruns"])
def test_a_folder_is_no_server(storage: str, uri: str) -> None:
    with pytest.raises(UsageError, match=r"does not keep runs in folders.*sqlite:///"):
        resolve_server(TrackingSettings(uri=uri), storage)


def test_a_run_can_be_sent_to_a_worker(run: TrackedRun) -> None:
    assert pickle.loads(pickle.dumps(run)) == run


# --- limits --------------------------------------------------------------------------------------------------------


def test_limits_hold_in_the_block_and_the_users_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with request_limits(seconds=3, retries=0):
        with request_limits(seconds=9, retries=4):
            assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_explanations_are_the_deepest_clear_words() -> None:
    refused = ConnectionRefusedError(111, "Connection refused")
    wrapped = RuntimeError("API request to http://x failed with HTTPConnectionPool(...)")
    wrapped.__context__ = refused
    assert explain("http://x", wrapped) == "http://x does not answer ([Errno 111] Connection refused)"
    assert explain("http://x", ValueError("a\n  b")) == "http://x: a b"
    denied = RuntimeError("cannot write")
    denied.__context__ = PermissionError(13, "Permission denied", "/store")
    assert explain("sqlite:///x", denied) == "sqlite:///x: cannot write"
