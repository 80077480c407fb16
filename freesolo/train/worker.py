"""Where the loop meets Ray Train: one function that every train worker runs, and the call that starts them.

Worker 0 writes the journal, tells MLflow, and saves; the others compute. A worker group that lost a worker is started
again by Ray, finds the last checkpoint, and goes on from it.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution import context as ray_train_context

from freesolo.cluster import check_cluster, data_cpus, warn_of_nodes_without_labels
from freesolo.config import Job
from freesolo.data.files import join, write_atomic
from freesolo.data.ingest import TrainingStream, configure_ray_data
from freesolo.errors import JobError, StoppedError, UsageError
from freesolo.ops.collectives import from_all_workers, rank
from freesolo.provenance import code_version, git_commit
from freesolo.settings import LoopSettings, OptimizerSettings, ResourceSettings
from freesolo.stages import StageFolder
from freesolo.tracking.journal import Journal
from freesolo.tracking.witness import TrackedRun, Witness
from freesolo.train.best import BestCheckpoint
from freesolo.train.checkpoint import DamagedCheckpointError, load_checkpoint, save_checkpoint
from freesolo.train.control import BY_SIGNALS, TrainingControl
from freesolo.train.learner import Learner
from freesolo.train.loop import Progress, train
from freesolo.train.steps_shown import steps_shown
from freesolo.train.storage import checkpoint_files, checkpoint_storage

_LOG = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of a training at a step, beside its losses.

    Attributes:
        metrics: For the journal.
        pictures: RGB by name; the names are the same at each look.
    """

    metrics: Mapping[str, float]
    pictures: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Training:
    """What a worker trains, built in its own process.

    Attributes:
        learner: Model, optimiser, device.
        stream: Its batches.
        optimizer: The schedule.
        save_model: Writes the trained model as a model file.
        look: What is to be seen now, a batch's inputs at hand; on worker 0 alone, which the others wait for. None:
            nothing.
    """

    learner: Learner
    stream: TrainingStream[Any, Any]
    optimizer: OptimizerSettings
    save_model: Callable[[Learner, Path], None]
    look: Callable[[Learner, Any], Look] | None = None


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What the driver sends to the workers.

    Attributes:
        folder: Of the stage; gets `checkpoints/`, `best/`, `metrics.jsonl` and `model.pt`.
        job: The resolved configuration.
        loop: The part of it that says how long and how often.
        tracked: The MLflow run.
        build: Makes the training on a device, in the worker.
    """

    folder: StageFolder
    job: Job
    loop: LoopSettings
    tracked: TrackedRun
    build: Callable[[torch.device], Training]

    @property
    def model_url(self) -> str:
        """Where the trained model goes."""
        return join(self.folder.url, "model.pt")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a worker's training ended.

    Attributes:
        metrics: The last ones.
        error: Why all workers stopped. A result and not an exception, because Ray would start the workers again, to
            meet the same end.
        undelivered: What MLflow was not told, and why.
    """

    metrics: dict[str, float]
    error: UsageError | JobError | None = None
    undelivered: str | None = None


def run_training(
    plan: TrainingPlan, resources: ResourceSettings, control: TrainingControl = BY_SIGNALS
) -> dict[str, float]:
    """Train on the cluster's workers; goes on from the last checkpoint in the stage's folder.

    SIGTERM, which is also how `ray job stop` begins, makes the workers save a checkpoint and stop.

    Args:
        plan: What to do.
        resources: How many workers, of what.
        control: Who else follows the training, or stops it in the place of SIGTERM.

    Returns:
        The last metrics.

    Raises:
        StoppedError: Training was told to stop, and did.
        UsageError: The cluster cannot hold the workers, or a checkpoint does not fit the settings.
        JobError: Training stopped itself, or workers were lost more than `resources.max_failures` times.
    """
    check_cluster(resources)
    warn_of_nodes_without_labels(resources)
    with steps_shown(plan.folder.stage, plan.loop.steps) as board, control.stoppable(board.stop.remote):
        try:
            config = {"plan": plan, "resources": resources, "board": board}
            result = _fit(_trainer(plan, resources, config, control))
        except (TrainingFailedError, OSError) as error:  # OSError: the store, before any worker was started
            raise JobError(
                f"{plan.folder.url}: training failed: {_reason(error)}; run the same again to go on"
            ) from error
    outcome: Outcome = result.return_value  # type: ignore[attr-defined]
    if outcome.undelivered is not None:
        _LOG.warning("MLflow: %s; later: freesolo deliver %s", outcome.undelivered, plan.folder.run_url)
    if outcome.error is not None:
        raise outcome.error
    return outcome.metrics


def _reason(error: TrainingFailedError | OSError) -> str:
    """In one line: of a worker that was lost rather than of one that missed it, and of a traceback its end."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    if not failures:
        return " ".join(str(error).split())
    told = {rank: str(failure).strip().splitlines() or [repr(failure)] for rank, failure in failures.items()}
    traced = {rank: lines[0].startswith("Traceback") or "ray::" in lines[0] for rank, lines in told.items()}
    first = min(told, key=lambda rank: (traced[rank], rank))
    return f"worker {first}: {told[first][-1 if traced[first] else 0]}"


def _fit(trainer: TorchTrainer) -> ray.train.Result:
    """Train; Ctrl-C aborts, as anywhere. Ray's own handler of it ends the process as if it had succeeded, and stays."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit as abort:
        if abort.code:
            raise
        raise KeyboardInterrupt from abort
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _trainer(
    plan: TrainingPlan, resources: ResourceSettings, config: dict[str, Any], control: TrainingControl
) -> TorchTrainer:
    storage, filesystem = checkpoint_storage(plan.folder.url)
    return TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # Ray's stubs are of Train V1, whose functions returned nothing
        train_loop_config=config,
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # as above
            num_workers=resources.workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=resources.resize_seconds,
            label_selector=resources.label_selector or None,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
            },
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=storage,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=plan.loop.keep_checkpoints),
            callbacks=list(control.callbacks),  # type: ignore[arg-type]  # as above
        ),
    )


