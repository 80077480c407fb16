"""Where the loop meets Ray Train: one function that every train worker runs, and the call that starts them.

Worker 0 writes the journal, tells MLflow, and saves; the others compute. A worker group that lost a worker is started
again by Ray, finds the last checkpoint, and goes on from it.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution import context as ray_train_context

from freesolo.cluster import check_cluster, data_cpus, warn_of_nodes_without_labels
from freesolo.data.ingest import configure_ray_data
from freesolo.errors import JobError, TooLargeError, UsageError
from freesolo.ops.collectives import from_all_workers, world_size
from freesolo.settings import LoopSettings, ResourceSettings
from freesolo.train.checkpoint import DamagedCheckpointError, load_checkpoint
from freesolo.train.control import BY_SIGNALS, TrainingControl
from freesolo.train.learner import Learner
from freesolo.train.loop import Progress, train
from freesolo.train.plan import Training, TrainingPlan
from freesolo.train.recorder import RunRecorder
from freesolo.train.steps_shown import steps_shown
from freesolo.train.storage import checkpoint_files, checkpoint_storage

_LOG = logging.getLogger(__name__)


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
            raise _failure(plan.folder.url, error) from error
    outcome: Outcome = result.return_value  # type: ignore[attr-defined]
    if outcome.undelivered is not None:
        _LOG.warning("MLflow: %s; later: freesolo deliver %s", outcome.undelivered, plan.folder.run_url)
    if outcome.error is not None:
        raise outcome.error
    return outcome.metrics


def _failure(url: str, error: TrainingFailedError | OSError) -> JobError:
    full = re.search(rf"{TooLargeError.__name__}: (.*)", str(error))
    if full is not None:
        return TooLargeError(full[1])
    return JobError(f"{url}: training failed: {_reason(error)}; run the same again to go on")


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
    recorder: RunRecorder | None = None
    error: UsageError | JobError | None = None
    try:
        configure_ray_data(cpus=data_cpus(resources, workers) / workers)
        training, loop = _with_workers(plan.build(ray.train.torch.get_device()), plan.loop, resources, workers)
        start, taken = _go_on(training.learner)
        recorder = RunRecorder(plan, training, start, taken, config["board"])
    except (UsageError, JobError) as reason:
        error = reason
    # What one of them met, all end with: it alone would leave the others waiting.
    error = next((met for met in from_all_workers([error]) if met is not None), None)
    if recorder is None:
        return Outcome({}, error)
    try:
        with recorder, full_device_told():
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


@contextmanager
def full_device_told() -> Iterator[None]:
    """Say what to do about a device whose memory is full.

    Raises:
        TooLargeError: It is.
        RuntimeError: The same, of one worker among others. They wait for what it would compute, so it is no result, but
            a failure, which Ray ends them all for.
    """
    try:
        yield
    except torch.OutOfMemoryError as full:
        what = str(full).partition(". ")[0]
        told = f"{what}: lower loop.batch_size, or have its passes be smaller by a higher loop.accumulation_steps"
        if world_size() > 1:
            raise RuntimeError(f"{TooLargeError.__name__}: {told}") from full
        raise TooLargeError(told) from full


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
