"""COCO's JSON, in and out: annotations of data sets as labels, and data sets and label sets as COCO files.

Categories: COCO's ids are any positive numbers, a model's are 0..C-1. `category_index` is the one map between them. A
class-agnostic model has the single category 0, which is written as COCO's category 1, "object".
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from freesolo.data import files
from freesolo.data.documents import short
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import read_label_file, read_label_manifest
from freesolo.data.shards import DatasetManifest, Sample, ShardInfo, read_dataset_manifest, read_shard
from freesolo.errors import UsageError
from freesolo.ops.mask_storage import Rle, rle_from_coco
from freesolo.settings import MAX_INSTANCES

OBJECT_CATEGORY: dict[str, Any] = {"id": 1, "name": "object", "supercategory": "object"}

CocoRecord = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CocoStream:
    """A COCO document that is read as it is written.

    Attributes:
        info: Where it comes from.
        categories: COCO's.
        images: Each image's record with the records of its annotations, once over.
    """

    info: CocoRecord
    categories: tuple[CocoRecord, ...]
    images: Iterator[tuple[CocoRecord, list[CocoRecord]]]


def category_index(categories: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """A model's category, 0..C-1, of each COCO category id: in ascending order of the ids."""
    return {coco_id: index for index, coco_id in enumerate(sorted(category["id"] for category in categories))}


def annotation_rle(annotation: Mapping[str, Any], height: int, width: int) -> Rle:
    """The mask of an annotation in an image of `height` x `width` pixels, whichever form its segmentation has.

    An annotation without a segmentation is its box, which is all that is known of its shape; one whose polygons are
    points or lines is an empty mask.

    Raises:
        ValueError: Neither a segmentation nor a box, an encoding of another size, or a field that is not COCO's; names
            the annotation.
    """
    try:
        _check_fields(annotation)
        segmentation = annotation.get("segmentation") or [_box_polygon(annotation["bbox"])]
        if isinstance(segmentation, list):
            segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
            if not segmentation:
                return rle_from_coco({"size": [height, width], "counts": [height * width]}, height, width)
        return rle_from_coco(segmentation, height, width)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"annotation {short(annotation.get('id'))} is damaged: {' '.join(reason.split())}") from error


def without_masks(sample: Sample) -> Sample:
    """The sample with annotations that have lost their segmentations: their boxes are all that is known.

    An annotation without a box keeps its segmentation, whose box it is.
    """
    annotations = [
        {name: value for name, value in annotation.items() if name != "segmentation" or "bbox" not in annotation}
        for annotation in sample.annotations
    ]
    return replace(sample, annotations=tuple(annotations))


