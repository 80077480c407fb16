"""Batch prediction on a real Ray cluster: through the same pipeline as extraction, with a segmenter in it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from freesolo.config import PredictJob
from freesolo.data.label_records import ImageLabels
from freesolo.data.labels import read_label_file, read_label_manifest
from freesolo.data.shards import (
    DatasetManifest,
    Sample,
    read_dataset_manifest,
    shard_name,
    write_dataset_manifest,
    write_shard,
)
from freesolo.errors import UsageError
from freesolo.inference.predict import predict_labels
from freesolo.inference.segment import SegmentPhotos
from freesolo.models.model_file import save_model
from freesolo.ops.masks import decode_rle
from freesolo.settings import InferenceSettings, PredictSettings, TrackingSettings
from freesolo.solo.model import Segmenter
from tests.small import small_solo

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

TINY = small_solo(fpn_channels=32, embedding_channels=8, grid_sizes=(5, 4, 3, 2, 2))
SETTINGS = PredictSettings(
    short_side=64,
    long_side_max=100,
    batch_size=2,
    max_bad_samples=0.2,
    max_width=0.95,
    # An untrained network says about 0.01 of every cell: the best five are taken.
    inference=InferenceSettings(min_category_score=0.0, min_score=0.0, max_instances=5),
)
# The first two and the last are of one extent once padded, but of three sizes.
SIZES = ((70, 90), (71, 91), (90, 60), (70, 94))
SHARDS, SAMPLES_PER_SHARD, UNREADABLE = 2, 5, 3
PARENT = "c" * 64


def draw_photo(index: int) -> np.ndarray:
    height, width = SIZES[index % len(SIZES)]
    pixels = np.random.default_rng(index).integers(0, 80, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).rectangle((10, 15, 35, 50), fill=(250 - 10 * index, 90, 200))
    return np.asarray(image)


def as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    shards = []
    for shard in range(SHARDS):
        samples = []
        for index in range(shard * SAMPLES_PER_SHARD, (shard + 1) * SAMPLES_PER_SHARD):
            height, width = SIZES[index % len(SIZES)]
            data = b"" if index == UNREADABLE else as_png(draw_photo(index))
            samples.append(Sample(f"k{index}", data, 100 + index, f"{index}.png", width, height))
        shards.append(write_shard(str(folder), shard_name(shard), samples))
    manifest = DatasetManifest(1, tuple(shards), annotated=False, categories=(), skipped=())
    write_dataset_manifest(str(folder), manifest)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    segmenter = Segmenter(TINY).initialise(torch.Generator().manual_seed(0))
    save_model(path, "segmenter", TINY.model_dump(), segmenter.state_dict(), {"labels_digest": PARENT})
    return path


MakeJob = Callable[..., PredictJob]


@pytest.fixture(scope="module")
def make_job(dataset: Path, model: Path) -> MakeJob:
    def make(labels: Path, *, weights: Path | None = None, settings: PredictSettings = SETTINGS) -> PredictJob:
        return PredictJob(
            dataset=str(dataset),
            labels=str(labels),
            weights=str(weights or model),
            predict=settings,
            tracking=TrackingSettings(uri="off"),
        )

    return make


@pytest.fixture(scope="module")
def labels(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predicted")
    result = predict_labels(make_job(folder / "labels"), storage=str(folder), kind="pseudo-labels")
    assert (result.images, result.unreadable) == (SHARDS * SAMPLES_PER_SHARD, 1)
    assert result.instances > 0
    return folder / "labels"


def read_all(labels: Path) -> list[ImageLabels]:
    manifest = read_label_manifest(str(labels))
    return [record for file in manifest.files for record in read_label_file(str(labels), file)]


def test_every_photo_has_what_the_segmenter_finds_in_it(labels: Path, model: Path) -> None:
    indices = [index for index in range(SHARDS * SAMPLES_PER_SHARD) if index != UNREADABLE]
    expected = dict(
        zip(indices, SegmentPhotos.from_file(model, SETTINGS)([draw_photo(index) for index in indices]), strict=True)
    )

    records = read_all(labels)

    assert [record.image_id for record in records] == [100 + index for index in range(SHARDS * SAMPLES_PER_SHARD)]
    for index, found in expected.items():
        record = records[index]
        assert record.error is None
        assert len(record.instances) == len(found)
        masks = decode_rle([instance.rle for instance in record.instances], record.height, record.width)
        # Pixels at the threshold may fall on either side, as sums are ordered by batch size.
        assert (masks == found.masks).float().mean() > 0.999
        scores = [instance.score for instance in record.instances]
        torch.testing.assert_close(torch.tensor(scores), found.scores, rtol=1e-3, atol=1e-5)
        assert scores == sorted(scores, reverse=True)
        assert all(instance.embedding.shape == (TINY.embedding_channels,) for instance in record.instances)
        assert all(instance.category_id == 0 for instance in record.instances)
    assert records[UNREADABLE].error
    assert records[UNREADABLE].instances == ()


def test_the_label_set_says_what_it_is_and_where_it_comes_from(labels: Path, dataset: Path, model: Path) -> None:
    plan = read_label_manifest(str(labels)).plan

    assert plan.kind == "pseudo-labels"
    assert plan.parent == PARENT
    assert plan.dataset_digest == read_dataset_manifest(str(dataset)).digest
    assert plan.model["weights"] == str(model)
    assert len(plan.model["sha256"]) == 64
    assert plan.settings["inference"]["max_instances"] == 5
    assert plan.settings["precision"] == "float32"


def occupied_columns(labels: Path) -> list[float]:
    """The share of its photo's columns that each mask is on: less than its box's where it has gaps."""
    return [
        share
        for record in read_all(labels)
        for share in decode_rle([each.rle for each in record.instances], record.height, record.width)
        .any(dim=1)
        .float()
        .mean(dim=1)
        .tolist()
    ]


def test_no_mask_is_as_wide_as_its_photo(labels: Path, make_job: MakeJob, tmp_path: Path) -> None:
    unfiltered = SETTINGS.model_copy(update={"max_width": 1.0})
    predict_labels(make_job(tmp_path / "labels", settings=unfiltered), storage=str(tmp_path), parent="d" * 64)

    assert any(share == 1.0 for share in occupied_columns(tmp_path / "labels"))
    assert 0.0 < max(occupied_columns(labels)) < 0.95
    plan = read_label_manifest(str(tmp_path / "labels")).plan
    assert (plan.kind, plan.parent) == ("predictions", "d" * 64)


def test_a_backbone_is_no_segmenter(make_job: MakeJob, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone.pt"
    save_model(backbone, "backbone", {"backbone": "resnet18"}, {}, {})

    with pytest.raises(UsageError, match="a segmenter is needed"):
        predict_labels(make_job(tmp_path / "labels", weights=backbone), storage=str(tmp_path))
    assert not (tmp_path / "labels").exists()
