"""A checkpoint on its way to the store, while training goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from ray.train import Checkpoint

from freesolo.errors import JobError, UsageError
from freesolo.provenance import code_version, git_commit
from freesolo.settings import Settings
from freesolo.train.best import BestCheckpoint
from freesolo.train.checkpoint import Snapshot, save_checkpoint


class CheckpointUpload:
    """Writes a snapshot to a disk and uploads it: Ray calls it in a thread of its own, one after the other.

    Args:
        snapshot: What to write.
        settings: The resolved configuration.
        best: Is offered the checkpoint.
        loss: How good it is; None: nothing was learned since the one before.
        store: Copies a folder's checkpoint to where Ray keeps those of this name, and gives the copy.

    Attributes:
        written: Set when the snapshot is let go of: it is on the disk, or could not be written.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        settings: Settings,
        best: BestCheckpoint,
        loss: float | None,
        store: Callable[[Checkpoint, str], Checkpoint],
    ) -> None:
        self._snapshot: Snapshot | None = snapshot
        self._settings = settings
        self._best = best
        self._loss = loss
        self._store = store
        self.written = threading.Event()

    def __call__(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """Write and upload it; called again, which Ray does where the store failed, upload what was written.

        Args:
            checkpoint: A folder of this machine, empty.
            name: What the checkpoint is called.

        Returns:
            The checkpoint in the store.

        Raises:
            RuntimeError: It could not be written.
            OSError: It could not be uploaded.
        """
        folder = Path(checkpoint.path)
        if self._snapshot is not None:
            self._write(self._snapshot, folder)
        stored = self._store(checkpoint, name)
        if self._loss is not None:
            self._best.offer(folder, name, self._loss)
        return stored

    def _write(self, snapshot: Snapshot, folder: Path) -> None:
        self._snapshot = None
        try:
            save_checkpoint(folder, snapshot, self._settings, git_commit() or code_version())
        except (UsageError, JobError) as error:
            shutil.rmtree(folder)  # perhaps it was this disk that was full
            raise RuntimeError(f"step {snapshot.progress.step} could not be saved: {error}") from error
        finally:
            self.written.set()
