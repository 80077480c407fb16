"""How good the found objects are: class-agnostic COCO metrics and CorLoc, and AP by category where there are any.

For the class-agnostic numbers every object counts the same, whatever it is called. A table by category exists only for
predictions that tell categories apart: a model without categories would fill it with zeros.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from freesolo.ops.mask_storage import Rle, rle_from_coco

CocoMatch: TypeAlias = dict[str, np.ndarray] | None
"""COCOeval's record of how an image's predictions match its objects; None where there are neither."""

CORLOC_IOU = 0.5
_OBJECT = 1  # the one category, of everything


@dataclass(frozen=True, slots=True)
class Detections:
    """What was predicted in one image.

    Attributes:
        image_id: The data set's id.
        rles: Masks at the image's size.
        boxes_xywh: Boxes in px, one a mask.
        scores: One a mask; only their order matters.
        category_ids: COCO's, one a mask; None where categories are not told apart.
    """

    image_id: int
    rles: Sequence[Rle]
    boxes_xywh: Sequence[Sequence[float]]
    scores: Sequence[float]
    category_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not len(self.rles) == len(self.boxes_xywh) == len(self.scores):
            raise ValueError(
                f"image {self.image_id}: {len(self.rles)} masks, {len(self.boxes_xywh)} boxes, "
                f"{len(self.scores)} scores"
            )
        if self.category_ids is not None and len(self.category_ids) != len(self.scores):
            raise ValueError(f"image {self.image_id}: {len(self.category_ids)} categories, {len(self.scores)} scores")
        if not all(math.isfinite(score) for score in self.scores):
            raise ValueError(f"image {self.image_id}: a score is not a finite number")

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class RegionMetrics:
    """COCO's twelve numbers for one kind of region, each in [0, 1]; None where there is no object to find.

    AP is averaged over the IoU thresholds 0.50, 0.55 ... 0.95 with at most 100 predictions an image. Small objects have
    up to 32 x 32 px, large ones at least 96 x 96.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None


@dataclass(frozen=True, slots=True)
class CategoryMetrics:
    """COCO's mask AP, in which a prediction is right only if its category is.

    Attributes:
        ap: Mean over the categories that have objects; None where none has.
        ap50: Likewise, at an IoU of 0.50.
        by_category: AP of each category by name, None where there is no object of it.
    """

    ap: float | None
    ap50: float | None
    by_category: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Metrics:
    """How well predictions match the objects of a data set.

    Attributes:
        segm: By overlap of masks.
        bbox: By overlap of boxes.
        corloc: Share of the images with an object in which some prediction's mask overlaps some object's with an IoU of
            0.5 or more; None without such images. (Discovery papers mostly use boxes; this is stricter.)
        images: Images evaluated, those without objects included.
        objects: Objects to find; crowd regions are none.
        predictions: Predictions given.
        categories: By category; None where predictions do not tell categories apart.
    """

    segm: RegionMetrics
    bbox: RegionMetrics
    corloc: float | None
    images: int
    objects: int
    predictions: int
    categories: CategoryMetrics | None = None

    def as_dict(self) -> dict[str, float | None]:
        """All numbers under flat names: `segm/AP50`, `bbox/AR100`, `corloc`, `images`; None where undefined.

        Where there are categories also `category/AP`, `category/AP50` and `category/AP/<name>`.
        """
        flat: dict[str, float | None] = {}
        for kind, region in (("segm", self.segm), ("bbox", self.bbox)):
            for field in fields(region):
                flat[f"{kind}/{field.name[:2].upper()}{field.name[2:]}"] = getattr(region, field.name)
        if self.categories is not None:
            flat |= {"category/AP": self.categories.ap, "category/AP50": self.categories.ap50}
            flat |= {f"category/AP/{name}": ap for name, ap in self.categories.by_category.items()}
        return flat | {
            "corloc": self.corloc,
            "images": self.images,
            "objects": self.objects,
            "predictions": self.predictions,
        }


