"""Every job while S3 breaks: the undisturbed run's result, or one clear line and an exit code, in time."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from freesolo.config import EvaluateJob, ExtractJob, Job, PackJob, PredictJob, PretrainJob, TrainJob
from freesolo.data import files
from freesolo.data.labels import read_label_manifest
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest
from freesolo.entry import run_job
from freesolo.jobs import evaluate_stage, extract_stage, pack_stage, predict_stage, pretrain_stage, train_stage
from freesolo.stages import StageFolder, StageResult
from tests.chaos.record import FOLDER, Row, record
from tests.faults import Fault, FaultyProxy, Kind
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN
from tests.servers import S3Server
from tests.small import small_solo

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.usefixtures("ray_cluster"),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]

ROWS = Path(__file__).stem
SCENES, SHARDS = 24, 4
OUTAGE = 30.0
SLOW = 20.0
# What is promised, in seconds: going on after an outage of 30 s, after a single fault, and saying what is wrong. The
# machine may be busy with other things.
RECOVERED_BY, ERROR_BY = OUTAGE + 45.0, 90.0

Stage = Callable[[Any, StageFolder], StageResult]
JOBS: dict[str, tuple[type[Job], Stage]] = {
    "pack": (PackJob, pack_stage),
    "pretrain": (PretrainJob, pretrain_stage),
    "extract": (ExtractJob, extract_stage),
    "train": (TrainJob, train_stage),
    "predict": (PredictJob, predict_stage),
    "evaluate": (EvaluateJob, evaluate_stage),
}
# Two workers each: their steps are of 8 samples, so that 9 are three epochs. Checkpoints every second one.
LOOP = {"steps": 9, "batch_size": 8, "log_every": 1, "record_samples": True, "checkpoint_every": 2}
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


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket with photos, and the proxy before it."""

    bucket: str
    proxy: FaultyProxy

    def config(self, job: str, name: str, before: dict[str, Run]) -> dict[str, Any]:
        """The settings of a job, as small as they can be."""
        dataset, solo = f"{self.bucket}/data", small_solo().model_dump(mode="json")
        pretrain_model = {"backbone": "resnet18", "hidden_channels": 32, "projection_channels": 16, "queue_length": 64}
        mask = {"short_side": 64, "min_maskness": 0.0, "top_border": 0.0, "max_width": 1.0, "embedding_channels": 4}
        own: dict[str, Callable[[], dict[str, Any]]] = {
            "pack": lambda: {
                "photos": f"{self.bucket}/photos/annotations.json",
                "dataset": dataset if name == "undisturbed" else f"{self.bucket}/data-{name}",
                "samples_per_shard": SCENES // SHARDS,
            },
            "pretrain": lambda: {
                "dataset": dataset,
                "resources": {"workers": 2},
                "pretrain": {
                    "model": pretrain_model,
                    "views": {"size": 32},
                    "optimizer": {"learning_rate": 0.01},
                    "loop": LOOP,
                },
            },
            "extract": lambda: {
                "dataset": dataset,
                "labels": f"{self.bucket}/masks-{name}",
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
                    "loop": LOOP,
                },
            },
            "predict": lambda: {
                "dataset": dataset,
                "labels": f"{self.bucket}/predictions-{name}",
                "weights": before["train"].outputs["model"],
                "predict": {"short_side": 64, "batch_size": 2, "max_width": 1.0, "inference": WANTS_NO_FEWER},
            },
            "evaluate": lambda: {"dataset": dataset, "labels": {"SOLO": before["predict"].outputs["labels"]}},
        }
        return {"tracking": {"uri": "off"}, **own[job]()}


def run(job: str, place: Place, name: str, before: dict[str, Run], folder: Path) -> Ended:
    """Run a job in this process, as its program would."""
    config = folder / f"{job}-{name}.yaml"
    config.write_text(json.dumps(place.config(job, name, before)))
    output, errors, began = io.StringIO(), io.StringIO(), time.monotonic()
    kind, stage = JOBS[job]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = run_job(
            kind, job, stage, ["--config", str(config), "--run-name", name, "--storage", f"{place.bucket}/runs"]
        )
    result = json.loads(output.getvalue().splitlines()[-1]) if code == 0 else {}
    lines = errors.getvalue().rstrip()
    return Ended(code, result, lines.rsplit("\n", 1)[-1], lines, time.monotonic() - began)


