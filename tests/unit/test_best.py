"""The best checkpoint stays, whatever comes later and whoever comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freesolo.data.files import list_files, read_bytes
from freesolo.train.best import BestCheckpoint


@pytest.fixture(params=["local", "s3"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A stage's folder."""
    return str(tmp_path / "stage") if request.param == "local" else f"{request.getfixturevalue('bucket')}/stage"


def saved(folder: Path, name: str) -> Path:
    """A checkpoint's files."""
    checkpoint = folder / name
    checkpoint.mkdir()
    (checkpoint / "learner.pt").write_text(f"weights of {name}")
    return checkpoint


def test_the_lowest_loss_stays(stage: str, tmp_path: Path) -> None:
    best = BestCheckpoint(stage)
    for name, loss in (("step-1", 3.0), ("step-2", 1.5), ("step-3", 2.0)):
        folder = saved(tmp_path, name)
        best.offer(folder, name, loss)
        (folder / "learner.pt").unlink()  # as Ray does afterwards
    assert list_files(stage) == ["best.json", "best/step-2/learner.pt"]
    assert json.loads(read_bytes(f"{stage}/best.json")) == {"checkpoint": "best/step-2", "loss": 1.5}
    assert read_bytes(f"{stage}/best/step-2/learner.pt") == b"weights of step-2"


def test_a_run_that_goes_on_knows_how_good_it_was(stage: str, tmp_path: Path) -> None:
    for name, loss in (("step-1", 1.0), ("step-2", 1.1), ("step-3", 0.9)):
        best = BestCheckpoint(stage)
        best.offer(saved(tmp_path, name), name, loss)
    assert list_files(stage) == ["best.json", "best/step-3/learner.pt"]


def test_what_cannot_be_uploaded_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = BestCheckpoint(str(tmp_path / "stage"))
    (tmp_path / "stage").write_text("a file where the folder should be")
    best.offer(saved(tmp_path, "step-1"), "step-1", 1.0)
    assert "the best checkpoint was not kept" in caplog.text
