"""What a label set found, by likeness: a sample of its objects, grouped by their embeddings, with pictures of some.

What is read and held is bounded, whatever the size of the label set: objects of a few of its shards, and the photos of
those that are shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float16, UInt8

from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import LabelFileError, LabelSet, read_label_file, read_labels_of
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.shards import DatasetManifest, Sample, ShardError, read_dataset_manifest, read_shard
from freesolo.grouping import group_embeddings, nearest_objects
from freesolo.ops.mask_storage import Rle, rle_pixels
from freesolo.report.pictures import cut_out
from freesolo.report.records import FoundObject, GroupedObjects, ObjectGroup
from freesolo.settings import DEFAULT_BOUNDS, BoundsSettings

OBJECTS_MAX = 4000
"""Objects that are grouped, at most."""

SHARDS_MAX = 8
"""Shards that they are of, at most: the photos shown are streamed out of these."""

SHOWN = 8
"""Objects of a group with a picture."""

NEAREST = 6
"""Objects nearest to each of those, with a picture."""

PICTURE_SIDE = 128
"""Of a picture's long side, in px: enough to tell what it is."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """An object of the sample, and which photo of which shard it is in."""

    shard: int
    key: str
    file_name: str
    size: tuple[int, int]
    rle: Rle
    score: float
    embedding: Float16[np.ndarray, " E"]


def group_objects(
    dataset: str,
    name: str,
    labels: str,
    *,
    groups: int,
    seed: int = 0,
    bounds: BoundsSettings = DEFAULT_BOUNDS,
) -> GroupedObjects:
    """Group a label set's objects by their semantic embeddings, and cut out of the photos those that stand for a group.

    Up to `OBJECTS_MAX` objects are drawn at random from up to `SHARDS_MAX` shards. A shard or a photo that cannot be
    read was counted and named where it was labelled: here it has no objects, or those have no pictures.

    Args:
        dataset: URL of the photos' data set.
        name: The label set's, for people.
        labels: URL of the label set.
        groups: How many, at least 1; fewer where fewer embeddings differ.
        seed: Of the sample and the grouping; the same gives the same.
        bounds: A larger photo is not decoded.

    Returns:
        No groups where there is no object, or objects have no embeddings.

    Raises:
        UsageError: The label set is of another data set.
        JobError: The store cannot be reached.
    """
    manifest = read_dataset_manifest(dataset)
    label_set = read_labels_of(labels, manifest)
    random = np.random.default_rng(seed)
    shards = _draw_shards(label_set, random)
    drawn = _draw_objects(label_set, shards, random)
    grouped = GroupedObjects(name, label_set.manifest.instances, len(manifest.shards), len(shards))
    if not drawn or not drawn[0].embedding.size:
        return grouped
    embeddings = np.stack([each.embedding for each in drawn])
    found = group_embeddings(embeddings, groups, seed=seed)
    shown = np.concatenate([members[:SHOWN] for members in found])
    nearest, cosines = nearest_objects(embeddings, shown, NEAREST)
    pictures = _pictures(dataset, manifest, {n: drawn[n] for n in np.union1d(shown, nearest).tolist()}, bounds)
    place = {n: at for at, n in enumerate(pictures)}
    alike = dict(zip(shown.tolist(), zip(nearest.tolist(), cosines.tolist(), strict=True), strict=True))

    def neighbours(n: int) -> tuple[tuple[int, float], ...]:
        others, likeness = alike.get(n, ((), ()))
        return tuple((place[m], cosine) for m, cosine in zip(others, likeness, strict=True) if m in place)

    return replace(
        grouped,
        groups=tuple(
            ObjectGroup(len(members), tuple(place[n] for n in members[:SHOWN].tolist() if n in place))
            for members in found
        ),
        objects=tuple(
            FoundObject(drawn[n].file_name, drawn[n].score, picture, neighbours(n)) for n, picture in pictures.items()
        ),
    )


def _draw_shards(label_set: LabelSet, random: np.random.Generator) -> list[int]:
    """Numbers of the shards to draw from, in order, among those in which something was found."""
    inhabited = [number for number, file in enumerate(label_set.manifest.files) if file.instances]
    drawn: list[int] = random.choice(inhabited, min(SHARDS_MAX, len(inhabited)), replace=False).tolist()
    return sorted(drawn)


def _draw_objects(label_set: LabelSet, shards: Sequence[int], random: np.random.Generator) -> list[_Drawn]:
    """Objects of these shards, each as likely as any other, in the order of the label set."""
    found = sum(label_set.manifest.files[number].instances for number in shards)
    chosen = np.sort(random.choice(found, min(OBJECTS_MAX, found), replace=False, shuffle=False))
    drawn: list[_Drawn] = []
    first = 0
    for number in shards:
        file = label_set.manifest.files[number]
        places = set((chosen - first).tolist())
        first += file.instances
        try:
            records = read_label_file(label_set.url, file)
        except LabelFileError as error:
            _LOG.warning("left out of the groups of objects: %s", error)
            continue
        objects = ((image, instance) for image in records for instance in image.instances)
        drawn += [_drawn(number, *each) for place, each in enumerate(objects) if place in places]
    return drawn


def _drawn(shard: int, image: ImageLabels, instance: LabelledInstance) -> _Drawn:
    # A copy, or it would keep the embeddings of its whole file in memory.
    embedding, size = instance.embedding.copy(), (image.height, image.width)
    return _Drawn(shard, image.key, image.file_name, size, instance.rle, instance.score, embedding)


def _pictures(
    dataset: str, manifest: DatasetManifest, wanted: Mapping[int, _Drawn], bounds: BoundsSettings
) -> dict[int, UInt8[np.ndarray, "h w 3"]]:
    """The wanted objects cut out of their photos, in their order; without those whose photo cannot be read."""
    pictures: dict[int, UInt8[np.ndarray, "h w 3"]] = {}
    for number in sorted({each.shard for each in wanted.values()}):
        by_key: dict[str, list[int]] = {}
        for n, each in wanted.items():
            if each.shard == number:
                by_key.setdefault(each.key, []).append(n)
        try:
            for sample in _samples_of(read_shard(dataset, manifest.shards[number], bounds=bounds), set(by_key)):
                pictures |= _cut_out(sample, {n: wanted[n] for n in by_key[sample.key]})
        except ShardError as error:
            _LOG.warning("objects without a picture: %s", error)
    return dict(sorted(pictures.items()))


def _samples_of(samples: Iterator[Sample], keys: set[str]) -> Iterator[Sample]:
    """Those of these keys; what comes after the last of them is not read."""
    missing = set(keys)
    for sample in samples:
        if sample.key in missing:
            missing.remove(sample.key)
            yield sample
        if not missing:
            return


def _cut_out(sample: Sample, wanted: Mapping[int, _Drawn]) -> dict[int, UInt8[np.ndarray, "h w 3"]]:
    """Objects of one photo; none where it cannot be read."""
    size = (sample.height, sample.width)
    try:
        photo = decode_photo(sample.image_bytes, size=size)
    except PhotoError:
        return {}  # counted and named where it was labelled, as it is where it is over the bounds
    masks = {n: rle_pixels([each.rle], *size)[0] for n, each in wanted.items() if each.size == size}
    return {n: cut_out(photo, mask, PICTURE_SIDE) for n, mask in masks.items()}
