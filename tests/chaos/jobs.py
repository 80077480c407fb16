"""Every job as small as it can be, run in this process, and what it made in what can be compared."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freesolo.config import EvaluateJob, ExtractJob, Job, PackJob, PredictJob, PretrainJob, TrainJob
from freesolo.data import files
from freesolo.data.labels import read_label_manifest
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest
from freesolo.entry import run_job
from freesolo.jobs import evaluate_stage, extract_stage, pack_stage, predict_stage, pretrain_stage, train_stage
from freesolo.stages import StageFolder, StageResult
from tests.small import small_solo

SCENES, SHARDS = 24, 4
Stage = Callable[[Any, StageFolder], StageResult]
JOBS: dict[str, tuple[type[Job], Stage]] = {
    "pack": (PackJob, pack_stage),
    "pretrain": (PretrainJob, pretrain_stage),
    "extract": (ExtractJob, extract_stage),
    "train": (TrainJob, train_stage),
    "predict": (PredictJob, predict_stage),
    "evaluate": (EvaluateJob, evaluate_stage),
}
BATCH = 8  # of two workers
WANTS_NO_FEWER = {"min_category_score": 0.0, "min_score": 0.0, "max_instances": 5}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended.

    Attributes:
        code: Its exit code.
        result: The last line of its standard output; empty where it failed.
        error: The last line of its standard error.
        errors: All of it.
        seconds: From its start.
    """

    code: int
    result: dict[str, Any]
    error: str
    errors: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """What a job made, in what can be compared.

    Attributes:
        outputs: The job's own.
        made: Digest of a data set or label set, bytes of a model, metrics.
        used: Image ids that each epoch used, in no order; of trainings.
    """

    outputs: dict[str, str]
    made: Any
    used: tuple[list[int], ...] = ()

    def lost(self, expected: Run) -> int:
        """Samples that it did not use in an epoch in which an undisturbed run did."""
        return sum(len(set(there) - set(here)) for there, here in zip(expected.used, self.used, strict=True))


@dataclass(frozen=True, slots=True)
class Place:
    """Where jobs run.

    Attributes:
        root: Folder or bucket of photos, data sets, label sets and runs.
        scenes: Photos.
        steps: Of a training; so many that they are whole epochs.
    """

    root: str
    scenes: int = SCENES
    steps: int = 9

    def make_photos(self) -> None:
        """What everything starts from."""
        compose_scenes(f"{self.root}/photos", self.scenes, size=64, seed=0)

    def config(self, job: str, name: str, before: dict[str, Run]) -> dict[str, Any]:
        """The settings of a job, as small as they can be."""
        dataset, solo = f"{self.root}/data", small_solo().model_dump(mode="json")
        pretrain_model = {"backbone": "resnet18", "hidden_channels": 32, "projection_channels": 16, "queue_length": 64}
        mask = {"short_side": 64, "min_maskness": 0.0, "top_border": 0.0, "max_width": 1.0, "embedding_channels": 4}
        loop = {"steps": self.steps, "batch_size": BATCH, "log_every": 1, "record_samples": True, "checkpoint_every": 2}
        own: dict[str, Callable[[], dict[str, Any]]] = {
            "pack": lambda: {
                "photos": f"{self.root}/photos/annotations.json",
                "dataset": dataset if name == "undisturbed" else f"{self.root}/data-{name}",
                "samples_per_shard": self.scenes // SHARDS,
            },
            "pretrain": lambda: {
                "dataset": dataset,
                "resources": {"workers": 2},
                "pretrain": {
                    "model": pretrain_model,
                    "views": {"size": 32},
                    "optimizer": {"learning_rate": 0.01},
                    "loop": loop,
                },
            },
            "extract": lambda: {
                "dataset": dataset,
                "labels": f"{self.root}/masks-{name}",
                "weights": before["pretrain"].outputs["model"],
                "extract": {"backbone": "resnet18", "free_mask": mask, "batch_size": 2},
            },
            "train": lambda: {
                "dataset": dataset,
                "resources": {"workers": 2},
                "train": {
                    "model": solo,
                    "supervision": "masks",
                    "views": {"short_sides": [64], "strong": False},
                    "optimizer": {"learning_rate": 0.01},
                    "loop": loop,
                },
            },
            "predict": lambda: {
                "dataset": dataset,
                "labels": f"{self.root}/predictions-{name}",
                "weights": before["train"].outputs["model"],
                "predict": {"short_side": 64, "batch_size": 2, "max_width": 1.0, "inference": WANTS_NO_FEWER},
            },
            "evaluate": lambda: {"dataset": dataset, "labels": {"SOLO": before["predict"].outputs["labels"]}},
        }
        return {"tracking": {"uri": "off"}, **own[job]()}

    def run(self, job: str, name: str, before: dict[str, Run], folder: Path, *overrides: str) -> Ended:
        """Run a job in this process, as its program would."""
        config = folder / f"{job}-{name}.yaml"
        config.write_text(json.dumps(self.config(job, name, before)))
        output, errors, began = io.StringIO(), io.StringIO(), time.monotonic()
        kind, stage = JOBS[job]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = run_job(
                kind,
                job,
                stage,
                ["--config", str(config), "--run-name", name, "--storage", f"{self.root}/runs", *overrides],
            )
        result = json.loads(output.getvalue().splitlines()[-1]) if code == 0 else {}
        lines = errors.getvalue().rstrip()
        return Ended(code, result, lines.rsplit("\n", 1)[-1], lines, time.monotonic() - began)

    def undisturbed(self, jobs: Sequence[str], folder: Path) -> dict[str, Run]:
        """What each of some jobs makes when nothing is broken, one after the other."""
        runs: dict[str, Run] = {}
        for job in jobs:
            runs[job] = self.made_by(job, "undisturbed", self.run(job, "undisturbed", runs, folder))
        return runs

    def made_by(self, job: str, name: str, ended: Ended) -> Run:
        """What a job that succeeded made."""
        assert ended.code == 0, ended.errors[-4000:]
        outputs = ended.result["outputs"]
        match job:
            case "pack":
                return Run(outputs, read_dataset_manifest(outputs["dataset"]).digest)
            case "extract" | "predict":
                manifest = read_label_manifest(outputs["labels"])
                return Run(outputs, (manifest.digest, ended.result["counts"]))
            case "evaluate":
                return Run(outputs, ended.result["metrics"])
        stage = f"{self.root}/runs/{name}/{job}"
        used: dict[int, list[int]] = {}
        for file in files.list_files(f"{stage}/samples"):
            for step, image_ids in json.loads(files.read_bytes(f"{stage}/samples/{file}")):
                used.setdefault(step, []).extend(image_ids)
        assert sorted(used) == list(range(self.steps))
        epochs = tuple(
            sorted(number for step in range(first, first + 3) for number in used[step]) for first in (0, 3, 6)
        )
        return Run(outputs, files.read_bytes(outputs["model"]), epochs)
