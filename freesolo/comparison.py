"""Stage `evaluate`: several label sets against one data set's annotations, on the same images, and a page to look at.

The table has a row a label set, in the order given: Free Mask, then each round of SOLO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from freesolo.data.coco import ground_truth, sample_labels
from freesolo.data.labels import ImageLabels, LabelSet, read_label_file, read_labels_of
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.shards import DatasetManifest, read_dataset_manifest, read_shard
from freesolo.errors import UsageError
from freesolo.evaluation import Detections, Metrics, evaluate_class_agnostic
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
    rows = {
        name: evaluate_class_agnostic(truth, _detections(read_labels_of(url, manifest)))
        for name, url in label_sets.items()
    }
    return Comparison(manifest.digest, rows, gallery(dataset, label_sets, images=gallery_images))


def check_comparable(dataset: str, label_sets: Mapping[str, str]) -> DatasetManifest:
    """The manifest of a data set that label sets can be evaluated on.

    Raises:
        UsageError: It has no annotations, or a label set is of another data set.
    """
    manifest = read_dataset_manifest(dataset)
    if not manifest.annotated:
        raise UsageError(f"{dataset}: has no annotations to evaluate against; pack it from a COCO JSON")
    for url in label_sets.values():
        read_labels_of(url, manifest)
    return manifest


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
    for file in label_set.manifest.files:
        for labels in read_label_file(label_set.url, file):
            yield Detections(
                image_id=labels.image_id,
                rles=[instance.rle for instance in labels.instances],
                boxes_xywh=[instance.bbox_xywh for instance in labels.instances],
                scores=[instance.score for instance in labels.instances],
            )


def _layer(name: str, labels: ImageLabels, *, scored: bool = True) -> GalleryLayer:
    masks = decode_rle([instance.rle for instance in labels.instances], labels.height, labels.width).numpy()
    scores = np.array([instance.score for instance in labels.instances], np.float64)
    return GalleryLayer(name, masks, scores if scored else None)


def as_table(rows: Mapping[str, Metrics]) -> str:
    """The comparison as a Markdown table, in percent; a dash where nothing could be measured."""
    columns = {"mask AP50": "segm/AP50", "mask AP": "segm/AP", "mask AR100": "segm/AR100", "box AP50": "bbox/AP50"}
    lines = ["| label set | " + " | ".join([*columns, "CorLoc"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, row in rows.items():
        values = row.as_dict()
        shown = [values[key] for key in [*columns.values(), "corloc"]]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{100 * v:.1f}" for v in shown) + " |")
    return "\n".join(lines) + "\n"
