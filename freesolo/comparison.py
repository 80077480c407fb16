"""Stage `evaluate`: several label sets against one data set's annotations, on the same images, and a page to look at.

The table has a row a label set, in the order given: Free Mask, then each round of SOLO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from freesolo.data.coco import CocoRecord, ground_truth, sample_labels
from freesolo.data.labels import ImageLabels, LabelSet, read_label_file, read_labels_of
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.shards import DatasetManifest, read_dataset_manifest, read_shard
from freesolo.errors import UsageError
from freesolo.evaluation import Detections, Metrics, evaluate_by_category, evaluate_class_agnostic
from freesolo.ops.masks import decode_rle
from freesolo.report.records import GalleryLayer, GalleryPhoto

TRUTH = "Annotations"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the evaluation of some label sets gave.

    Attributes:
        dataset_digest: Of the data set that they were evaluated on.
        rows: Metrics of each label set.
        gallery: Some of the photos with the masks of all label sets and the annotations.
    """

    dataset_digest: str
    rows: dict[str, Metrics]
    gallery: tuple[GalleryPhoto, ...]


def compare(dataset: str, label_sets: Mapping[str, str], *, gallery_images: int) -> Comparison:
    """Evaluate label sets against the annotations of their data set.

    Args:
        dataset: URL of an annotated data set.
        label_sets: A URL for each name, in the order of the table.
        gallery_images: Photos in the gallery, the first ones of the data set.

    Raises:
        UsageError: The data set has no annotations, or a label set is of another data set.
    """
    manifest = check_comparable(dataset, label_sets)
    truth = ground_truth(dataset)
    rows = {name: _evaluate(truth, read_labels_of(url, manifest), manifest) for name, url in label_sets.items()}
    return Comparison(manifest.digest, rows, gallery(dataset, label_sets, images=gallery_images))


def check_comparable(dataset: str, label_sets: Mapping[str, str]) -> DatasetManifest:
    """The manifest of a data set that label sets can be evaluated on.

    Raises:
        UsageError: It has no annotations, or a label set is of another data set or tells other categories apart.
    """
    manifest = read_dataset_manifest(dataset)
    if not manifest.annotated:
        raise UsageError(f"{dataset}: has no annotations to evaluate against; pack it from a COCO JSON")
    for url in label_sets.values():
        if unknown := set(_category_names(read_labels_of(url, manifest))) - {one["id"] for one in manifest.categories}:
            raise UsageError(f"{url}: its category {min(unknown)} is none of those of {dataset}")
    return manifest


def check_held_out(evaluation_dataset: str, trained_on: DatasetManifest, *, num_categories: int) -> None:
    """See that models that are trained on a data set can be evaluated on another.

    Args:
        evaluation_dataset: URL.
        trained_on: Manifest of the other.
        num_categories: That the models tell apart; 1: none.

    Raises:
        UsageError: It is the same data set, has no annotations, or lacks a category that models would know.
    """
    held_out = check_comparable(evaluation_dataset, {})
    if held_out.digest == trained_on.digest:
        raise UsageError(f"evaluation_dataset: {evaluation_dataset} is what is trained on; give other photos")
    unknown = {one["id"] for one in trained_on.categories} - {one["id"] for one in held_out.categories}
    if num_categories > 1 and unknown:
        raise UsageError(
            f"evaluation_dataset: {evaluation_dataset} does not know category {min(unknown)} of those trained on; "
            "give one of the same categories"
        )


def _evaluate(truth: CocoRecord, labels: LabelSet, manifest: DatasetManifest) -> Metrics:
    """By category too, where the label set tells any apart."""
    metrics = evaluate_class_agnostic(truth, _detections(labels))
    if not _category_names(labels):
        return metrics
    names = {category["id"]: str(category.get("name", category["id"])) for category in manifest.categories}
    return replace(metrics, categories=evaluate_by_category(truth, _detections(labels), names))


def _category_names(labels: LabelSet) -> dict[int, str]:
    """By COCO's id, ascending, so that a label's category is a place among them; none for class-agnostic labels."""
    known = labels.manifest.plan.model.get("categories", ())
    return {category["id"]: str(category.get("name", category["id"])) for category in known}


def gallery(dataset: str, label_sets: Mapping[str, str], *, images: int) -> tuple[GalleryPhoto, ...]:
    """The first photos of a data set with the masks of each label set, and its own annotations where it has any.

    Args:
        dataset: URL of a data set.
        label_sets: A URL for each name, in the order of the layers.
        images: How many photos, at most.

    Raises:
        UsageError: A label set is of another data set.
    """
    manifest = read_dataset_manifest(dataset)
    opened = {name: read_labels_of(url, manifest) for name, url in label_sets.items()}
    photos: list[GalleryPhoto] = []
    for number, shard in enumerate(manifest.shards):
        if len(photos) >= images:
            break
        by_key = {
            name: {labels.key: labels for labels in read_label_file(label_set.url, label_set.manifest.files[number])}
            for name, label_set in opened.items()
        }
        for sample in read_shard(dataset, shard):
            if len(photos) >= images:
                break
            layers = [_layer(name, labels[sample.key]) for name, labels in by_key.items()]
            if manifest.annotated:
                layers.append(_layer(TRUTH, sample_labels(sample), scored=False))
            try:
                pixels = decode_photo(sample.image_bytes, size=(sample.height, sample.width))
            except PhotoError:
                continue  # counted and named where it was labelled; there is nothing to look at
            photos.append(GalleryPhoto(sample.file_name, pixels, tuple(layers)))
    return tuple(photos)


def _detections(label_set: LabelSet) -> Iterator[Detections]:
    coco_ids = list(_category_names(label_set))
    for file in label_set.manifest.files:
        for labels in read_label_file(label_set.url, file):
            yield Detections(
                image_id=labels.image_id,
                rles=[instance.rle for instance in labels.instances],
                boxes_xywh=[instance.bbox_xywh for instance in labels.instances],
                scores=[instance.score for instance in labels.instances],
                category_ids=[coco_ids[one.category_id] for one in labels.instances] if coco_ids else None,
            )


def _layer(name: str, labels: ImageLabels, *, scored: bool = True) -> GalleryLayer:
    masks = decode_rle([instance.rle for instance in labels.instances], labels.height, labels.width).numpy()
    scores = np.array([instance.score for instance in labels.instances], np.float64)
    return GalleryLayer(name, masks, scores if scored else None)


def as_table(rows: Mapping[str, Metrics]) -> str:
    """The comparison as a Markdown table, in percent; a dash where nothing could be measured."""
    columns = {"mask AP50": "segm/AP50", "mask AP": "segm/AP", "mask AR100": "segm/AR100", "box AP50": "bbox/AP50"}
    if any(row.categories for row in rows.values()):
        columns |= {"AP by category": "category/AP", "AP50 by category": "category/AP50"}
    lines = ["| label set | " + " | ".join([*columns, "CorLoc"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, row in rows.items():
        values = row.as_dict()
        shown = [values.get(key) for key in [*columns.values(), "corloc"]]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{100 * v:.1f}" for v in shown) + " |")
    return "\n".join(lines) + "\n"
