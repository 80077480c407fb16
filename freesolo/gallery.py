"""Photos with the masks that several label sets have of them, to look at side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from freesolo.data.coco import sample_labels
from freesolo.data.label_records import ImageLabels
from freesolo.data.labels import read_label_file, read_labels_of
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.shards import read_dataset_manifest, read_shard
from freesolo.ops.masks import decode_rle
from freesolo.report.records import GalleryLayer, GalleryPhoto

TRUTH = "Annotations"


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


def _layer(name: str, labels: ImageLabels, *, scored: bool = True) -> GalleryLayer:
    masks = decode_rle([instance.rle for instance in labels.instances], labels.height, labels.width).numpy()
    scores = np.array([instance.score for instance in labels.instances], np.float64)
    return GalleryLayer(name, masks, scores if scored else None)