@dataclass(frozen=True, slots=True)
class Matches:
    """How the predictions of some images match their objects: the part of an evaluation that is made image by image.

    Attributes:
        image_ids: Of the images.
        segm: pycocotools' records of how masks match: one for each of COCO's sizes and each image, in this order.
        bbox: Likewise of boxes.
        by_category: Likewise of masks, one for each category, size and image; None where categories are not told apart.
        localised: Images with an object of which some prediction found one.
        with_objects: Images with an object.
        objects: In all images; crowd regions are none.
        predictions: In all images.
    """

    image_ids: tuple[int, ...]
    segm: list[CocoMatch]
    bbox: list[CocoMatch]
    by_category: list[CocoMatch] | None
    localised: int
    with_objects: int
    objects: int
    predictions: int


def evaluate(
    ground_truth: Mapping[str, Any],
    predictions: Iterable[Detections],
    categories: Mapping[int, str] | None = None,
) -> Metrics:
    """Compare predictions with a COCO ground truth: `match` and `summarize` in one."""
    return summarize([match(ground_truth, predictions, categories)], categories)


def match(
    ground_truth: Mapping[str, Any],
    predictions: Iterable[Detections],
    categories: Mapping[int, str] | None = None,
) -> Matches:
    """Find out which predictions are right, in some of the images of an evaluation.

    As COCO does, with 100 predictions an image at most: class-agnostic (`useCats = 0`), and by category where there are
    any. Crowd regions are ignored: a prediction inside one is neither right nor wrong, and for CorLoc they are no
    objects.

    Args:
        ground_truth: COCO's dictionary: `images` (`id`, `height`, `width`) and `annotations` (`image_id`, a
            `segmentation` in any of COCO's forms; optional `iscrowd`, and `bbox` and `area`, which default to the
            mask's). Ids of annotations are not used, nor are their categories without `categories`. It is not changed.
        predictions: At most one record an image; an image without one has no predictions.
        categories: Name of each category by COCO's id, where predictions tell them apart: all that annotations and
            predictions may have.

    Raises:
        ValueError: If a prediction or an annotation is of an unknown image or not of its image's size, an image has two
            records, or a category is not among those, or missing.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    records = _by_image(predictions, sizes)
    objects = [_object(annotation, sizes, number) for number, annotation in enumerate(ground_truth["annotations"], 1)]
    masks, boxes = _results(records, "segm"), _results(records, "bbox")
    localised, with_objects = _localised(objects, records)
    by_category: list[CocoMatch] | None = None
    if categories is not None:
        named = _with_categories(objects, [one["category_id"] for one in ground_truth["annotations"]], categories)
        told = [category for record in records.values() for category in _categories_of(record)]
        by_category = _matches(sizes, named, _with_categories(masks, told, categories), "segm", sorted(categories))
    return Matches(
        image_ids=tuple(sorted(sizes)),
        segm=_matches(sizes, objects, masks, "segm"),
        bbox=_matches(sizes, objects, boxes, "bbox"),
        by_category=by_category,
        localised=localised,
        with_objects=with_objects,
        objects=sum(not thing["iscrowd"] for thing in objects),
        predictions=sum(len(record) for record in records.values()),
    )


def summarize(parts: Sequence[Matches], categories: Mapping[int, str] | None = None) -> Metrics:
    """The numbers of an evaluation whose images were matched in parts, in any order.

    They are pycocotools' own of all the images at once, with maxDets (1, 10, 100).

    Args:
        parts: Of different images.
        categories: As `match` was given.

    Returns:
        Without any object in the data set, or of a size, what measures them is None, never COCO's -1. Without any
        prediction it is 0.
    """
    with_objects = sum(part.with_objects for part in parts)
    return Metrics(
        segm=_region_metrics(parts, "segm"),
        bbox=_region_metrics(parts, "bbox"),
        corloc=sum(part.localised for part in parts) / with_objects if with_objects else None,
        images=sum(len(part.image_ids) for part in parts),
        objects=sum(part.objects for part in parts),
        predictions=sum(part.predictions for part in parts),
        categories=None if categories is None else _category_metrics(parts, categories),
    )


def _with_categories(
    regions: Sequence[dict[str, Any]], category_ids: Sequence[int], categories: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Objects or results of COCO's categories, where they were of one."""
    if unknown := set(category_ids) - set(categories):
        raise ValueError(f"category {min(unknown)} is none of the {len(categories)} known ones")
    return [region | {"category_id": each} for region, each in zip(regions, category_ids, strict=True)]


