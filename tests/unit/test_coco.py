"""COCO in and out: nothing lost of what came in, and what goes out is what pycocotools reads."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from freesolo.data.coco import (
    annotation_rle,
    category_index,
    category_names,
    export_coco,
    ground_truth,
    sample_labels,
    shard_ground_truth,
    write_coco,
)
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import LabelFileError, LabelPlan, begin_label_set, finish_label_set, write_label_file
from freesolo.data.shards import (
    DatasetManifest,
    Sample,
    read_dataset_manifest,
    shard_name,
    write_dataset_manifest,
    write_shard,
)
from freesolo.errors import UsageError

HEIGHT, WIDTH = 6, 8


def square(top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode("ascii")}


# The 3 x 3 square at row 2, column 1, in each of COCO's forms.
POLYGON = {"id": 5, "category_id": 18, "iscrowd": 0, "segmentation": [[1, 2, 4, 2, 4, 5, 1, 5]], "bbox": [1, 2, 3, 3]}
RLE = {"id": 6, "category_id": 3, "iscrowd": 0, "segmentation": rle(square(2, 1, 3))}
# Down the columns: column 0 and two pixels of column 1, then 3 on, 3 off, 3 on, 3 off, 3 on, the rest off.
RUNS = {"id": 7, "category_id": 3, "segmentation": {"size": [6, 8], "counts": [8, 3, 3, 3, 3, 3, 25]}}
CROWD = {"id": 8, "category_id": 3, "iscrowd": 1, "segmentation": {"size": [6, 8], "counts": [0, 48]}, "area": 48}
BOX = {"id": 9, "category_id": 3, "bbox": [1, 2, 3, 3]}


def sample(image_id: int, *annotations: dict[str, Any]) -> Sample:
    owned = tuple(annotation | {"image_id": image_id} for annotation in annotations)
    return Sample(f"{image_id:012d}", b"\xff\xd8\xff", image_id, f"é/{image_id}.jpg", WIDTH, HEIGHT, owned)


def data_set(url: str, *shards: list[Sample], annotated: bool = True) -> DatasetManifest:
    infos = tuple(write_shard(url, shard_name(i), samples) for i, samples in enumerate(shards))
    categories = ({"id": 18, "name": "dog"}, {"id": 3, "name": "car", "supercategory": "vehicle"})
    write_dataset_manifest(url, DatasetManifest(1, infos, annotated, categories if annotated else (), ()))
    return read_dataset_manifest(url)


def label_set(url: str, dataset: DatasetManifest, *shards: list[ImageLabels]) -> None:
    begin_label_set(url, LabelPlan(dataset.digest, "there", "predictions", {"sha256": "ab"}, {}, None))
    for i, records in enumerate(shards):
        write_label_file(url, shard_name(i), records)
    finish_label_set(url, dataset)


def found(mask: np.ndarray, *, score: float = 0.75, category: int = 0) -> LabelledInstance:
    x, y, w, h = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask))).tolist()
    return LabelledInstance(0, rle(mask), (x, y, w, h), score, category, np.zeros(0, np.float16))


def labels(image_id: int, *instances: LabelledInstance) -> ImageLabels:
    return ImageLabels(f"{image_id:012d}", image_id, f"é/{image_id}.jpg", WIDTH, HEIGHT, None, instances)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "set")


@pytest.mark.parametrize("annotation", [POLYGON, RLE, RUNS, BOX], ids=["polygon", "rle", "runs", "box only"])
def test_every_form_of_segmentation_is_the_same_mask(annotation: dict[str, Any]) -> None:
    encoded = annotation_rle(annotation, HEIGHT, WIDTH)
    np.testing.assert_array_equal(coco_mask.decode(encoded), square(2, 1, 3))
    assert isinstance(encoded["counts"], str)


def test_polygons_of_one_object_are_joined() -> None:
    two = {"id": 1, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2], [5, 3, 7, 3, 7, 5, 5, 5]]}
    np.testing.assert_array_equal(
        coco_mask.decode(annotation_rle(two, HEIGHT, WIDTH)), square(0, 0, 2) | square(3, 5, 2)
    )


def test_points_and_lines_are_empty_masks() -> None:
    line = {"id": 1, "segmentation": [[1, 1, 5, 5], [2, 2]], "bbox": [1, 1, 4, 4]}
    assert coco_mask.area(annotation_rle(line, HEIGHT, WIDTH)) == 0
    with_a_square = {"id": 1, "segmentation": [[1, 1, 5, 5], *POLYGON["segmentation"]]}
    assert coco_mask.area(annotation_rle(with_a_square, HEIGHT, WIDTH)) == 9


@pytest.mark.parametrize(
    "annotation",
    [
        {},
        {"segmentation": []},
        {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]},
        {"segmentation": [["1", "2", "3", "4", "5", "6"]]},
        {"segmentation": [1, 2, 3, 4, 5, 6]},
        {"segmentation": {"size": [8, 6], "counts": [48]}},
        {"segmentation": {"counts": [48]}},
        {"segmentation": "text"},
        {"bbox": [1, 2, 3]},
    ],
)
def test_damaged_annotations_are_named(annotation: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="annotation 77 is damaged: "):
        annotation_rle(annotation | {"id": 77}, HEIGHT, WIDTH)


def test_labels_of_a_sample() -> None:
    read = sample_labels(sample(4, POLYGON, CROWD, RLE))
    assert (read.key, read.image_id, read.file_name, read.width, read.height) == ("000000000004", 4, "é/4.jpg", 8, 6)
    assert read.error is None
    assert [instance.bbox_xywh for instance in read.instances] == [(1.0, 2.0, 3.0, 3.0)] * 2
    first = read.instances[0]
    assert (first.score, first.category_id, first.embedding.shape) == (1.0, 0, (0,))
    np.testing.assert_array_equal(coco_mask.decode(first.rle), square(2, 1, 3))


def test_a_sample_without_annotations_has_no_labels() -> None:
    assert sample_labels(sample(4)).instances == ()


def test_masks_without_a_pixel_are_no_labels() -> None:
    assert sample_labels(sample(4, {"id": 1, "segmentation": [[1, 1, 1, 1, 1, 1]]})).instances == ()


def test_categories_become_a_models_in_ascending_order() -> None:
    index = category_index([{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}])
    assert index == {3: 0, 18: 1}
    assert [instance.category_id for instance in sample_labels(sample(4, POLYGON, RLE), index).instances] == [1, 0]


def test_a_damaged_annotation_makes_the_sample_a_bad_one() -> None:
    read = sample_labels(sample(4, RLE, {"id": 12, "segmentation": [[1] * 7]}))
    assert read.instances == ()
    assert read.error is not None
    assert "annotation 12 is damaged" in read.error
    unknown = sample_labels(sample(4, RLE), {18: 0})
    assert unknown.error == "annotation 6 has no known category: 3"


def test_a_data_set_comes_out_as_it_went_in(url: str) -> None:
    data_set(url, [sample(9, POLYGON, CROWD), sample(2)], [sample(4, RUNS | {"extra": {"kept": [1.5]}})])
    document = export_coco(url)
    assert [image["id"] for image in document["images"]] == [2, 4, 9]
    assert document["images"][0] == {"id": 2, "file_name": "é/2.jpg", "width": 8, "height": 6}
    assert document["annotations"] == [
        POLYGON | {"image_id": 9},
        RUNS | {"extra": {"kept": [1.5]}, "image_id": 4},
        CROWD | {"image_id": 9},
    ]
    assert [category["id"] for category in document["categories"]] == [18, 3]


@pytest.fixture
def labelled(url: str, tmp_path: Path) -> str:
    dataset = data_set(str(tmp_path / "images"), [sample(9), sample(2)], [sample(4)])
    label_set(
        url,
        dataset,
        [labels(9, found(square(2, 1, 3)), found(square(0, 0, 1), score=0.5)), labels(2)],
        [labels(4, found(square(1, 1, 2), category=1))],
    )
    return url


def test_annotations_of_a_label_set(labelled: str) -> None:
    document = export_coco(labelled, [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}])
    assert [image["id"] for image in document["images"]] == [2, 4, 9]
    assert document["annotations"][0] == {
        "id": 1,
        "image_id": 9,
        "category_id": 3,
        "segmentation": rle(square(2, 1, 3)),
        "bbox": [1.0, 2.0, 3.0, 3.0],
        "area": 9,
        "score": 0.75,
        "iscrowd": 0,
    }
    assert [annotation["id"] for annotation in document["annotations"]] == [1, 2, 10_000_001]
    assert document["annotations"][2]["category_id"] == 18
    assert document["annotations"][1]["area"] == 1
    assert document["info"]["model"] == {"sha256": "ab"}


def test_categories_of_another_model_are_refused(labelled: str) -> None:
    with pytest.raises(UsageError, match="its category 1 is none of 1; give the categories of its model"):
        export_coco(labelled)


def test_class_agnostic_labels_are_objects(url: str, tmp_path: Path) -> None:
    dataset = data_set(str(tmp_path / "images"), [sample(9)])
    label_set(url, dataset, [labels(9, found(square(2, 1, 3)))])
    document = export_coco(url)
    assert document["categories"] == [{"id": 1, "name": "object", "supercategory": "object"}]
    assert document["annotations"][0]["category_id"] == 1


@pytest.mark.parametrize("kind", ["labels", "images", "empty"])
def test_the_file_holds_what_the_document_holds(labelled: str, tmp_path: Path, kind: str) -> None:
    categories = None
    if kind == "labels":
        source, categories = labelled, [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    elif kind == "images":
        source = str(tmp_path / "annotated")
        data_set(source, [sample(9, POLYGON, CROWD), sample(2)], [sample(4, RLE)])
    else:
        source = str(tmp_path / "nothing")
        data_set(source)
    destination = tmp_path / "out" / "coco.json"
    write_coco(source, str(destination), categories)
    written = json.loads(destination.read_text(encoding="utf-8"))
    document = export_coco(source, categories)
    for key, expected in document.items():
        if key in ("images", "annotations"):
            assert sorted(written[key], key=lambda record: record["id"]) == expected
        else:
            assert written[key] == expected
    assert written.keys() == document.keys()


def test_a_failing_export_leaves_no_file(labelled: str, tmp_path: Path) -> None:
    Path(labelled, "shard-000001.parquet").unlink()
    with pytest.raises(LabelFileError, match="the label file is missing"):
        write_coco(labelled, str(tmp_path / "coco.json"), [{"id": 1}, {"id": 2}])
    assert not list(tmp_path.glob("*coco.json*"))


def test_ground_truth_has_what_evaluation_needs(url: str) -> None:
    data_set(url, [sample(9, POLYGON, CROWD), sample(2)], [sample(4, BOX, RUNS)])
    truth = ground_truth(url)
    by_id = {annotation["id"]: annotation for annotation in truth["annotations"]}
    assert list(by_id) == [5, 7, 8, 9]
    for number in (5, 7, 9):
        annotation = by_id[number]
        assert (annotation["iscrowd"], annotation["area"], annotation["bbox"]) == (0, 9, [1, 2, 3, 3])
        np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), square(2, 1, 3))
    assert (by_id[8]["iscrowd"], by_id[8]["area"]) == (1, 48)


@pytest.mark.parametrize("named", [{}, {"image_id": 2}])
def test_an_annotation_belongs_to_the_photo_that_it_lies_with(url: str, named: dict[str, int]) -> None:
    data_set(url, [replace(sample(9), annotations=(POLYGON | named,)), sample(2)])
    assert [annotation["image_id"] for annotation in ground_truth(url)["annotations"]] == [9]
    assert [annotation["image_id"] for annotation in export_coco(url)["annotations"]] == [9]


@pytest.mark.parametrize("number", ["x", None, [1], 1.5])
def test_an_annotation_whose_number_is_none_is_told_where_it_is_used(url: str, number: Any) -> None:
    data_set(url, [sample(9, POLYGON | {"id": number}, RLE)])
    with pytest.raises(UsageError, match=r"is damaged: id=.* is not a whole number"):
        ground_truth(url)
    assert [annotation["id"] for annotation in export_coco(url)["annotations"]] == [number, 6]


def test_categories_of_one_name_are_told_apart() -> None:
    categories = [{"id": 3, "name": "fish"}, {"id": 7}, {"id": 18, "name": "fish"}]
    assert category_names(categories) == {3: "fish (3)", 7: "7", 18: "fish (18)"}


def test_ground_truth_is_that_of_its_shards(url: str) -> None:
    shards = data_set(url, [sample(9, POLYGON, CROWD), sample(2)], [sample(4, BOX, RUNS)]).shards
    truth = ground_truth(url)
    parts = [shard_ground_truth(url, shard) for shard in shards]
    for name in ("images", "annotations"):
        assert sorted(chain(*(part[name] for part in parts)), key=itemgetter("id")) == truth[name]


def test_annotation_number_0_is_not_left_to_pycocotools(url: str) -> None:
    data_set(url, [sample(9, POLYGON | {"id": 0}, RLE | {"id": 4})])
    assert [annotation["id"] for annotation in ground_truth(url)["annotations"]] == [1, 2]
    assert [annotation["id"] for annotation in export_coco(url)["annotations"]] == [0, 4]


def test_ground_truth_needs_annotations(url: str) -> None:
    data_set(url, [sample(9)], annotated=False)
    with pytest.raises(UsageError, match="not annotated"):
        ground_truth(url)


def test_ground_truth_names_a_damaged_annotation(url: str) -> None:
    data_set(url, [sample(9, {"id": 3, "segmentation": [[0] * 7]})])
    with pytest.raises(UsageError, match="set: annotation 3 is damaged"):
        ground_truth(url)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data set there"):
        export_coco(str(tmp_path))


def test_pycocotools_evaluates_labels_against_ground_truth(url: str, tmp_path: Path) -> None:
    """A label set that repeats the ground truth has an AP of 1, one of half the objects a recall of half."""
    images = str(tmp_path / "images")
    dataset = data_set(
        images, [sample(9, POLYGON), sample(2)], [sample(4, RLE | {"segmentation": rle(square(0, 5, 2))})]
    )
    exact = found(square(2, 1, 3)), found(square(0, 5, 2))
    label_set(url, dataset, [labels(9, exact[0]), labels(2)], [labels(4, exact[1])])
    half = str(tmp_path / "half")
    label_set(half, dataset, [labels(9, exact[0]), labels(2)], [labels(4)])
    assert average_precision(ground_truth(images), export_coco(url)) == pytest.approx(1.0)
    # One of two objects found, precision 1 up to a recall of 0.5: 51 of the 101 recall points.
    assert average_precision(ground_truth(images), export_coco(half)) == pytest.approx(51 / 101)


def average_precision(truth: dict[str, Any], results: dict[str, Any]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        ground, detections = COCO(), COCO()
        # COCOeval drops detections of categories that the truth does not have, even when it ignores categories.
        for annotation in truth["annotations"]:
            annotation["category_id"] = 1
        ground.dataset = truth | {"categories": results["categories"]}
        ground.createIndex()
        detections.dataset = results
        detections.createIndex()
        evaluation = COCOeval(ground, detections, "segm")
        evaluation.params.useCats = 0
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])