def made_by(job: str, place: Place, name: str, ended: Ended) -> Run:
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
    stage = f"{place.bucket}/runs/{name}/{job}"
    used: dict[int, list[int]] = {}
    for file in files.list_files(f"{stage}/samples"):
        for step, image_ids in json.loads(files.read_bytes(f"{stage}/samples/{file}")):
            used.setdefault(step, []).extend(image_ids)
    assert sorted(used) == list(range(LOOP["steps"]))
    epochs = tuple(sorted(number for step in range(first, first + 3) for number in used[step]) for first in (0, 3, 6))
    return Run(outputs, files.read_bytes(outputs["model"]), epochs)


@pytest.fixture(scope="module")
def place(s3_server: S3Server, s3_proxy: FaultyProxy) -> Iterator[Place]:
    (FOLDER / f"{ROWS}.jsonl").unlink(missing_ok=True)
    if not s3_server.running:
        s3_server.start()
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in s3_server.environment.items():
            environment.setenv(variable, value)
        environment.setenv("AWS_ENDPOINT_URL", s3_proxy.url)
        S3FileSystem.clear_instance_cache()
        S3FileSystem().mkdir("chaos-store")
        place = Place("s3://chaos-store", s3_proxy)
        compose_scenes(f"{place.bucket}/photos", SCENES, size=64, seed=0)
        yield place
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def before(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every job once, undisturbed: what is expected, and what the others start from."""
    runs: dict[str, Run] = {}
    folder = tmp_path_factory.mktemp("configs")
    for job in JOBS:
        place.proxy.clear()
        ended = run(job, place, "undisturbed", runs, folder)
        assert uploads_done_twice(place.proxy) == 0
        runs[job] = made_by(job, place, "undisturbed", ended)
    return runs


@pytest.fixture(autouse=True)
def whole_again(place: Place) -> Iterator[None]:
    place.proxy.clear()
    yield
    place.proxy.clear()


# Files that a run writes again and again, undisturbed: its journal, Ray's books and its mark that a folder is there.
GROWING = re.compile(r"metrics\.jsonl$|checkpoint_manager_snapshot|validate_storage_marker")


def uploads_done_twice(proxy: FaultyProxy) -> int:
    """Uploads that reached the store beyond one a file."""
    return sum(count - 1 for path, count in proxy.stored.items() if not GROWING.search(path))


def seconds_to_recovery(fault: Fault) -> float:
    assert fault.first_hit is not None, "the fault hit nothing"
    assert fault.recovered is not None, "nothing was asked again"
    return fault.recovered - fault.first_hit


@dataclass(frozen=True, slots=True)
class Passing:
    """A fault that passes.

    Attributes:
        name: In the table.
        job: What is under way.
        make: Puts it into force.
        within: Seconds to recovery that are promised.
    """

    name: str
    job: str
    make: Callable[[FaultyProxy], Fault]
    within: float


def outage(begin: str) -> Callable[[FaultyProxy], Fault]:
    """Of the whole store, from the first request of a file on: every call of every process."""
    return lambda proxy: proxy.add(Kind.UNAVAILABLE, begin=begin, seconds=OUTAGE)


def one_each(kind: Kind, pattern: str, **which: object) -> Callable[[FaultyProxy], Fault]:
    return lambda proxy: proxy.add(kind, path=pattern, **which)


SHARD = r"data/shard-.*\.tar"
PASSING = [
    Passing("503 for 30 s", "pack", outage(r"shard-000001\.tar"), RECOVERED_BY),
    Passing("503 for 30 s", "pretrain", outage(r"samples/step-00000002"), RECOVERED_BY),
    Passing("503 for 30 s", "extract", outage(r"masks-.*shard-000000\.parquet"), RECOVERED_BY),
    Passing("connections reset", "predict", one_each(Kind.RESET_IN_BODY, SHARD, method="GET", count=6), RECOVERED_BY),
    Passing("answers lost", "pack", one_each(Kind.LOST_ANSWER, r"\.tar", method="PUT", count=6), RECOVERED_BY),
    Passing("answers cut short", "train", one_each(Kind.TRUNCATED, SHARD, method="GET", count=6), RECOVERED_BY),
    Passing("first byte after 20 s", "evaluate", one_each(Kind.SLOW, r"parquet", count=1, delay=SLOW), RECOVERED_BY),
    Passing("first byte after 20 s", "train", one_each(Kind.SLOW, SHARD, count=2, delay=SLOW), RECOVERED_BY),
]


@pytest.mark.parametrize("case", PASSING, ids=lambda case: f"{case.job}: {case.name}")
def test_what_passes_changes_nothing(case: Passing, place: Place, before: dict[str, Run], tmp_path: Path) -> None:
    expected = before[case.job]
    name = re.sub(r"\W+", "-", case.name)
    fault = case.make(place.proxy)
    ended = run(case.job, place, name, before, tmp_path)
    hits, seconds, twice = fault.hits, seconds_to_recovery(fault), uploads_done_twice(place.proxy)
    place.proxy.clear()
    made = made_by(case.job, place, name, ended)
    lost = sum(len(set(there) - set(here)) for there, here in zip(expected.used, made.used, strict=True))
    again = sum(len(epoch) - len(set(epoch)) for epoch in made.used)
    reads = hits if fault.kind in (Kind.TRUNCATED, Kind.RESET_IN_BODY) else 0
    said = [f"{count} {what}" for count, what in ((twice, "uploads"), (reads, "reads"), (again, "samples")) if count]
    same = made.made == expected.made and made.used == expected.used
    record(ROWS, Row(case.name, case.job, "same result" if same else "other", lost, ", ".join(said), seconds, hits))
    assert made.used == expected.used, "each sample once an epoch"
    assert made.made == expected.made, "another result than the undisturbed run's"
    assert seconds < case.within


@dataclass(frozen=True, slots=True)
class Lasting:
    """A fault that does not pass.

    Attributes:
        name: In the table.
        job: What is under way.
        breaks: Breaks it.
        code: Of exit.
        words: Regular expression, in the line that the job ends with.
    """

    name: str
    job: str
    breaks: Callable[[Place, pytest.MonkeyPatch], None]
    code: int
    words: str


def wrong_key(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    S3FileSystem.clear_instance_cache()


def withdrawn_key(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.proxy.add(Kind.FORBIDDEN, method="GET", path=SHARD)


def missing_shard(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    S3FileSystem().rm(f"{place.bucket}/data/shard-000002.tar")


def changed_shard(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{place.bucket}/data/shard-000002.tar"
    data = bytearray(files.read_bytes(url))
    data[700] ^= 1  # in its first photo
    files.write_atomic(url, bytes(data))


MISSING, CHANGED = "shard-000002.tar: the shard is missing", "shard-000002.tar: its sha256 is not the manifest's"
LASTING = [
    *(Lasting("wrong key", job, wrong_key, 2, r"access denied .*; check the credentials") for job in JOBS),
    Lasting("key withdrawn", "extract", withdrawn_key, 2, r"shard-\d+\.tar: access denied .*; check the credentials"),
    Lasting("key withdrawn", "pretrain", withdrawn_key, 2, r"shard-\d+\.tar: access denied .*; check the credentials"),
    Lasting("a shard missing", "extract", missing_shard, 1, MISSING),
    Lasting("a shard missing", "train", missing_shard, 1, MISSING),
    Lasting("a shard changed", "predict", changed_shard, 1, CHANGED),
    Lasting("a shard changed", "pretrain", changed_shard, 1, CHANGED),
]


@pytest.mark.parametrize("case", LASTING, ids=lambda case: f"{case.job}: {case.name}")
def test_what_lasts_is_one_clear_error(
    case: Lasting, place: Place, before: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = re.sub(r"\W+", "-", case.name)
    url = f"{place.bucket}/data/shard-000002.tar"
    whole = files.read_bytes(url)
    case.breaks(place, monkeypatch)
    try:
        ended = run(case.job, place, name, before, tmp_path)
    finally:
        hits = sum(fault.hits for fault in place.proxy.faults)
        place.proxy.clear()
        monkeypatch.undo()
        S3FileSystem.clear_instance_cache()
        files.write_atomic(url, whole)
    said = re.sub(r"s3://\S*/", "", ended.error)
    record(ROWS, Row(case.name, case.job, f"exit code {ended.code}: {said}", 0, "", ended.seconds, hits))
    assert ended.code == case.code, ended.errors[-3000:]
    assert re.search(rf"^error: .*{case.words}", ended.error), ended.errors[-3000:]
    assert "Traceback" not in ended.errors
    assert ended.seconds < ERROR_BY