def category_names(categories: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """The name of each category by COCO's id, its id where it has none; with its id where two have the same."""
    names = {category["id"]: str(category.get("name", category["id"])) for category in categories}
    times = Counter(names.values())
    return {number: name if times[name] == 1 else f"{name} ({number})" for number, name in names.items()}


def label_category_ids(labels: ImageLabels, coco_ids: Sequence[int], url: str) -> list[int]:
    """COCO's category of each instance.

    Args:
        labels: Of one image.
        coco_ids: Of the categories that the labels' maker tells apart, ascending.
        url: Of the label set, for the error.

    Raises:
        UsageError: An instance is of none of these categories.
    """
    worst = max((instance.category_id for instance in labels.instances), default=-1)
    if worst >= len(coco_ids):
        raise UsageError(f"{url}: its category {worst} is none of {len(coco_ids)}; give the categories of its model")
    return [coco_ids[instance.category_id] for instance in labels.instances]


def sample_labels(sample: Sample, categories: Mapping[int, int] | None = None) -> ImageLabels:
    """The labels that a sample's own annotations are: one instance an object, score 1, no embedding.

    Crowd regions and masks without a pixel are left out: neither is an object to learn.

    Args:
        sample: Of an annotated data set; without annotations it has no instances.
        categories: `category_index` of the data set's categories; None: class-agnostic, all are category 0.

    Returns:
        Labels in the order of the annotations; with `error` set and no instances if an annotation is damaged.
    """
    error = None
    instances: list[LabelledInstance] = []
    try:
        for annotation in sample.annotations:
            if annotation.get("iscrowd", 0):
                continue
            instance = _instance(annotation, sample, categories)
            if instance is not None:
                instances.append(instance)
        if len(instances) > MAX_INSTANCES:
            raise ValueError(f"{len(instances)} annotated objects, more than {MAX_INSTANCES} in one photo")
    except ValueError as damage:
        error, instances = str(damage), []
    return ImageLabels(
        key=sample.key,
        image_id=sample.image_id,
        file_name=sample.file_name,
        width=sample.width,
        height=sample.height,
        error=error,
        instances=tuple(instances),
    )


def export_coco(url: str, categories: Sequence[Mapping[str, Any]] | None = None) -> CocoRecord:
    """A data set or a label set as one COCO document, images and annotations by ascending id.

    A data set's annotations are those that it was packed from, unchanged. A label set's have `id` (the mask id),
    `image_id`, `category_id`, `segmentation` (RLE, counts as text), `bbox` (xywh), `area`, `score` and `iscrowd`.

    Args:
        url: Of the data set or label set.
        categories: COCO's categories of a label set, in place of those that it says itself, if any.

    Raises:
        UsageError: Nothing is there, or a category of the labels is not among `categories`.
        JobError: A shard or a label file is damaged, or the store cannot be reached.
    """
    return _collect(open_coco(url, categories))


def write_coco(url: str, destination: str, categories: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Write what `export_coco` returns to a JSON file, in the order of the shards and in constant memory.

    Args:
        url: Of the data set or label set.
        destination: URL of the file; appears whole or not at all.
        categories: As in `export_coco`.

    Raises:
        UsageError, JobError: As `export_coco`.
    """
    stream = open_coco(url, categories)
    with files.atomic_writer(destination) as output, tempfile.TemporaryFile() as annotations:
        head = {"info": stream.info, "licenses": [], "categories": list(stream.categories)}
        output.write(_compact(head)[:-1] + b',"images":[')
        write_image, write_annotation = _list_writer(output.write), _list_writer(annotations.write)
        for image, image_annotations in stream.images:
            write_image(image)
            for annotation in image_annotations:
                write_annotation(annotation)
        output.write(b'\n],"annotations":[')
        annotations.seek(0)
        shutil.copyfileobj(annotations, output)
        output.write(b"\n]}\n")


def ground_truth(dataset_url: str) -> CocoRecord:
    """The annotations of a data set in the form that COCO's evaluation needs.

    Beside what `export_coco` does: `iscrowd` and `area` are filled in where they are missing, every segmentation is an
    RLE, and annotations are numbered from 1 if one has no id or 0, which pycocotools takes for "no match". Crowd
    regions are kept: evaluation ignores what overlaps them.

    Args:
        dataset_url: Of the data set.

    Raises:
        UsageError: No data set is there, it is not annotated, or an annotation is damaged.
        JobError: A shard is damaged, or the store cannot be reached.
    """
    manifest = read_dataset_manifest(dataset_url)
    if not manifest.annotated:
        raise UsageError(f"{dataset_url}: not annotated, so there is nothing to compare with; pack a COCO JSON")
    return _ready_for_evaluation(_open_data_set(dataset_url, manifest), dataset_url)


def shard_ground_truth(dataset_url: str, shard: ShardInfo) -> CocoRecord:
    """The images and annotations that `ground_truth` has of one shard; the manifest is not read again for it.

    Args:
        dataset_url: Of an annotated data set.
        shard: One of its shards.

    Raises:
        UsageError: An annotation is damaged.
        JobError: The shard is damaged, or the store cannot be reached.
    """
    return _ready_for_evaluation(CocoStream({}, (), _shard_images(dataset_url, shard)), dataset_url)


def _ready_for_evaluation(stream: CocoStream, dataset_url: str) -> CocoRecord:
    document = _collect(stream)
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    try:
        annotations = [_complete(annotation, *sizes[annotation["image_id"]]) for annotation in document["annotations"]]
    except ValueError as error:
        raise UsageError(f"{dataset_url}: {error}") from error
    if not all(annotation.get("id") for annotation in annotations):
        annotations = [annotation | {"id": number} for number, annotation in enumerate(annotations, start=1)]
    return document | {"annotations": annotations}


def open_coco(url: str, categories: Sequence[Mapping[str, Any]] | None = None) -> CocoStream:
    """A data set or a label set as a stream of COCO records, in the order of the shards.

    Args:
        url: Of the data set or label set.
        categories: As in `export_coco`.

    Raises:
        UsageError, JobError: As `export_coco`, at once or while the stream is read.
    """
    if files.exists(files.join(url, "plan.json")):
        return _open_label_set(url, categories)
    if not files.exists(files.join(url, "manifest.json")):
        raise UsageError(f"{url}: no data set there, and no label set (no manifest.json); give the folder that has one")
    return _open_data_set(url, read_dataset_manifest(url))


def _open_data_set(url: str, manifest: DatasetManifest) -> CocoStream:
    info = {"description": "a data set packed by freesolo", "dataset_digest": manifest.digest}
    images = chain.from_iterable(_shard_images(url, shard) for shard in manifest.shards)
    return CocoStream(info, manifest.categories, images)


def _shard_images(url: str, shard: ShardInfo) -> Iterator[tuple[CocoRecord, list[CocoRecord]]]:
    for sample in read_shard(url, shard):
        # Whose annotation it is, is told by the record that it lies in.
        yield _image_record(sample), [one | {"image_id": sample.image_id} for one in sample.annotations]


def _open_label_set(url: str, categories: Sequence[Mapping[str, Any]] | None) -> CocoStream:
    manifest = read_label_manifest(url)
    known = tuple(dict(one) for one in categories or manifest.plan.model.get("categories") or (OBJECT_CATEGORY,))
    coco_ids = sorted(category["id"] for category in known)

    def images() -> Iterator[tuple[CocoRecord, list[CocoRecord]]]:
        for file in manifest.files:
            for record in read_label_file(url, file):
                if not record.is_lost:
                    yield _image_record(record), _label_annotations(record, coco_ids, url)

    plan = manifest.plan
    info = {
        "description": f"{plan.kind} made by freesolo",
        "labels_digest": manifest.digest,
        "dataset_digest": plan.dataset_digest,
        "model": plan.model,
        "parent": plan.parent,
    }
    return CocoStream(info, known, images())


def _image_record(image: Sample | ImageLabels) -> CocoRecord:
    return {"id": image.image_id, "file_name": image.file_name, "width": image.width, "height": image.height}


def _label_annotations(record: ImageLabels, coco_ids: Sequence[int], url: str) -> list[CocoRecord]:
    if not record.instances:
        return []
    category_ids = label_category_ids(record, coco_ids, url)
    areas = coco_mask.area([instance.rle for instance in record.instances])
    return [
        {
            "id": instance.mask_id,
            "image_id": record.image_id,
            "category_id": category_id,
            "segmentation": instance.rle,
            "bbox": list(instance.bbox_xywh),
            "area": int(area),
            "score": instance.score,
            "iscrowd": 0,
        }
        for instance, category_id, area in zip(record.instances, category_ids, areas, strict=True)
    ]


def _instance(
    annotation: Mapping[str, Any], sample: Sample, categories: Mapping[int, int] | None
) -> LabelledInstance | None:
    rle = annotation_rle(annotation, sample.height, sample.width)
    if not coco_mask.area(rle):
        return None
    category = 0
    if categories is not None:
        if annotation.get("category_id") not in categories:
            raise ValueError(
                f"annotation {annotation.get('id')} has no known category: {annotation.get('category_id')}"
            )
        category = categories[annotation["category_id"]]
    x, y, width, height = (float(side) for side in coco_mask.toBbox(rle))
    return LabelledInstance(0, rle, (x, y, width, height), 1.0, category, np.zeros(0, np.float16))


def _complete(annotation: CocoRecord, height: int, width: int) -> CocoRecord:
    rle = annotation_rle(annotation, height, width)
    filled = {"iscrowd": 0, "area": int(coco_mask.area(rle)), "bbox": [float(side) for side in coco_mask.toBbox(rle)]}
    return filled | annotation | {"segmentation": rle}


def _check_fields(annotation: Mapping[str, Any]) -> None:
    """Beside its shape, an annotation has fields that are taken as they are; each may be missing."""
    for name in ("id", "image_id", "category_id"):
        if name in annotation and type(annotation[name]) is not int:
            raise ValueError(f"{name}={short(annotation[name])} is not a whole number")
    if "iscrowd" in annotation and annotation["iscrowd"] not in (0, 1):
        raise ValueError(f"iscrowd={short(annotation['iscrowd'])} is neither 0 nor 1")
    if "area" in annotation and not _is_finite(annotation["area"]):
        raise ValueError(f"area={short(annotation['area'])} is not a number")
    box = annotation.get("bbox", [0, 0, 0, 0])
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_finite(side) for side in box):
        raise ValueError(f"bbox={short(box)} is not x, y, width, height")


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and -1e15 < value < 1e15  # type: ignore[operator]  # which NaN is not, either


def _box_polygon(bbox: Sequence[float | int]) -> list[float]:
    x, y, width, height = (float(side) for side in bbox)
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _collect(stream: CocoStream) -> CocoRecord:
    images: list[CocoRecord] = []
    annotations: list[CocoRecord] = []
    for image, image_annotations in stream.images:
        images.append(image)
        annotations += image_annotations
    return {
        "info": stream.info,
        "licenses": [],
        "categories": list(stream.categories),
        "images": sorted(images, key=lambda image: int(image["id"])),
        "annotations": sorted(annotations, key=_id_or_0),
    }


def _id_or_0(annotation: CocoRecord) -> int:
    number = annotation.get("id", 0)
    return number if type(number) is int else 0  # what is damaged is told where it is used


def _list_writer(write: Callable[[bytes], int]) -> Callable[[CocoRecord], None]:
    """Write records as the elements of a JSON list, one a line."""
    separator = b"\n"

    def write_record(record: CocoRecord) -> None:
        nonlocal separator
        write(separator + _compact(record))
        separator = b",\n"

    return write_record


def _compact(record: CocoRecord) -> bytes:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
