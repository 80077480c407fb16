"""MLflow on PostgreSQL, with artifacts in S3, goes away while SOLO trains: before, in the middle, at the end."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from freesolo.config import TrainJob
from freesolo.config_file import parse_config
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.errors import JobError
from freesolo.jobs import train_stage
from freesolo.stages import StageFolder
from freesolo.tracking.journal import read_journal
from freesolo.tracking.record import read_record
from freesolo.tracking.witness import deliver_later
from tests.chaos.cluster import wait_for
from tests.chaos.record import Row, record
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN
from tests.servers import MlflowServer, PostgresServer, S3Server
from tests.small import small_solo

STEPS = 60
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PostgresServer.installed(), reason="needs Debian's postgresql, and root"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning:mlflow.utils.warnings_utils"),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]


@dataclass(frozen=True)
class Tracking:
    """An MLflow server and its database."""

    server: MlflowServer
    database: PostgresServer


@pytest.fixture
def tracking(s3_server: S3Server, bucket: str) -> Iterator[Tracking]:
    with ExitStack() as stack:
        # Not pytest's, which nobody else may enter: PostgreSQL's user must.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tracking")))
        folder.chmod(0o755)
        (folder / "database").mkdir()
        (folder / "server").mkdir()
        database = PostgresServer(folder / "database")
        server = MlflowServer(
            folder / "server", backend=database.url, artifacts=f"{bucket}/artifacts", environment=s3_server.environment
        )
        stack.callback(database.kill)
        stack.callback(server.kill)
        database.start()
        server.start()
        yield Tracking(server, database)


@pytest.fixture
def job(tracking: Tracking, tmp_path: Path) -> TrainJob:
    pack(compose_scenes(str(tmp_path / "scenes"), 8, size=96, seed=0), str(tmp_path / "data"))
    raw = {
        "dataset": str(tmp_path / "data"),
        "tracking": {"uri": tracking.server.url, "registered_model": "solo"},
        "train": {
            "model": small_solo().model_dump(mode="json"),
            "supervision": "masks",
            "views": {"short_sides": [64], "strong": False},
            "optimizer": {"learning_rate": 0.01},
            "loop": {"steps": STEPS, "batch_size": 4, "log_every": 1, "checkpoint_every": 5},
        },
    }
    return parse_config(TrainJob, raw, source="test")


def at_step(folder: StageFolder, step: int, act: Callable[[], object]) -> threading.Thread:
    """Do something when a training has got so far."""

    def wait_and_act() -> None:
        wait_for(lambda: len(read_journal(folder.url)) >= step, what=f"step {step}")
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def told(tracking: Tracking, folder: StageFolder) -> list[int]:
    """The steps that MLflow knows of."""
    known = read_record(folder.url)
    assert known is not None
    assert known.run_id is not None
    history = MlflowClient(tracking.server.url).get_metric_history(known.run_id, "loss")
    return sorted(point.step for point in history)


@pytest.mark.parametrize("when", ["at the start", "at the end"])
def test_mlflow_is_down(
    when: str, tracking: Tracking, job: TrainJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training is done; the registry's step fails clearly, and is done by the same job again."""
    folder = StageFolder(str(tmp_path / "runs"), "down", "solo")
    caplog.set_level(logging.WARNING)
    if when == "at the start":
        tracking.server.kill()
    else:
        at_step(folder, STEPS - 5, tracking.server.kill)
    with pytest.raises(JobError) as failed:
        train_stage(job, folder)
    assert tracking.server.url in str(failed.value)
    assert (Path(folder.url) / "model.pt").exists()
    assert len(read_journal(folder.url)) == STEPS
    assert f"freesolo deliver {folder.run_url}" in caplog.text

    tracking.server.start()
    back = time.monotonic()
    again = train_stage(job, folder)
    assert again.outputs["registered"] == "models:/solo/1"
    delivery = deliver_later(folder.url)
    assert delivery.undelivered == 0
    assert told(tracking, folder) == list(range(1, STEPS + 1))
    seconds = time.monotonic() - back
    record(
        "tracking", Row(f"MLflow down {when}", "train_solo", "trained; registered by the same again", 0, "", seconds, 1)
    )


@pytest.mark.parametrize("what", ["MLflow", "PostgreSQL"])
def test_it_is_restarted_in_the_middle(what: str, tracking: Tracking, job: TrainJob, tmp_path: Path) -> None:
    folder = StageFolder(str(tmp_path / "runs"), "restarted", "solo")
    server = {"MLflow": tracking.server, "PostgreSQL": tracking.database}[what]
    times: list[float] = []

    def restart() -> None:
        server.kill()
        time.sleep(5)
        server.start()
        times.append(time.monotonic())

    restarting = at_step(folder, 10, restart)
    result = train_stage(job, folder)
    restarting.join()
    seconds = time.monotonic() - times[0]
    assert result.outputs["registered"] == "models:/solo/1"
    delivery = deliver_later(folder.url)
    assert delivery.undelivered == 0
    assert told(tracking, folder) == list(range(1, STEPS + 1))
    record("tracking", Row(f"{what} restarted", "train_solo", "all metrics delivered", 0, "", seconds, 1))
