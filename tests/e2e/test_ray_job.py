"""A job submitted to a Ray cluster that was started by `ray start --head`, as README says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest
from freesolo.models.model_file import load_model
from freesolo.tracking.journal import read_journal
from tests.servers import RayHead
from tests.small import small_solo

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
STEPS = 100
pytestmark = [pytest.mark.trainings, pytest.mark.timeout(900)]


@pytest.fixture
def head() -> Iterator[RayHead]:
    """A head node of its own."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # sockets need short names
        server = RayHead(Path(folder), num_cpus=4)
        try:
            server.start()
            yield server
        finally:
            server.kill()


class Submitted:
    """`ray job` on a head node, with the environment of a person who uses it."""

    def __init__(self, head: RayHead) -> None:
        self._address = head.url
        self._environment = {**os.environ, **head.settings()}

    def submit(self, *job: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """`ray job submit`; waits for the job unless told otherwise."""
        return self._job("submit", "--working-dir", ".", *options, "--", sys.executable, *job)

    def stop(self, submission: str) -> str:
        """What `ray job stop` does, without its start; returns when the job has stopped, with its logs."""
        client = JobSubmissionClient(self._address)
        assert client.stop_job(submission)
        deadline = time.monotonic() + 100
        while not client.get_job_status(submission).is_terminal():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return client.get_job_logs(submission)

    def status(self, submission: str) -> str:
        """How a job is."""
        return JobSubmissionClient(self._address).get_job_status(submission).value

    def _job(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", verb, "--address", self._address, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=400, check=False
        )


def test_a_submitted_job_trains_stops_when_told_and_goes_on(head: RayHead, tmp_path: Path) -> None:
    annotations = compose_scenes(str(tmp_path / "scenes"), 8, size=96, seed=0)
    pack(annotations, str(tmp_path / "data"))
    config = tmp_path / "train.yaml"
    config.write_text(
        json.dumps(
            {
                "dataset": str(tmp_path / "data"),
                "tracking": {"uri": "off"},
                "train": {
                    "supervision": "masks",
                    "model": small_solo().model_dump(mode="json"),
                    "views": {"short_sides": [64], "strong": False},
                    "optimizer": {"learning_rate": 0.01},
                    "loop": {
                        "steps": STEPS,
                        "batch_size": 4,
                        "log_every": 1,
                        "checkpoint_every": 5,
                        "record_samples": True,
                    },
                },
            }
        )
    )
    jobs, stage = Submitted(head), tmp_path / "runs" / "submitted" / "solo"
    job = [
        "jobs/train_solo.py",
        "--config",
        str(config),
        "--run-name",
        "submitted",
        "--storage",
        str(tmp_path / "runs"),
    ]

    begun = jobs.submit(*job, options=["--no-wait", "--submission-id", "first"])
    assert begun.returncode == 0, begun.stderr
    wait_for_steps(stage, 3, jobs, "first")
    logs = jobs.stop("first")

    stopped = re.search(rf"error: stopped at step (\d+) of {STEPS}, as asked; run the same again to go on", logs)
    assert stopped, logs
    assert re.search(r"solo: .*steps", logs), logs  # progress that a log can hold
    assert "Reporting training result" not in logs
    assert "Warning" not in logs
    saved = max(stage.glob("checkpoints/step-*"))
    assert int(saved.name.removeprefix("step-")) == int(stopped.group(1)) < STEPS
    assert jobs.status("first") == "STOPPED"

    done = jobs.submit(*job)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert json.loads((stage / "result.json").read_text())["counts"] == {"images": 8, "steps": STEPS}
    model = load_model(stage / "model.pt", "segmenter")
    assert model.lineage["dataset_digest"] == read_dataset_manifest(str(tmp_path / "data")).digest
    assert [entry.step for entry in read_journal(str(stage))] == list(range(1, STEPS + 1))
    # Nothing was done twice: the second job began where the first stopped.
    used = [used for path in stage.glob("samples/*.json") for used in json.loads(path.read_text())]
    assert sorted(step for step, _ in used) == list(range(STEPS))


def wait_for_steps(stage: Path, steps: int, jobs: Submitted, submission: str) -> None:
    """Wait until a job has done some steps."""
    deadline = time.monotonic() + 300
    while len(read_journal(str(stage))) < steps:
        assert time.monotonic() < deadline, jobs.status(submission)
        time.sleep(0.2)
