"""What is kept of a training while it runs: metrics and pictures by worker 0, checkpoints by all together."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero

from freesolo.data.files import join, write_atomic
from freesolo.errors import JobError, StoppedError, UsageError
from freesolo.ops.collectives import from_all_workers, rank
from freesolo.tracking.journal import Journal
from freesolo.tracking.witness import Witness
from freesolo.train.best import BestCheckpoint
from freesolo.train.checkpoint import take_snapshot
from freesolo.train.loop import Progress
from freesolo.train.plan import Training, TrainingPlan
from freesolo.train.upload import CheckpointUpload

_LOG = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 2.0


class RunRecorder:
    """A worker's `Recorder` for the loop, to be left with the error that the training ended with.

    Args:
        plan: What is trained.
        training: The same, built.
        start: Where it goes on from.
        taken: Names of checkpoints that may not be reported again.
        board: A `StepBoard`: the driver's, which shows steps and says when to stop.

    Attributes:
        last_metrics: Of each the value that was told last, before this start of the training too.
        undelivered: What MLflow was not told, and why.
    """

    def __init__(
        self, plan: TrainingPlan, training: Training, start: Progress, taken: frozenset[str], board: Any
    ) -> None:
        self._plan = plan
        self._taken = taken
        self._training = training
        self._samples: list[tuple[int, tuple[int, ...]]] = []
        self._board = board
        self.last_metrics: dict[str, float] = {}
        self.undelivered: str | None = None
        self._leads = rank() == 0
        self._looked = time.monotonic()
        self._saved_for: set[str] = set()
        self._losses: list[float] = []
        self._upload: CheckpointUpload | None = None
        if self._leads:
            self._stop_wanted = board.stop_wanted.remote()
            self._best = BestCheckpoint(plan.folder.url)
            self._journal = Journal(plan.folder.url, resume_step=start.step + 1)
            for entry in self._journal.read(max_entries=len(self._journal))[0]:
                self.last_metrics |= entry.metrics
            self._witness = Witness(plan.tracked, self._journal)
            self._witness.settings(plan.job)
            stream = training.stream
            self._witness.dataset(stream.dataset_url, stream.manifest.digest, stream.dataset_url)
            board.begin.remote(start.step)

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not self._leads:
            return
        try:
            self._close(_status(error))
        except (UsageError, JobError) as another:
            # What this worker alone met must not take the place of what all of them know.
            if error is None:
                raise
            _LOG.warning("%s", another)

    def _close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        self._journal.flush()
        delivery = self._witness.close(status)
        self._journal.close()
        self.undelivered = str(delivery) if delivery.reason is not None else None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.last_metrics |= values
        if self._leads:
            self._losses.append(values["loss"])
            self._journal.append(step, values)
            self._board.tell.remote(step)

    def samples(self, step: int, image_ids: tuple[int, ...]) -> None:
        if self._plan.loop.record_samples:
            self._samples.append((step, image_ids))

    def look(self, step: int, inputs: Any) -> None:
        if self._leads and self._training.look is not None:
            look = self._training.look(self._training.learner, inputs)
            self._journal.append(step, look.metrics)
            self.last_metrics |= look.metrics
            for name, picture in look.pictures.items():
                self._witness.picture(name, picture, step)

    def calls(self) -> bool:
        """Worker 0 calls all to look up when the driver wants to stop, and every few seconds to see who must go."""
        if not self._leads:
            return False
        return self._stops() or time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS

    def decide(self) -> Literal["go on", "save", "stop"]:
        """Stop if the driver wants to; save if a node is about to be taken away, which a notice says once."""
        self._looked = time.monotonic()
        if broadcast_from_rank_zero(self._leads and self._stops()):
            return "stop"
        notice = ray.train.get_preemption_info()
        if notice is None or self._saved_for.issuperset(notice.preempted_node_ids):
            return "go on"
        self._saved_for.update(notice.preempted_node_ids)
        return "save"

    def _stops(self) -> bool:
        (told, _) = ray.wait([self._stop_wanted], timeout=0)
        if not told:
            return False
        with suppress(RayError):  # a board that was lost with its node tells nothing
            ray.get(self._stop_wanted)
            return True
        return False

    def checkpoint(self, progress: Progress) -> None:
        """Save the model too at the last step: what comes after training needs no checkpoint.

        Raises:
            RuntimeError: The store failed for too long, or a disk is full. Worker 0 meets that alone, while the others
                wait for it: so it is no result, but a failure, after which Ray starts all of them again.
        """
        try:
            self._checkpoint(progress)
        except (UsageError, JobError, OSError) as error:
            raise RuntimeError(f"step {progress.step} could not be saved: {error}") from error

    def _checkpoint(self, progress: Progress) -> None:
        name = f"step-{progress.step:08d}"
        if self._plan.loop.record_samples:
            used = from_all_workers(self._samples)
            self._samples = []
            if self._leads:
                # Named by the step, so that what is done again after a loss replaces what was done before it.
                write_atomic(join(self._plan.folder.url, "samples", f"{name}.json"), json.dumps(used).encode())
        while name in self._taken:
            name += "-again"
        if not self._leads:
            ray.train.report({}, checkpoint=None, checkpoint_dir_name=name)
            return
        self._journal.flush()
        if progress.step == self._plan.loop.steps:
            with tempfile.NamedTemporaryFile() as file:
                self._training.save_model(self._training.learner, Path(file.name))
                write_atomic(self._plan.model_url, Path(file.name).read_bytes())
        # Written and uploaded while training goes on. Ray knows of a checkpoint when all of it is there, and goes on
        # from no other. One copy at most waits for that, so that a slow store does not fill the memory.
        if self._upload is not None:
            self._upload.written.wait()
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses = []
        snapshot = take_snapshot(self._training.learner, progress)
        store = ray.train.get_context().get_storage().persist_current_checkpoint
        self._upload = CheckpointUpload(snapshot, self._plan.job, self._best, loss, store)
        ray.train.report(
            {**self.last_metrics, "step": progress.step},
            checkpoint=Checkpoint.from_directory(tempfile.mkdtemp(prefix="freesolo-checkpoint-")),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._upload,
        )


def _status(error: BaseException | None) -> Literal["FINISHED", "FAILED", "KILLED"]:
    """What MLflow calls it."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, StoppedError) else "FAILED"