def _category_metrics(parts: Sequence[Matches], categories: Mapping[int, str]) -> CategoryMetrics:
    ids = sorted(categories)
    evaluator = _accumulated([(part.image_ids, part.by_category or []) for part in parts], "segm", ids)
    # Precision at (IoU threshold, recall, category, all sizes, 100 predictions an image); -1 where there is no object.
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    return CategoryMetrics(
        ap=_mean(precision),
        ap50=_mean(precision[:1]),
        by_category={categories[each]: _mean(precision[:, :, number]) for number, each in enumerate(ids)},
    )


def _categories_of(record: Detections) -> Sequence[int]:
    if record.category_ids is None:
        raise ValueError(f"image {record.image_id}: predictions without categories")
    return record.category_ids


def _mean(precision: Float[np.ndarray, ...]) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _by_image(predictions: Iterable[Detections], sizes: Mapping[int, tuple[int, int]]) -> dict[int, Detections]:
    records: dict[int, Detections] = {}
    for record in predictions:
        if record.image_id not in sizes:
            raise ValueError(f"predictions for image {record.image_id}, which the ground truth does not have")
        if record.image_id in records:
            raise ValueError(f"two records of predictions for image {record.image_id}")
        for rle in record.rles:
            # pycocotools would give masks of different sizes an IoU of -1 and say nothing.
            if tuple(rle["size"]) != sizes[record.image_id]:
                raise ValueError(
                    f"a mask of size {tuple(rle['size'])} (height, width) predicted for image {record.image_id} "
                    f"of {sizes[record.image_id]}"
                )
        records[record.image_id] = record
    return records


def _object(annotation: Mapping[str, Any], sizes: Mapping[int, tuple[int, int]], number: int) -> dict[str, Any]:
    """An annotation as COCOeval wants it: a copy, because COCOeval writes into it."""
    image_id = annotation["image_id"]
    if image_id not in sizes:
        raise ValueError(f"annotation {annotation.get('id', number)} is of image {image_id}, which is not listed")
    try:
        rle = rle_from_coco(annotation["segmentation"], *sizes[image_id])
    except ValueError as error:
        raise ValueError(f"annotation {annotation.get('id', number)} of image {image_id}: {error}") from error
    return {
        "id": number,  # COCOeval takes an object of id 0 for unmatched, and files in the wild repeat ids
        "image_id": image_id,
        "category_id": _OBJECT,
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "segmentation": rle,
        "bbox": list(annotation["bbox"]) if "bbox" in annotation else coco_mask.toBbox(rle).tolist(),
        "area": float(annotation["area"]) if "area" in annotation else float(coco_mask.area(rle)),
    }


def _results(records: Mapping[int, Detections], kind: Literal["segm", "bbox"]) -> list[dict[str, Any]]:
    """Predictions as COCOeval wants them; the area, which sorts them into sizes, is that of the kind of region."""
    results: list[dict[str, Any]] = []
    for record in records.values():
        for rle, box, score in zip(record.rles, record.boxes_xywh, record.scores, strict=True):
            common = {"id": len(results) + 1, "image_id": record.image_id, "category_id": _OBJECT, "score": score}
            if kind == "segm":
                results.append(common | {"segmentation": rle, "area": float(coco_mask.area(rle)), "iscrowd": 0})
            else:
                results.append(common | {"bbox": list(box), "area": box[2] * box[3], "iscrowd": 0})
    return results


