"""Checkpoints: a folder with everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from freesolo.data.order import StreamState
from freesolo.errors import UsageError
from freesolo.settings import Settings
from freesolo.train.learner import Learner
from freesolo.train.loop import Progress

FORMAT_VERSION = 1
_WEIGHTS = "learner.pt"
_PROGRESS = "progress.json"


def save_checkpoint(folder: Path, learner: Learner, progress: Progress, settings: Settings, git_commit: str) -> None:
    """Write a checkpoint.

    Args:
        folder: Exists and is empty.
        learner: Weights, momentum encoder and queues where there are any, optimiser, running average.
        progress: Step, what of the data has been consumed, bad samples.
        settings: The resolved configuration.
        git_commit: Of the code that runs.
    """
    torch.save(learner.state_dict(), folder / _WEIGHTS)
    record = {
        "format_version": FORMAT_VERSION,
        "step": progress.step,
        "stream": progress.stream.to_json(),
        "bad_samples": progress.bad_samples,
        "settings": settings.model_dump(mode="json"),
        "git_commit": git_commit,
        "torch_version": torch.__version__,
    }
    (folder / _PROGRESS).write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_checkpoint(folder: Path, learner: Learner) -> Progress:
    """Put the learner into the state that was saved.

    Raises:
        UsageError: The checkpoint is of another architecture or of a newer format.
    """
    record = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    if record["format_version"] > FORMAT_VERSION:
        raise UsageError(
            f"checkpoint {folder}: written in format {record['format_version']}, this freesolo reads up to "
            f"{FORMAT_VERSION}; upgrade it"
        )
    state = torch.load(folder / _WEIGHTS, map_location=learner.device, weights_only=True)
    try:
        learner.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        first = str(error).split("\n")[1 if "\n" in str(error) else 0].strip()
        raise UsageError(f"checkpoint {folder}: of another architecture than this run's settings: {first}") from error
    return Progress(record["step"], StreamState.from_json(record["stream"]), record["bad_samples"])
