"""Extraction on a real Ray cluster: complete, and the same bytes whatever dies on the way."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageDraw

from freesolo.config import ExtractJob
from freesolo.data.labels import LabelManifest, read_label_file, read_label_manifest
from freesolo.data.shards import (
    DatasetManifest,
    Sample,
    ShardInfo,
    read_dataset_manifest,
    read_shard,
    shard_name,
    write_dataset_manifest,
    write_shard,
)
from freesolo.errors import JobError, UsageError
from freesolo.inference.batches import BatchPlan, decode_batch, read_batches
from freesolo.inference.extract import extract_free_masks
from freesolo.inference.labellers import FreeMaskLabeller
from freesolo.models.resnet import build_resnet
from freesolo.models.weights import backbone_state_dict
from freesolo.settings import ExtractSettings, FreeMaskSettings, ResourceSettings, TrackingSettings
from freesolo.types import ImageBatch

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

SHARDS = 6
SAMPLES_PER_SHARD = 24
UNREADABLE = {f"k{shard * SAMPLES_PER_SHARD + 7:04d}" for shard in range(SHARDS)}
# Not written by any test, and so the same for all: (width, height) of neighbours differ, so that batches mix places.
SIZES = ((96, 72), (72, 96), (80, 80))

SETTINGS = ExtractSettings(
    backbone="resnet18",
    free_mask=FreeMaskSettings(short_side=96, long_side_max=160, min_maskness=0.8, max_instances=8),
    batch_size=4,
    max_bad_samples=0.1,
)

# What a job does, in a process and with a cluster of its own, so that all of it can be killed.
KILLED_JOB = """
import sys, ray
from freesolo.config import ExtractJob
from freesolo.inference.extract import extract_free_masks
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
extract_free_masks(ExtractJob.model_validate_json(sys.argv[1]), storage=sys.argv[2])
"""


def draw_photo(index: int) -> bytes:
    """A bright blob on a dark, noisy ground; nothing at all in every ninth photo."""
    random = np.random.default_rng(index)
    width, height = SIZES[index % len(SIZES)]
    if index % 9 == 4:
        image = Image.new("RGB", (width, height), "grey")
    else:
        image = Image.fromarray(random.integers(0, 60, (height, width, 3), np.uint8))
        x, y = (int(random.integers(5, side - 35)) for side in (width, height))
        colour = tuple(int(value) for value in random.integers(120, 256, 3))
        ImageDraw.Draw(image).ellipse((x, y, x + 30, y + 30), fill=colour)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=90)
    return file.getvalue()


def sample(index: int) -> Sample:
    key = f"k{index:04d}"
    data = draw_photo(index)
    width, height = SIZES[index % len(SIZES)]
    return Sample(key, data[: len(data) // 2] if key in UNREADABLE else data, index, f"{key}.jpg", width, height)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    shards: list[ShardInfo] = []
    for shard in range(SHARDS):
        first = shard * SAMPLES_PER_SHARD
        samples = (sample(index) for index in range(first, first + SAMPLES_PER_SHARD))
        shards.append(write_shard(str(folder), shard_name(shard), samples))
    manifest = DatasetManifest(1, tuple(shards), annotated=False, categories=(), skipped=())
    write_dataset_manifest(str(folder), manifest)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(backbone_state_dict(build_resnet("resnet18").initialise(torch.Generator().manual_seed(0))), path)
    return path


MakeJob = Callable[..., ExtractJob]


@pytest.fixture(scope="module")
def make_job(dataset: Path, weights: Path) -> MakeJob:
    def make(labels: Path, *, workers: int = 1, settings: ExtractSettings = SETTINGS) -> ExtractJob:
        return ExtractJob(
            dataset=str(dataset),
            labels=str(labels),
            weights=str(weights),
            extract=settings,
            resources=ResourceSettings(workers=workers),
            tracking=TrackingSettings(uri="off"),
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The label set of a run with one actor to which nothing happens."""
    labels = tmp_path_factory.mktemp("undisturbed") / "labels"
    result = extract_free_masks(make_job(labels), storage=str(labels.parent))
    assert result.labelled_shards == tuple(shard_name(shard) for shard in range(SHARDS))
    assert (result.images, result.unreadable) == (SHARDS * SAMPLES_PER_SHARD, len(UNREADABLE))
    return labels


def contents(labels: Path) -> dict[str, bytes]:
    """All of a label set; what a write that was killed has left behind begins with a dot and is no part of it."""
    return {path.name: path.read_bytes() for path in labels.iterdir() if not path.name.startswith(".")}


