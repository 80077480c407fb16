"""Small sweeps, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freesolo.config import TuneJob
from freesolo.config_file import parse_config
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.stages import StageFolder
from freesolo.tracking.journal import read_journal
from tests.small import small_solo

# Much is learned with the first, nothing with the last two: whoever is begun later is worse, and stopped, however fast
# each one is. The other way round nobody would be, where each ends before the next.
RATES = [1.0e-2, 3.0e-3, 1.0e-3, 1.0e-5, 1.0e-6, 1.0e-7]


def pack_scenes(folder: Path) -> str:
    """An annotated data set of 8 scenes in 2 shards."""
    annotations = compose_scenes(str(folder / "photos"), 8, size=96, seed=0)
    pack(annotations, str(folder / "data"), samples_per_shard=4)
    return str(folder / "data")


def tune_job(
    dataset: str,
    tracking: dict[str, Any],
    *,
    steps: int = 4,
    space: dict[str, Any] | None = None,
    held_out: str | None = None,
    **settings: Any,
) -> TuneJob:
    raw = {
        "dataset": dataset,
        "evaluation_dataset": held_out,
        "held_out": {"short_side": 64, "inference": {"min_category_score": 0.0, "min_score": 0.0}},
        "tracking": tracking,
        "train": {
            "model": small_solo().model_dump(mode="json"),
            "supervision": "masks",
            "views": {"short_sides": [64], "strong": False},
            "optimizer": {"learning_rate": 0.01},
            "loop": {"steps": steps, "batch_size": 4, "log_every": 1, "checkpoint_every": 2},
        },
        "tune": {"space": space or {"train.optimizer.learning_rate": {"grid": RATES}}, **settings},
    }
    return parse_config(TuneJob, raw, source="test")


def last_loss(folder: StageFolder, trial: str) -> float:
    return read_journal(folder.sibling(trial).url)[-1].metrics["loss"]
