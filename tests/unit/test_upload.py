"""A checkpoint that cannot be written is told of, and lets go of memory and disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ray.train import Checkpoint

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
    upload = CheckpointUpload(snapshot, PackJob(photos="p", dataset="d"), BestCheckpoint(str(tmp_path)), None)
    with pytest.raises(RuntimeError, match=r"^step 3 could not be saved: .*the disk is full"):
        upload(Checkpoint.from_directory(folder), "step-00000003")
    assert upload.written.is_set(), "training does not wait for it"
    assert not folder.exists()