def finished_shards(labels: Path) -> list[Path]:
    return sorted(labels.glob("shard-*.parquet"))


def wait_for_first_shard(labels: Path, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not finished_shards(labels):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no shard was finished in {seconds} s")
        time.sleep(0.005)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and everything that it has started, Ray's daemons and workers included."""
    root = psutil.Process(process.pid)
    root.suspend()  # it starts nothing more while it is counted
    family = [*root.children(recursive=True), root]
    for member in family:
        member.kill()
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(family[:-1], timeout=30)
    assert not alive


def test_every_image_is_accounted_for_once(undisturbed: Path, dataset: Path) -> None:
    images = read_dataset_manifest(str(dataset))
    manifest = read_label_manifest(str(undisturbed))
    assert manifest.plan.dataset_digest == images.digest
    assert manifest.plan.kind == "free-masks"

    found = 0
    for shard, file in zip(images.shards, manifest.files, strict=True):
        records = read_label_file(str(undisturbed), file)
        samples = list(read_shard(str(dataset), shard))
        assert [record.key for record in records] == [each.key for each in samples]
        assert [record.image_id for record in records] == [each.image_id for each in samples]
        assert [record.key for record in records if record.error] == [
            key for key in sorted(UNREADABLE) if key in {each.key for each in samples}
        ]
        assert not any(record.instances for record in records if record.error)
        found += sum(len(record.instances) for record in records)
    assert found == manifest.instances > SHARDS * SAMPLES_PER_SHARD / 2
    first = read_label_file(str(undisturbed), manifest.files[0])
    assert any(not record.instances and not record.error for record in first)


def test_the_masks_are_free_masks_of_the_photos(undisturbed: Path, dataset: Path, weights: Path) -> None:
    shard = read_dataset_manifest(str(dataset)).shards[0]
    plan = BatchPlan(short_side=96, long_side_max=160, batch_size=4)
    batch = decode_batch(next(read_batches(str(dataset), shard, plan)), plan)
    label = FreeMaskLabeller(SETTINGS, torch.load(weights, weights_only=True), torch.device("cpu"))
    pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2)
    images = ImageBatch(pixels, torch.from_numpy(batch.sizes), tuple(entry.labels.image_id for entry in batch.readable))
    expected = label(images, [(entry.labels.height, entry.labels.width) for entry in batch.readable])

    stored = read_label_file(str(undisturbed), read_label_manifest(str(undisturbed)).files[0])

    assert sum(map(len, expected)) > 0
    for entry, instances in zip(batch.readable, expected, strict=True):
        found = stored[entry.index].instances
        assert [each.rle for each in found] == [each.rle for each in instances]
        assert [each.bbox_xywh for each in found] == [each.bbox_xywh for each in instances]
        np.testing.assert_allclose([each.score for each in found], [each.score for each in instances], atol=1e-5)
        for one, other in zip(found, instances, strict=True):
            np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-3)
            assert np.linalg.norm(one.embedding.astype(np.float32)) == pytest.approx(1.0, abs=1e-2)


def test_a_finished_label_set_is_not_made_again(undisturbed: Path, make_job: MakeJob) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}

    result = extract_free_masks(make_job(undisturbed), storage=str(undisturbed.parent))

    assert result.labelled_shards == ()
    assert len(result.skipped_shards) == SHARDS
    assert result.images == SHARDS * SAMPLES_PER_SHARD
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


def test_other_settings_are_refused(undisturbed: Path, make_job: MakeJob) -> None:
    other = SETTINGS.model_copy(update={"batch_size": 3})

    with pytest.raises(UsageError, match="batch_size: 4, now 3"):
        extract_free_masks(make_job(undisturbed, settings=other), storage=str(undisturbed.parent))