def train_worker(config: dict[str, Any]) -> Outcome:
    """Train as one of Ray Train's workers."""
    for told_of_every_checkpoint in ("ray.train", ray_train_context.__file__):  # one of Ray's loggers has a file's name
        logging.getLogger(told_of_every_checkpoint).setLevel(logging.WARNING)
    plan: TrainingPlan = config["plan"]
    resources: ResourceSettings = config["resources"]
    workers = ray.train.get_context().get_world_size()
    recorder: _RunRecorder | None = None
    error: UsageError | JobError | None = None
    try:
        configure_ray_data(cpus=data_cpus(resources, workers) / workers)
        training, loop = _with_workers(plan.build(ray.train.torch.get_device()), plan.loop, resources, workers)
        start, taken = _go_on(training.learner)
        recorder = _RunRecorder(plan, training, start, taken, config["board"])
    except (UsageError, JobError) as reason:
        error = reason
    # What one of them met, all end with: it alone would leave the others waiting.
    error = next((met for met in from_all_workers([error]) if met is not None), None)
    if recorder is None:
        return Outcome({}, error)
    try:
        with recorder:
            if error is not None:
                raise error
            train(
                training.learner,
                training.stream,
                loop,
                training.optimizer,
                recorder,
                progress=start,
                max_bad_samples=training.stream.max_bad_samples,
            )
    except (UsageError, JobError) as reason:
        error = reason
    return Outcome(recorder.last_metrics, error, recorder.undelivered)


def _with_workers(
    training: Training, loop: LoopSettings, resources: ResourceSettings, workers: int
) -> tuple[Training, LoopSettings]:
    """Fit a training to the workers that there are: the batch stays, and a pass of each grows no larger."""
    passes = loop.accumulation_with(workers, max(workers, resources.max_workers))
    stream = replace(training.stream, accumulation_steps=passes)
    return replace(training, stream=stream), loop.model_copy(update={"accumulation_steps": passes})


def _go_on(learner: Learner) -> tuple[Progress, frozenset[str]]:
    """Put the learner where the run's newest whole checkpoint left it; the start where the run has none.

    Returns:
        The progress, and the names that Ray's books hold, damaged checkpoints' too: none of them may be reported again.

    Raises:
        DamagedCheckpointError: There are checkpoints, and none of them is whole.
        UsageError: As `load_checkpoint`.
    """
    newest = ray.train.get_checkpoint()
    if newest is None:
        return Progress(), frozenset()
    known = [reported.checkpoint for reported in ray.train.get_all_reported_checkpoints()]
    taken = frozenset(PurePosixPath(checkpoint.path).name for checkpoint in known)
    try:
        return _load(newest, learner), taken
    except DamagedCheckpointError as error:
        _LOG.warning("%s; going on from an earlier one", error)
        damaged = error
    # Every worker reads the same bytes, and so comes to the same one.
    for checkpoint in reversed([one for one in known if one.path != newest.path]):
        with suppress(DamagedCheckpointError):
            return _load(checkpoint, learner), taken
    raise DamagedCheckpointError(f"{damaged}; no other checkpoint of this run is whole: start it under another name")


def _load(checkpoint: Checkpoint, learner: Learner) -> Progress:
    with checkpoint_files(checkpoint) as folder:
        return load_checkpoint(folder, learner, name=checkpoint.path)


def _status(error: BaseException | None) -> Literal["FINISHED", "FAILED", "KILLED"]:
    """What MLflow calls it."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, StoppedError) else "FAILED"


class _RunRecorder:
    """Keeps what the loop tells: metrics and pictures by worker 0, checkpoints by all together."""

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
        if self._leads:
            self._stop_wanted = board.stop_wanted.remote()
            self._best = BestCheckpoint(plan.folder.url)
            self._journal = Journal(plan.folder.url, resume_step=start.step + 1)
            self._witness = Witness(plan.tracked, self._journal)
            self._witness.settings(plan.job)
            stream = training.stream
            self._witness.dataset(stream.dataset_url, stream.manifest.digest, stream.dataset_url)
            board.begin.remote(start.step)

    def __enter__(self) -> _RunRecorder:
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
        self._best.close()
        self._journal.flush()
        delivery = self._witness.close(status)
        self._journal.close()
        self.undelivered = str(delivery) if delivery.reason is not None else None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.last_metrics = values
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
            self.last_metrics = {**self.last_metrics, **look.metrics}
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
        # Uploaded while training goes on. Ray knows of a checkpoint when all of it is there, and goes on from no other.
        folder = tempfile.mkdtemp(prefix="freesolo-checkpoint-")
        try:
            commit = git_commit() or code_version()
            save_checkpoint(Path(folder), self._training.learner, progress, self._plan.job, commit)
        except (UsageError, JobError):
            shutil.rmtree(folder)
            raise
        if self._losses:
            self._best.offer(Path(folder), name, sum(self._losses) / len(self._losses))
            self._losses = []
        ray.train.report(
            {**self.last_metrics, "step": progress.step},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
