"""Checkpoints: a folder with everything that a run needs to go on as if it had never stopped.

learner.pt      weights, momentum encoder and queues, optimiser, running average
progress.json   step, what of the data was consumed, settings, commit; checksums of the other file and of itself
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freesolo.data.documents import canonical_digest, parse_json
from freesolo.data.order import StreamState
from freesolo.data.stores import explained
from freesolo.errors import JobError, UsageError
from freesolo.models.download import sha256_of_file
from freesolo.models.torch_file import read_torch_file, write_torch_file
from freesolo.settings import Settings
from freesolo.train.learner import Learner
from freesolo.train.loop import Progress

FORMAT_VERSION = 2
_WEIGHTS = "learner.pt"
_PROGRESS = "progress.json"


class DamagedCheckpointError(JobError):
    """A checkpoint that is not what was saved: files missing, cut short or altered."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds of a run, as it was at a step: training may go on while it is written.

    Attributes:
        state: Copied to the CPU: weights, momentum encoder and queues where there are any, optimiser, running average.
        progress: Step, what of the data has been consumed, bad samples.
    """

    state: dict[str, Any]
    progress: Progress


def take_snapshot(learner: Learner, progress: Progress) -> Snapshot:
    """Copy what a checkpoint holds; it takes as much memory again as the learner's state."""
    return Snapshot(_copy(learner.state_dict()), progress)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    return value


def save_checkpoint(folder: Path, snapshot: Snapshot, settings: Settings, git_commit: str) -> None:
    """Write a checkpoint.

    Args:
        folder: Exists and is empty.
        snapshot: What it holds of the run.
        settings: The resolved configuration.
        git_commit: Of the code that runs.

    Raises:
        JobError: The disk is full.
    """
    with explained(str(folder)):
        write_torch_file(snapshot.state, folder / _WEIGHTS)
        _write_record(folder, snapshot.progress, settings, git_commit)


def _write_record(folder: Path, progress: Progress, settings: Settings, git_commit: str) -> None:
    record = {
        "format_version": FORMAT_VERSION,
        "step": progress.step,
        "stream": progress.stream.to_json(),
        "bad_samples": progress.bad_samples,
        "settings": settings.model_dump(mode="json"),
        "git_commit": git_commit,
        "torch_version": torch.__version__,
        "sha256": {_WEIGHTS: sha256_of_file(folder / _WEIGHTS)},
    }
    record["digest"] = canonical_digest(record)
    (folder / _PROGRESS).write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_checkpoint(folder: Path, learner: Learner, *, name: str | None = None) -> Progress:
    """Put the learner into the state that was saved; one that cannot be used leaves the learner as it was.

    Args:
        folder: With the checkpoint's files.
        learner: Of the same architecture as the one that was saved.
        name: The checkpoint's in errors; None: the folder's.

    Raises:
        DamagedCheckpointError: A file is missing, or not the one that was saved.
        UsageError: The checkpoint is of another architecture or of another format.
    """
    name = name or str(folder)
    record = _read_record(folder, name)
    try:
        state = read_torch_file(folder / _WEIGHTS, device=learner.device)
    except ValueError as error:
        raise DamagedCheckpointError(f"checkpoint {name}: {_WEIGHTS} cannot be read: {error}") from error
    try:
        learner.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        first = str(error).split("\n")[1 if "\n" in str(error) else 0].strip()
        raise UsageError(f"checkpoint {name}: of another architecture than this run's settings: {first}") from error
    return Progress(record["step"], StreamState.from_json(record["stream"]), record["bad_samples"])


def _read_record(folder: Path, name: str) -> dict[str, Any]:
    """`progress.json`, when it and what it names are as they were saved."""
    try:
        record: dict[str, Any] = parse_json((folder / _PROGRESS).read_bytes())
        version, digest = record["format_version"], record.pop("digest", None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"checkpoint {name}: {_PROGRESS} cannot be read ({error})") from error
    if version != FORMAT_VERSION:
        raise UsageError(
            f"checkpoint {name}: written in format {version}, this freesolo reads {FORMAT_VERSION}; go on with the "
            "freesolo that wrote it, or choose another --run-name"
        )
    if digest != canonical_digest(record):
        raise DamagedCheckpointError(f"checkpoint {name}: {_PROGRESS} was altered")
    _check_fields(name, record)
    for file, sha256 in record["sha256"].items():
        if not (folder / file).is_file():
            raise DamagedCheckpointError(f"checkpoint {name}: {file} is missing")
        if sha256_of_file(folder / file) != sha256:
            raise DamagedCheckpointError(f"checkpoint {name}: {file} is not what was saved: cut short or altered")
    return record


def _check_fields(name: str, record: dict[str, Any]) -> None:
    """See that what a run goes on from is what `save_checkpoint` writes, however its digest came to be right."""
    counts = [record.get("step"), record.get("bad_samples")]
    try:
        StreamState.from_json(record["stream"])
        whole = all(type(count) is int and count >= 0 for count in counts) and record["sha256"].keys() == {_WEIGHTS}
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise DamagedCheckpointError(f"checkpoint {name}: {_PROGRESS} is not what this freesolo writes")