def test_a_job_that_is_killed_and_started_again_ends_with_the_same_bytes(
    undisturbed: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    labels = tmp_path / "labels"
    job = make_job(labels)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with (tmp_path / "killed.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_JOB, job.model_dump_json(), str(tmp_path)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_first_shard(labels)
        finally:
            kill_all(process)
    before = {path.name: path.stat().st_mtime_ns for path in finished_shards(labels)}
    assert 0 < len(before) < SHARDS, "the job was not killed in its middle"
    assert not (labels / "manifest.json").exists()

    result = extract_free_masks(job, storage=str(tmp_path))

    assert set(result.skipped_shards) == {name.removesuffix(".parquet") for name in before}
    assert len(result.labelled_shards) == SHARDS - len(before)
    assert {name: (labels / name).stat().st_mtime_ns for name in before} == before
    assert contents(labels) == contents(undisturbed)


def test_two_actors_one_of_them_killed_make_the_same_bytes_as_one(
    undisturbed: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    labels = tmp_path / "labels"
    killed: list[int] = []

    def kill_one_actor() -> None:
        wait_for_first_shard(labels)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # others come and go meanwhile
                if "_LabellingActor" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return

    killer = threading.Thread(target=kill_one_actor)
    killer.start()
    result = extract_free_masks(make_job(labels, workers=2), storage=str(tmp_path))
    killer.join()

    assert len(killed) == 1
    assert result.labelled_shards == tuple(shard_name(shard) for shard in range(SHARDS))
    assert contents(labels) == contents(undisturbed)


def test_too_many_unreadable_photos_stop_the_job_until_more_are_allowed(
    undisturbed: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    labels = tmp_path / "labels"
    strict = SETTINGS.model_copy(update={"max_bad_samples": 2.5 / (SHARDS * SAMPLES_PER_SHARD)})

    with pytest.raises(JobError, match=r"3 unreadable photos.*max_bad_samples=.*first: k0\d\d\d \(") as stopped:
        extract_free_masks(make_job(labels, settings=strict), storage=str(tmp_path))
    assert sum(key in str(stopped.value) for key in UNREADABLE) == 3
    finished = len(finished_shards(labels))
    assert 0 < finished < SHARDS

    with pytest.raises(JobError, match="3 unreadable photos"):  # at once, from the finished shards
        extract_free_masks(make_job(labels, settings=strict), storage=str(tmp_path))
    result = extract_free_masks(make_job(labels), storage=str(tmp_path))

    assert len(result.skipped_shards) == finished
    assert contents(labels) == contents(undisturbed)


def test_an_altered_shard_stops_the_job(make_job: MakeJob, dataset: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    altered.mkdir()
    shard = write_shard(str(altered), shard_name(0), (sample(index) for index in range(8, 12)))
    wrong = ShardInfo(shard.name, shard.samples, shard.bytes, "0" * 64)
    write_dataset_manifest(str(altered), DatasetManifest(1, (wrong,), annotated=False, categories=(), skipped=()))
    job = make_job(tmp_path / "labels").model_copy(update={"dataset": str(altered)})

    with pytest.raises(JobError, match=r"shard-000000\.tar.*sha256"):
        extract_free_masks(job, storage=str(tmp_path))

    assert finished_shards(tmp_path / "labels") == []


def test_a_pool_that_does_not_fit_is_refused_before_it_hangs(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"resources\.workers=8 of 1 CPUs each.*6 CPUs"):
        extract_free_masks(make_job(tmp_path / "labels", workers=8), storage=str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_a_gpu_that_torch_cannot_use_is_named(make_job: MakeJob, tmp_path: Path) -> None:
    """All of the way to it is a GPU job's: the pool's tasks, its resources and its batches."""
    job = make_job(tmp_path / "labels")
    job = job.model_copy(update={"resources": ResourceSettings(gpus_per_worker=1.0)})

    with pytest.raises(JobError, match=r"gpus_per_worker=1: Ray gave this worker a GPU that torch .* cannot use"):
        extract_free_masks(job, storage=str(tmp_path))
    assert finished_shards(tmp_path / "labels") == []


def test_weights_of_another_network_are_refused_before_any_work(make_job: MakeJob, tmp_path: Path) -> None:
    other = SETTINGS.model_copy(update={"backbone": "resnet50"})

    with pytest.raises(UsageError, match="resnet18"):
        extract_free_masks(make_job(tmp_path / "labels", settings=other), storage=str(tmp_path))
    assert not (tmp_path / "labels").exists()


def test_a_data_set_without_photos_gives_an_empty_label_set(make_job: MakeJob, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    write_dataset_manifest(
        str(empty),
        DatasetManifest(1, (write_shard(str(empty), shard_name(0), ()),), annotated=False, categories=(), skipped=()),
    )
    job = make_job(tmp_path / "labels").model_copy(update={"dataset": str(empty)})

    result = extract_free_masks(job, storage=str(tmp_path))

    assert (result.images, result.instances) == (0, 0)
    assert isinstance(read_label_manifest(job.labels), LabelManifest)