def _matches(
    sizes: Mapping[int, tuple[int, int]],
    objects: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    kind: Literal["segm", "bbox"],
    categories: Sequence[int] = (),
) -> list[CocoMatch]:
    """COCOeval's records; without categories all are one."""
    with _silent():
        evaluator = _evaluator(kind, categories, _coco(sizes, objects, categories), _coco(sizes, results, categories))
        evaluator.evaluate()
    return [None if record is None else _needed(record) for record in evaluator.evalImgs]


def _needed(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What is needed of COCOeval's record of an image: which prediction found which object does not matter."""
    return {
        "dtScores": np.asarray(record["dtScores"], np.float64),
        "dtMatches": np.asarray(record["dtMatches"], bool),
        "dtIgnore": np.asarray(record["dtIgnore"], bool),
        "gtIgnore": np.asarray(record["gtIgnore"], bool),
    }


def _region_metrics(parts: Sequence[Matches], kind: Literal["segm", "bbox"]) -> RegionMetrics:
    evaluator = _accumulated([(part.image_ids, getattr(part, kind)) for part in parts], kind)
    with _silent():
        evaluator.summarize()
    return RegionMetrics(*(None if number < 0 else float(number) for number in evaluator.stats))


def _accumulated(
    parts: Sequence[tuple[tuple[int, ...], list[CocoMatch]]],
    kind: Literal["segm", "bbox"],
    categories: Sequence[int] = (),
) -> Any:
    """A COCOeval that has counted the records of all parts, its images in the order of their ids."""
    evaluator = _evaluator(kind, categories)
    image_ids = [image_id for ids, _ in parts for image_id in ids]
    groups = max(1, len(categories)) * len(evaluator.params.areaRng)
    grid: list[list[CocoMatch]] = [[] for _ in range(groups)]
    for ids, records in parts:
        for number, group in enumerate(grid):
            group += records[number * len(ids) : (number + 1) * len(ids)]
    order = sorted(range(len(image_ids)), key=image_ids.__getitem__)
    evaluator.params.imgIds = sorted(image_ids)
    evaluator.evalImgs = [group[place] for group in grid for place in order]
    evaluator._paramsEval = copy.deepcopy(evaluator.params)  # as `evaluate` leaves it; there is no public way
    with _silent():
        evaluator.accumulate()
    return evaluator


def _evaluator(kind: Literal["segm", "bbox"], categories: Sequence[int], *cocos: Any) -> Any:
    evaluator = COCOeval(*cocos, iouType=kind)
    evaluator.params.useCats = int(bool(categories))
    evaluator.params.catIds = list(categories or (_OBJECT,))
    evaluator.params.maxDets = [1, 10, 100]
    return evaluator


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Without pycocotools' progress. It is undone at the end of the block, exceptions included."""
    return contextlib.redirect_stdout(io.StringIO())


def _coco(
    sizes: Mapping[int, tuple[int, int]], annotations: Sequence[dict[str, Any]], categories: Sequence[int]
) -> Any:
    """pycocotools' index of annotations, which copes with none where its `loadRes` does not."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id, "height": height, "width": width} for image_id, (height, width) in sizes.items()],
        "categories": [{"id": category} for category in categories or (_OBJECT,)],
        "annotations": [dict(annotation) for annotation in annotations],
    }
    coco.createIndex()
    return coco


def _localised(objects: Iterable[Mapping[str, Any]], records: Mapping[int, Detections]) -> tuple[int, int]:
    """Images of which some object was found, and images with an object."""
    targets: dict[int, list[Rle]] = {}
    for thing in objects:
        if not thing["iscrowd"]:
            targets.setdefault(thing["image_id"], []).append(thing["segmentation"])
    hits = 0
    for image_id, rles in targets.items():
        record = records.get(image_id)
        if record is not None and len(record):
            overlaps = coco_mask.iou(list(record.rles), rles, [0] * len(rles))
            hits += bool(overlaps.max() >= CORLOC_IOU)
    return hits, len(targets)
