"""A job submitted to a Ray cluster that was started by `ray start --head`, as README says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest
from freesolo.models.model_file import load_model
from freesolo.tracking.journal import read_journal
from tests.servers import RayHead
from tests.small import small_solo

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
pytestmark = pytest.mark.timeout(900)


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


def test_a_submitted_job_trains(head: RayHead, tmp_path: Path) -> None:
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
    command = [RAY, "job", "submit", "--address", head.url, "--working-dir", ".", "--", *job]
    command += ["--storage", str(tmp_path / "runs")]
    environment = {**os.environ, **head.settings()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    stage = tmp_path / "runs" / "submitted" / "solo"
    assert json.loads((stage / "result.json").read_text())["counts"] == {"images": 8, "steps": 2}
    model = load_model(stage / "model.pt", "segmenter")
    assert model.lineage["dataset_digest"] == read_dataset_manifest(str(tmp_path / "data")).digest
    assert [entry.step for entry in read_journal(str(stage))] == [1, 2]
