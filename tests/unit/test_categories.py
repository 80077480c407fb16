"""Models that tell categories apart: from a data set's ids to the network's numbers, to the evaluation and back."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from freesolo.comparison import as_table, check_comparable, compare
from freesolo.config import TrainJob
from freesolo.data.coco import export_coco
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import LabelPlan, begin_label_set, finish_label_set, write_label_file
from freesolo.data.shards import (
    DatasetManifest,
    Sample,
    read_dataset_manifest,
    shard_name,
    write_dataset_manifest,
    write_shard,
)
from freesolo.data.views import SegmentationView
from freesolo.errors import UsageError
from freesolo.models.model_file import save_model
from freesolo.settings import LoopSettings, LossSettings, SegmentationViewSettings, TrackingSettings, TrainSettings
from freesolo.solo.model import Segmenter
from freesolo.solo.task import SoloTask
from freesolo.train.segmentation import load_initial_weights, segmenter_inputs
from tests.benchmarks.synthetic import segmentation_batch
from tests.small import small_solo

HEIGHT, WIDTH = 48, 64
DOG, CAR = {"id": 18, "name": "dog"}, {"id": 3, "name": "car"}
SQUARES = ((4, 6, 20), (30, 10, 24))  # x, y, side
AGNOSTIC = SegmentationViewSettings(short_sides=(HEIGHT,), flip_probability=0.0)


def square(x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + side, x : x + side] = 1
    return mask


def photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 150)).save(file, "JPEG")
    return file.getvalue()


def sample(image_id: int = 1) -> Sample:
    annotations = tuple(
        {"id": number, "image_id": image_id, "category_id": category, "bbox": [x, y, side, side]}
        for number, ((x, y, side), category) in enumerate(zip(SQUARES, (18, 3), strict=True), 1)
    )
    return Sample(f"{image_id:012d}", photo(), image_id, f"{image_id}.jpg", WIDTH, HEIGHT, annotations)


def found(number: int, category: int) -> LabelledInstance:
    x, y, side = SQUARES[number]
    rle = coco_mask.encode(np.asfortranarray(square(x, y, side)))
    rle = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    return LabelledInstance(
        0, rle, (float(x), float(y), float(side), float(side)), 0.9 - 0.1 * number, category, np.zeros(0, np.float16)
    )


def labels(*categories: int) -> ImageLabels:
    instances = tuple(found(number, category) for number, category in enumerate(categories))
    return ImageLabels("000000000001", 1, "1.jpg", WIDTH, HEIGHT, None, instances)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    url = str(tmp_path / "photos")
    shard = write_shard(url, shard_name(0), [sample()])
    write_dataset_manifest(url, DatasetManifest(1, (shard,), True, (DOG, CAR), ()))
    return url


def label_set(url: str, dataset: str, found: ImageLabels, categories: list[dict] | None) -> str:
    model = {"sha256": "ab"} | ({"categories": categories} if categories else {})
    manifest = read_dataset_manifest(dataset)
    begin_label_set(url, LabelPlan(manifest.digest, dataset, "predictions", model, {}, None))
    write_label_file(url, shard_name(0), [found])
    finish_label_set(url, manifest)
    return url


def numbers(view: SegmentationView, known: ImageLabels | None) -> list[int] | str:
    row = view.row(sample(), known, np.random.default_rng(0))
    return row.get("error") or row["category_ids"]


def test_a_data_sets_categories_are_numbered_in_ascending_order_of_their_ids() -> None:
    assert numbers(SegmentationView(AGNOSTIC, 4, category_ids=(3, 18)), None) == [1, 0]
    assert numbers(SegmentationView(AGNOSTIC, 4, category_ids=(3, 18), boxes_alone=True), None) == [1, 0]


def test_a_class_agnostic_model_sees_objects() -> None:
    assert numbers(SegmentationView(AGNOSTIC, 4), None) == [0, 0]
    assert numbers(SegmentationView(AGNOSTIC, 4), labels(1, 0)) == [0, 0]


def test_a_label_sets_categories_are_the_models_already() -> None:
    view = SegmentationView(AGNOSTIC, 4, category_ids=(3, 18))
    assert numbers(view, labels(1, 0)) == [1, 0]
    assert numbers(view, labels(2, 0)) == "its labels have a category beyond the 2 known"


def train_job(dataset: str, labels: str | None, categories: int) -> TrainJob:
    settings = TrainSettings(
        model=small_solo(num_categories=categories), supervision="masks", loop=LoopSettings(steps=1, batch_size=1)
    )
    return TrainJob(dataset=dataset, labels=labels, train=settings, tracking=TrackingSettings(uri="off"))


def test_a_model_has_as_many_categories_as_its_labels_or_one(dataset: str, tmp_path: Path) -> None:
    told_apart = label_set(str(tmp_path / "two"), dataset, labels(1, 0), [CAR, DOG])
    agnostic = label_set(str(tmp_path / "none"), dataset, labels(0, 0), None)
    for known in (None, told_apart):
        for fitting in (1, 2):
            segmenter_inputs(train_job(dataset, known, fitting), str(tmp_path))
        with pytest.raises(UsageError, match=r"num_categories=80: the labels of .* 2 categories; set it to 2, or to 1"):
            segmenter_inputs(train_job(dataset, known, 80), str(tmp_path))
    with pytest.raises(UsageError, match=r"num_categories=2: the labels of .*none have no categories; set it to 1"):
        segmenter_inputs(train_job(dataset, agnostic, 2), str(tmp_path))


def test_a_model_of_objects_begins_one_of_categories(dataset: str, tmp_path: Path) -> None:
    """All of it but what it says of categories, which begins anew."""
    agnostic = Segmenter(small_solo()).initialise(torch.Generator().manual_seed(1))
    path = tmp_path / "freesolo.pt"
    save_model(path, "segmenter", small_solo().model_dump(), agnostic.state_dict(), {})
    job = train_job(dataset, None, 2)
    job = job.model_copy(update={"train": job.train.model_copy(update={"initial_weights": str(path)})})
    weights = segmenter_inputs(job, str(tmp_path)).weights
    assert weights is not None
    fresh = Segmenter(small_solo(num_categories=2)).initialise(torch.Generator().manual_seed(2))
    begun = copy.deepcopy(fresh)
    load_initial_weights(begun, weights)
    for name, value in begun.state_dict().items():
        source = fresh if name.startswith("head.category_output.") else agnostic
        assert torch.equal(value, source.state_dict()[name]), name


def test_categories_are_evaluated_where_there_are_any(dataset: str, tmp_path: Path) -> None:
    sets = {
        "right": label_set(str(tmp_path / "right"), dataset, labels(1, 0), [CAR, DOG]),
        "swapped": label_set(str(tmp_path / "swapped"), dataset, labels(0, 1), [CAR, DOG]),
        "objects": label_set(str(tmp_path / "objects"), dataset, labels(0, 0), None),
    }
    rows = compare(dataset, sets).rows
    assert all(row.segm.ap == pytest.approx(1.0) for row in rows.values())  # as objects, all are right
    assert rows["right"].categories.by_category == pytest.approx({"car": 1.0, "dog": 1.0})
    assert rows["swapped"].categories.by_category == pytest.approx({"car": 0.0, "dog": 0.0})
    assert rows["objects"].categories is None
    assert rows["right"].as_dict()["category/AP/dog"] == pytest.approx(1.0)
    assert not any(name.startswith("category") for name in rows["objects"].as_dict())
    lines = as_table(rows).splitlines()
    assert "AP by category" in lines[0]
    assert lines[-1].count(" - ") == 2
    assert "category" not in as_table({"objects": rows["objects"]})


def test_categories_of_another_data_set_are_refused(dataset: str, tmp_path: Path) -> None:
    other = label_set(str(tmp_path / "other"), dataset, labels(0), [{"id": 5, "name": "boat"}])
    with pytest.raises(UsageError, match=r"other: its category 5 is none of those of .*photos"):
        check_comparable(dataset, {"other": other})


def test_a_label_set_is_exported_with_its_models_categories(dataset: str, tmp_path: Path) -> None:
    document = export_coco(label_set(str(tmp_path / "set"), dataset, labels(1, 0), [CAR, DOG]))
    assert document["categories"] == [CAR, DOG]
    assert [one["category_id"] for one in document["annotations"]] == [18, 3]


def test_categories_are_learnt() -> None:
    """Of the objects of a picture, every second is of category 1; a few steps tell most of them apart."""
    batch = segmentation_batch(
        2, 4, (64, 90), torch.Generator().manual_seed(0), padded_width=96, smallest=16, largest=40, embedding_channels=4
    )
    batch.instances.category_ids.copy_(torch.arange(8) % 2)
    task = SoloTask(small_solo(num_categories=2), "masks", LossSettings()).initialise(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    losses = []
    for step in range(25):
        loss = task((batch,), step)["category"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    swapped = batch.instances.category_ids.clone()
    batch.instances.category_ids.copy_(1 - swapped)
    with torch.no_grad():
        assert task((batch,), 0)["category"] > 1.5 * losses[-1]
