"""A checkpoint's way to the store: what cannot be written is told of, and what was written is not written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ray.train import Checkpoint
from ray.train.v2._internal.execution.storage import StorageContext

from freesolo.config import PackJob
from freesolo.train.best import BestCheckpoint
from freesolo.train.checkpoint import Snapshot
from freesolo.train.loop import Progress
from freesolo.train.upload import CheckpointUpload


def test_what_cannot_be_written_is_told_and_let_go_of(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "learner.pt").symlink_to("/dev/full")
    snapshot = Snapshot({"weights": torch.zeros(100_000)}, Progress(3))
    store = StorageContext(tmp_path / "runs", "stage").persist_current_checkpoint
    upload = CheckpointUpload(snapshot, PackJob(photos="p", dataset="d"), BestCheckpoint(str(tmp_path)), None, store)
    with pytest.raises(RuntimeError, match=r"^step 3 could not be saved: .*the disk is full"):
        upload(Checkpoint.from_directory(folder), "step-00000003")
    assert upload.written.is_set(), "training does not wait for it"
    assert not folder.exists()


def test_a_second_try_uploads_what_the_first_has_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weights = torch.arange(1000.0)
    storage = StorageContext(tmp_path / "runs", "stage")
    stage = Path(storage.experiment_fs_path)
    best = BestCheckpoint(str(stage))
    upload = CheckpointUpload(
        Snapshot({"weights": weights}, Progress(3)),
        PackJob(photos="p", dataset="d"),
        best,
        0.5,
        storage.persist_current_checkpoint,
    )
    in_the_way = stage / "step-00000003"
    in_the_way.write_bytes(b"")
    with pytest.raises(OSError, match="step-00000003"):
        upload(Checkpoint.from_directory(folder), "step-00000003")
    assert upload.written.is_set(), "training goes on while the store is tried again"
    assert not (stage / "best.json").exists(), "none is the best that is not in the store"
    first = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}

    in_the_way.unlink()
    stored = upload(Checkpoint.from_directory(folder), "step-00000003")
    assert Path(stored.path) == in_the_way
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()} == first
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {file.name: file.read_bytes() for file in in_the_way.iterdir()} == files
    assert torch.equal(torch.load(in_the_way / "learner.pt", weights_only=True)["weights"], weights)
    assert json.loads((stage / "best.json").read_text()) == {"checkpoint": "best/step-00000003", "loss": 0.5}
    assert {file.name: file.read_bytes() for file in (stage / "best" / "step-00000003").iterdir()} == files
