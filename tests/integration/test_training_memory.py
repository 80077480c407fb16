"""A training's memory does not grow with its data set: the same steps over 1x and over 16x the shards."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg

from freesolo.config import PretrainJob
from freesolo.config_file import parse_config
from freesolo.data.pack import pack
from freesolo.data.shards import read_dataset_manifest
from freesolo.jobs import pretrain_stage
from freesolo.stages import StageFolder
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(900),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]

_LOG = logging.getLogger(__name__)

SHARDS = 4
PHOTOS_PER_SHARD = 32
FACTOR = 16
STEPS = FACTOR * SHARDS * PHOTOS_PER_SHARD // 16  # one epoch of the large data set, 16 of the small one
MEBIBYTE = 2**20


def noise_data_set(folder: Path, shards: int) -> str:
    """Photos that don't compress: a third of a MiB each."""
    random = np.random.default_rng(0)
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for number in range(shards * PHOTOS_PER_SHARD):
        pixels = random.integers(0, 256, (384, 384, 3), np.uint8)
        (photos / f"{number:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444"))
    pack(str(photos), str(folder / "data"), samples_per_shard=PHOTOS_PER_SHARD)
    return str(folder / "data")


@dataclass
class MemoryWatch:
    """Peaks of what is a process's own memory, in bytes.

    Of the driver, of train workers, of all other workers of Ray's, and of what a head node runs for the cluster.
    """

    peaks: dict[str, int] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            for process in psutil.process_iter():
                with suppress(psutil.NoSuchProcess):  # it ended while it was looked at
                    name = self._name(process)
                    if name is not None:
                        own = process.memory_full_info().uss
                        self.peaks[name] = max(self.peaks.get(name, 0), own)

    def _name(self, process: psutil.Process) -> str | None:
        if process.pid == os.getpid():
            return "driver"
        command = " ".join(process.cmdline())
        if "RayTrainWorker" in command:
            return "train worker"
        if "gcs_server" in command:
            return "head"
        return "data worker" if command.startswith("ray::") else None


def peaks_of_training(dataset: str, storage: Path) -> dict[str, int]:
    raw = {
        "dataset": dataset,
        "tracking": {"uri": "off"},
        "pretrain": {
            "model": {"backbone": "resnet18", "hidden_channels": 32, "projection_channels": 16, "queue_length": 64},
            "views": {"size": 32},
            "optimizer": {"learning_rate": 0.01},
            "loop": {"steps": STEPS, "batch_size": 16},
        },
    }
    with MemoryWatch() as watch:
        pretrain_stage(
            parse_config(PretrainJob, raw, source="test"),
            StageFolder(str(storage), Path(dataset).parent.name, "pretrain"),
        )
    return watch.peaks


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    small, large = (noise_data_set(tmp_path / f"{factor}x", factor * SHARDS) for factor in (1, FACTOR))
    grown = sum(shard.bytes for shard in read_dataset_manifest(large).shards) - sum(
        shard.bytes for shard in read_dataset_manifest(small).shards
    )
    assert grown > 200 * MEBIBYTE, "too little to tell growth from noise"
    peaks_of_training(small, tmp_path / "warm-up")  # what is loaded once is not growth
    of_small, of_large = peaks_of_training(small, tmp_path / "runs"), peaks_of_training(large, tmp_path / "runs")
    for name in ("driver", "head", "train worker", "data worker"):
        growth = of_large[name] - of_small[name]
        _LOG.info("%s: %.0f MiB at 1x, %.0f MiB at 16x", name, of_small[name] / MEBIBYTE, of_large[name] / MEBIBYTE)
        assert growth < 0.15 * grown, f"{name} grew by {growth / MEBIBYTE:.0f} MiB with the data set"
