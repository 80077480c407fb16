"""A shard that was cut short when it was labelled costs what it lost, whatever becomes of it, and nothing else."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freesolo.comparison import compare
from freesolo.config import ANNOTATIONS
from freesolo.data.coco import annotation_rle, export_coco
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import LabelPlan, LabelSet, begin_label_set, finish_label_set, write_label_file
from freesolo.data.order import Order, Span
from freesolo.data.reading import PieceReader
from freesolo.data.shards import DatasetManifest, Sample, shard_name, write_dataset_manifest, write_shard
from freesolo.errors import UsageError
from freesolo.gallery import gallery
from freesolo.inference.batches import BatchPlan, decode_batch, read_batches
from freesolo.settings import DEFAULT_BOUNDS

SIDE = 64
BOX = [8, 16, 24, 32]
PLAN = BatchPlan(SIDE, SIDE, 2)


def photo(number: int) -> Sample:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "PNG")
    annotation = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": BOX, "iscrowd": 0}
    return Sample(f"{number:03d}", file.getvalue(), number, f"{number}.png", SIDE, SIDE, (annotation,))


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, DatasetManifest]:
    url = str(tmp_path / "data")
    shards = tuple(write_shard(url, shard_name(i), [photo(3 * i + j) for j in range(3)]) for i in range(2))
    manifest = DatasetManifest(1, shards, True, ({"id": 1, "name": "object"},), ())
    write_dataset_manifest(url, manifest)
    return url, manifest


def cut_short(url: str) -> bytes:
    """Leave one of the second shard's three photos; what it was."""
    tar = Path(url) / f"{shard_name(1)}.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    return whole


def restore(url: str, whole: bytes) -> None:
    (Path(url) / f"{shard_name(1)}.tar").write_bytes(whole)


def label(url: str, manifest: DatasetManifest, *, model: dict[str, Any] | None = None, category: int = 0) -> LabelSet:
    """By the extraction's own reading, with an object where the annotations have one."""
    labels_url = f"{url}-labels"
    begin_label_set(labels_url, LabelPlan(manifest.digest, url, "predictions", model or {}, {}, None))
    rle = annotation_rle({"bbox": BOX}, SIDE, SIDE)
    found = (LabelledInstance(0, rle, (8.0, 16.0, 24.0, 32.0), 0.9, category, np.zeros(0, np.float16)),)
    for shard in manifest.shards:
        records: dict[int, ImageLabels] = {}
        for batch in read_batches(url, shard, PLAN):
            decoded = decode_batch(batch, PLAN)
            records |= {entry.index: entry.labels for entry in decoded.unreadable}
            for entry in decoded.readable:
                one = entry.labels
                records[entry.index] = ImageLabels(
                    one.key, one.image_id, one.file_name, one.width, one.height, None, found
                )
        write_label_file(labels_url, shard.name, [records[index] for index in sorted(records)])
    return LabelSet(labels_url, finish_label_set(labels_url, manifest))


def read_to_train(url: str, manifest: DatasetManifest, labels: LabelSet) -> dict[str, str]:
    """Of each sample that cannot be used, why."""
    bad = {}
    for piece in Order(tuple(shard.samples for shard in manifest.shards), 0).pieces([Span(0, 0, 6)]):
        numbers = piece.window.shards
        reader = PieceReader(
            dataset_url=url,
            shards=tuple(manifest.shards[number] for number in numbers),
            labels_url=labels.url,
            label_files=tuple(labels.manifest.files[number] for number in numbers),
            piece=piece,
            bounds=DEFAULT_BOUNDS,
        )
        for table in reader.tables():
            bad |= {row["key"]: row["error"] for row in table.to_pylist() if row["error"]}
    return bad


def test_training_uses_what_was_labelled_of_a_shard_that_is_restored(data: tuple[str, DatasetManifest]) -> None:
    url, manifest = data
    whole = cut_short(url)
    labels = label(url, manifest)
    assert labels.manifest.unreadable == 2
    restore(url, whole)
    assert read_to_train(url, manifest, labels) == {
        key: f"no record in {shard_name(1)} of {labels.url}" for key in ("004", "005")
    }


def test_what_is_restored_is_evaluated_as_photos_in_which_nothing_was_found(data: tuple[str, DatasetManifest]) -> None:
    url, manifest = data
    whole = cut_short(url)
    labels = label(url, manifest)
    restore(url, whole)
    row = compare(url, {"found": labels.url}).rows["found"]
    assert row.as_dict()["segm/AR100"] == pytest.approx(4 / 6)


def test_what_was_lost_is_in_no_export(data: tuple[str, DatasetManifest]) -> None:
    url, manifest = data
    cut_short(url)
    document = export_coco(label(url, manifest).url)
    assert [image["id"] for image in document["images"]] == [0, 1, 2, 3]
    assert [annotation["image_id"] for annotation in document["annotations"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("restored", [False, True])
def test_a_gallery_shows_what_is_left(
    restored: bool, data: tuple[str, DatasetManifest], caplog: pytest.LogCaptureFixture
) -> None:
    url, manifest = data
    whole = cut_short(url)
    labels = label(url, manifest)
    if restored:
        restore(url, whole)
    with caplog.at_level(logging.WARNING):
        photos = gallery(url, {"found": labels.url}, images=10)
    assert [photo.file_name for photo in photos] == ["0.png", "1.png", "2.png", "3.png"]
    assert [layer.name for layer in photos[0].layers] == ["found", ANNOTATIONS]
    assert [record.message.partition(":")[0] for record in caplog.records] == ["left out of the gallery"] * (
        not restored
    )


def test_a_label_of_a_category_that_its_model_has_not_is_refused(data: tuple[str, DatasetManifest]) -> None:
    url, manifest = data
    labels = label(url, manifest, model={"categories": [{"id": 1, "name": "object"}]}, category=3)
    with pytest.raises(UsageError, match="its category 3 is none of 1"):
        compare(url, {"found": labels.url})


def test_a_gallery_goes_on_after_a_shard_that_is_missing(data: tuple[str, DatasetManifest]) -> None:
    url, manifest = data
    labels = label(url, manifest)
    (Path(url) / f"{shard_name(0)}.tar").unlink()
    assert [photo.file_name for photo in gallery(url, {"found": labels.url}, images=2)] == ["3.png", "4.png"]
    assert gallery(url, {"found": labels.url}, images=0) == ()
