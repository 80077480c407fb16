"""A job submitted to a Ray cluster that was started by `ray start --head`, as README says."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest
from freesolo.models.model_file import load_model
from freesolo.tracking.journal import read_journal
from tests.small import small_solo

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
pytestmark = pytest.mark.timeout(900)


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.fixture
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """A head node of its own; its dashboard's address and the environment to submit from."""
    port, dashboard_port, client_port, agent_port = free_ports(4)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # sockets need short names
        command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}"]
        command += [f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=4", f"--temp-dir={folder}", "--include-dashboard=true"]
        with Path(folder, "head.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            address = f"http://127.0.0.1:{dashboard_port}"
            try:
                _wait_for(f"{address}/api/version", process)
                yield address, environment
            finally:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the head node: this process and those that it started, no others."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start failed"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")


def test_a_submitted_job_trains(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = head
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
                    "loop": {"steps": 2, "batch_size": 4, "log_every": 1},
                },
            }
        )
    )
    job = [sys.executable, "jobs/train_solo.py", "--config", str(config), "--run-name", "submitted"]
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *job]
    command += ["--storage", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    stage = tmp_path / "runs" / "submitted" / "solo"
    assert json.loads((stage / "result.json").read_text())["counts"] == {"images": 8, "steps": 2}
    model = load_model(stage / "model.pt", "segmenter")
    assert model.lineage["dataset_digest"] == read_dataset_manifest(str(tmp_path / "data")).digest
    assert [entry.step for entry in read_journal(str(stage))] == [1, 2]
