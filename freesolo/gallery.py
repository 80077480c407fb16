"""Photos with the masks that several label sets have of them, to look at side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np

from freesolo.config import ANNOTATIONS
from freesolo.data.coco import sample_labels
from freesolo.data.label_records import ImageLabels
from freesolo.data.labels import LabelFileError, LabelSet, read_label_file, read_labels_of
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.shards import DatasetManifest, Sample, ShardError, read_dataset_manifest, read_shard
from freesolo.ops.masks import decode_rle
from freesolo.report.records import GalleryLayer, GalleryPhoto
from freesolo.settings import DEFAULT_BOUNDS, BoundsSettings

_LOG = logging.getLogger(__name__)


def gallery(
    dataset: str, label_sets: Mapping[str, str], *, images: int, bounds: BoundsSettings = DEFAULT_BOUNDS
) -> tuple[GalleryPhoto, ...]:
    """The first photos of a data set with the masks of each label set, and its own annotations where it has any.

    A shard, a label file or a photo that cannot be read was counted and named where it was labelled: here it is left
    out, and so is a photo that a label set has no record of.

    Args:
        dataset: URL of a data set.
        label_sets: A URL for each name, in the order of the layers.
        images: How many photos, at most.
        bounds: A larger photo is not decoded.

    Raises:
        UsageError: A label set is of another data set.
        JobError: The store cannot be reached.
    """
    manifest = read_dataset_manifest(dataset)
    opened = {name: read_labels_of(url, manifest) for name, url in label_sets.items()}
    return tuple(islice(_photos(dataset, manifest, opened, bounds), images))


def _photos(
    dataset: str, manifest: DatasetManifest, label_sets: Mapping[str, LabelSet], bounds: BoundsSettings
) -> Iterator[GalleryPhoto]:
    for number, shard in enumerate(manifest.shards):
        try:
            by_key = {
                name: {one.key: one for one in read_label_file(label_set.url, label_set.manifest.files[number])}
                for name, label_set in label_sets.items()
            }
            for sample in read_shard(dataset, shard, bounds=bounds):
                found = {name: labels[sample.key] for name, labels in by_key.items() if sample.key in labels}
                if sample.error is None and found.keys() == by_key.keys():
                    try:
                        yield _photo(sample, found, annotated=manifest.annotated)
                    except PhotoError:
                        continue  # counted and named where it was labelled; there is nothing to look at
        except (ShardError, LabelFileError) as error:
            _LOG.warning("left out of the gallery: %s", error)


def _photo(sample: Sample, found: Mapping[str, ImageLabels], *, annotated: bool) -> GalleryPhoto:
    pixels = decode_photo(sample.image_bytes, size=(sample.height, sample.width))
    layers = [_layer(name, labels) for name, labels in found.items()]
    if annotated:
        layers.append(_layer(ANNOTATIONS, sample_labels(sample), scored=False))
    return GalleryPhoto(sample.file_name, pixels, tuple(layers))


def _layer(name: str, labels: ImageLabels, *, scored: bool = True) -> GalleryLayer:
    masks = decode_rle([instance.rle for instance in labels.instances], labels.height, labels.width).numpy()
    scores = np.array([instance.score for instance in labels.instances], np.float64)
    return GalleryLayer(name, masks, scores if scored else None)
