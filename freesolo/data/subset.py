"""A fraction of a data set's labelled photos, as fine-tuning with few labels takes it: seeded, balanced, nested.

Photos are ranked once for a seed, and a fraction takes as many from the front: so 5% contains 1%. The rank gives every
category its share: next comes a photo of the category of which the smallest share of photos has been taken yet. This
is stratified sampling of photos with several labels each (Sechidis et al., "On the Stratification of Multi-Label
Data", 2011), one photo at a time. FreeSOLO (arXiv:2202.12181, sec. 4.2) fine-tunes on such fractions of COCO.

A photo without objects is labelled too: somebody looked, and nothing was there. Such photos are spread evenly like a
category of their own, except that a fraction need not have one. So the fraction 1 is the whole data set.

What is taken becomes a data set of its own, the samples' bytes unchanged: who streams it need not know of fractions.
Beside its manifest, `subset.json` says what it is of.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

import numpy as np
from jaxtyping import Int64

from freesolo.data import files
from freesolo.data.coco import category_index, category_names, sample_labels
from freesolo.data.documents import differences, parse_json
from freesolo.data.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DatasetManifest,
    Sample,
    ShardInfo,
    SkippedPhoto,
    read_dataset_manifest,
    read_shard,
    shard_name,
    write_dataset_manifest,
    write_shard,
)
from freesolo.errors import UsageError
from freesolo.settings import BoundsSettings

SOURCE_NAME = "subset.json"
SAMPLES_PER_SHARD = 256
"""Of a subset, at the least: shards of which little is taken become one."""

_NAMED = 5  # categories, in an error


@dataclass(frozen=True, slots=True)
class SubsetSource:
    """What a subset is of.

    Attributes:
        dataset_digest: Of the data set.
        fraction: Of its photos, above 0, at most 1.
        seed: Of the rank.
    """

    dataset_digest: str
    fraction: float
    seed: int


@dataclass(frozen=True, slots=True)
class PhotoObjects:
    """Which categories some photos have objects of.

    Attributes:
        image_ids: Of the photos, `(photos,)`.
        counts: How many categories each has, `(photos,)`; 0 where there is no object.
        categories: The categories of all photos one after the other, each photo's without repeats, `(sum of counts,)`.
    """

    image_ids: Int64[np.ndarray, " photos"]
    counts: Int64[np.ndarray, " photos"]
    categories: Int64[np.ndarray, " pairs"]

    def __len__(self) -> int:
        return len(self.image_ids)

    def of_photo(self) -> list[list[int]]:
        """The categories of each photo."""
        stops = np.cumsum(self.counts)
        return [part.tolist() for part in np.split(self.categories, stops[:-1])] if len(self) else []


@dataclass(frozen=True, slots=True)
class ShardSurvey:
    """What a shard has to choose from.

    Attributes:
        places: Of the photos that can be taken, in the shard, `(photos,)`.
        objects: In those.
        skipped: Photos that are over the bounds, or whose annotations are damaged: nobody may read the ones, or knows
            what is in the others, so they are in no fraction.
    """

    places: Int64[np.ndarray, " photos"]
    objects: PhotoObjects
    skipped: tuple[SkippedPhoto, ...]


@dataclass(frozen=True, slots=True)
class SubsetPart:
    """What is taken of one shard: the samples at `places`, ascending, at least one."""

    shard: ShardInfo
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Subset:
    """A subset that is chosen and not written yet.

    Attributes:
        dataset_url: Of the data set.
        source: What it is of.
        shards: What each of its own shards is made of.
        categories: COCO's, of the data set.
        skipped: Photos of the data set that could not be chosen.
    """

    dataset_url: str
    source: SubsetSource
    shards: tuple[tuple[SubsetPart, ...], ...]
    categories: tuple[dict[str, Any], ...]
    skipped: tuple[SkippedPhoto, ...]

    @property
    def samples(self) -> int:
        """Photos in it."""
        return sum(len(part.places) for shard in self.shards for part in shard)


@dataclass(frozen=True, slots=True)
class SubsetTask:
    """One shard of a subset to write, by whoever gets this.

    Attributes:
        dataset_url: Of the data set.
        subset_url: Of the subset.
        name: Of the shard.
        parts: What goes into it, in order.
        bounds: No larger sample is read.
    """

    dataset_url: str
    subset_url: str
    name: str
    parts: tuple[SubsetPart, ...]
    bounds: BoundsSettings


# --- choosing -------------------------------------------------------------------------------------------------------


def survey_shard(
    url: str, shard: ShardInfo, categories: Sequence[dict[str, Any]], bounds: BoundsSettings
) -> ShardSurvey:
    """See which objects the photos of a shard have: those that a training would learn from, without crowd regions.

    Args:
        url: The data set.
        shard: As its manifest has it.
        categories: COCO's, of the data set; none: every object is of the category 0.
        bounds: Larger photos are skipped, as are those whose annotations are damaged.

    Raises:
        ShardError: The shard is damaged: what a fraction takes must not depend on what is lost.
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    index = category_index(categories)
    coco_ids = sorted(index) or [0]
    places, image_ids, found = [], [], []
    skipped = []
    for place, sample in enumerate(read_shard(url, shard, bounds=bounds)):
        if sample.error is not None:
            skipped.append(SkippedPhoto(sample.file_name, sample.error))
            continue
        labels = sample_labels(sample, index or None)
        if labels.error is not None:
            skipped.append(SkippedPhoto(sample.file_name, labels.error))
            continue
        places.append(place)
        image_ids.append(sample.image_id)
        found.append(sorted({coco_ids[instance.category_id] for instance in labels.instances}))
    return ShardSurvey(np.array(places, np.int64), photo_objects(image_ids, found), tuple(skipped))


def photo_objects(image_ids: Sequence[int], categories: Sequence[Sequence[int]]) -> PhotoObjects:
    """The record of some photos.

    Args:
        image_ids: Of the photos.
        categories: Of each photo, without repeats; empty where it has no object.
    """
    return PhotoObjects(
        np.array(image_ids, np.int64),
        np.array([len(each) for each in categories], np.int64),
        np.array([category for each in categories for category in each], np.int64),
    )


def rank_photos(photos: PhotoObjects, seed: int) -> Int64[np.ndarray, " photos"]:
    """The order in which fractions take photos, as indices: of any two fractions the larger one has the smaller's.

    Of each category (and of "no object") the photos come in the order of a seeded hash of their ids. The next photo is
    one of the category with the smallest share taken; of several such categories the rarest one's, then the smallest
    id's, and "no object" last. The order does not depend on how the photos are given.

    Memory is a few hundred bytes a photo, without its pixels.
    """
    categories_of = photos.of_photo()
    keys = [(_hash(image_id, seed), image_id) for image_id in photos.image_ids.tolist()]
    waiting: dict[int | None, list[int]] = {}  # photos of each category, the next one last; None: of no object
    for photo in sorted(range(len(photos)), key=keys.__getitem__, reverse=True):
        for category in categories_of[photo] or (None,):
            waiting.setdefault(category, []).append(photo)
    totals = {category: len(members) for category, members in waiting.items()}
    taken_of = dict.fromkeys(totals, 0)
    taken = np.zeros(len(photos), bool)

    def entry(category: int | None) -> tuple[float, bool, int, int]:
        # A quotient in floating point: equal for equal shares, and shares of fewer than 2^26 photos never round to one.
        share = taken_of[category] / totals[category]
        return share, category is None, totals[category], category or 0

    # Shares only grow: an entry that is out of date is too early in the heap, never too late.
    heap = [(entry(category), category) for category in totals]
    heapq.heapify(heap)
    order: list[int] = []
    while len(order) < len(photos):
        known, category = heap[0]
        if known == entry(category):
            photo = waiting[category].pop()
            if not taken[photo]:
                taken[photo] = True
                order.append(photo)
                for each in categories_of[photo] or (None,):
                    taken_of[each] += 1
        heapq.heapreplace(heap, (entry(category), category))
    return np.array(order, np.int64)


def part_of(whole: int, fraction: float) -> int:
    """How many a fraction is of photos, or of steps: rounded up, of the number as it is written (0.07 of 100 is 7)."""
    return int((Decimal(repr(fraction)) * whole).to_integral_value(ROUND_CEILING))


def choose_subset(
    dataset_url: str, manifest: DatasetManifest, surveys: Sequence[ShardSurvey], source: SubsetSource
) -> Subset:
    """Choose a fraction of a data set's photos.

    Args:
        dataset_url: Of the data set.
        manifest: Its manifest.
        surveys: Of its shards, in order.
        source: Which fraction, by which seed.

    Raises:
        UsageError: A category has objects in the data set but none in the fraction, or no photo can be taken; names
            the categories and a fraction that would do.
    """
    objects = PhotoObjects(
        np.concatenate([survey.objects.image_ids for survey in surveys] or [np.zeros(0, np.int64)]),
        np.concatenate([survey.objects.counts for survey in surveys] or [np.zeros(0, np.int64)]),
        np.concatenate([survey.objects.categories for survey in surveys] or [np.zeros(0, np.int64)]),
    )
    if not len(objects.categories):
        raise UsageError(f"{dataset_url}: none of its photos has an annotated object, so no fraction has any")
    order = rank_photos(objects, source.seed)
    count = part_of(len(objects), source.fraction)
    _refuse_empty_categories(dataset_url, manifest, objects, order, count, source.fraction)
    chosen = np.zeros(len(objects), bool)
    chosen[order[:count]] = True
    stops = np.cumsum([len(survey.places) for survey in surveys])
    parts = [
        SubsetPart(shard, tuple(survey.places[mask].tolist()))
        for shard, survey, mask in zip(manifest.shards, surveys, np.split(chosen, stops[:-1]), strict=True)
        if mask.any()
    ]
    skipped = [photo for survey in surveys for photo in survey.skipped]
    return Subset(dataset_url, source, tuple(_together(parts)), manifest.categories, (*manifest.skipped, *skipped))


def _refuse_empty_categories(
    dataset_url: str,
    manifest: DatasetManifest,
    objects: PhotoObjects,
    order: Int64[np.ndarray, " photos"],
    count: int,
    fraction: float,
) -> None:
    of_photo = objects.of_photo()
    first: dict[int, int] = {}  # how many photos it takes until a category has an object
    for number, photo in enumerate(order.tolist(), 1):
        for category in of_photo[photo]:
            first.setdefault(category, number)
    empty = sorted(category for category, number in first.items() if number > count)
    if not empty:
        return
    names = category_names(manifest.categories)
    named = ", ".join(names.get(category, str(category)) for category in empty[:_NAMED])
    needed = max(first.values())
    enough = next(
        share
        for digits in range(1, 20)
        if (share := (Decimal(needed) / len(objects)).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR))
        and part_of(len(objects), float(share)) == needed
    )
    raise UsageError(
        f"{dataset_url}: a fraction of {fraction:g} is {count} of its {len(objects)} photos, which leaves {len(empty)} "
        f"of {len(first)} categories without an object: {named}{', ...' if len(empty) > _NAMED else ''}; "
        f"{enough} of them ({needed} photos) would do"
    )


def _together(parts: Sequence[SubsetPart]) -> Iterator[tuple[SubsetPart, ...]]:
    """Neighbours joined until they are `SAMPLES_PER_SHARD` samples; the last may have fewer."""
    taken: list[SubsetPart] = []
    for part in parts:
        taken.append(part)
        if sum(len(each.places) for each in taken) >= SAMPLES_PER_SHARD:
            yield tuple(taken)
            taken = []
    if taken:
        yield tuple(taken)


def _hash(image_id: int, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8]


# --- writing --------------------------------------------------------------------------------------------------------


def finished_subset(url: str, source: SubsetSource) -> DatasetManifest | None:
    """The manifest of a subset that was written before; None where it was not, or not to its end.

    Raises:
        UsageError: Another subset, or another data set, is at the URL.
    """
    location = files.join(url, SOURCE_NAME)
    if files.exists(location):
        try:
            there = parse_json(files.read_bytes(location))
        except ValueError as error:
            raise UsageError(f"{location}: damaged ({error}); choose another --run-name") from error
        different = differences(there, asdict(source))
        if different:
            raise UsageError(f"{url}: a subset of something else: {'; '.join(different)}; choose another --run-name")
    elif files.exists(files.join(url, MANIFEST_NAME)):
        raise UsageError(f"{url}: a data set that is no subset (no {SOURCE_NAME}); choose another --run-name")
    return read_dataset_manifest(url) if files.exists(files.join(url, MANIFEST_NAME)) else None


def subset_tasks(subset: Subset, url: str, bounds: BoundsSettings) -> list[SubsetTask]:
    """Begin a subset at `url`: what is to be done is left beside it, the shards are for whoever does it."""
    files.write_atomic(files.join(url, SOURCE_NAME), json.dumps(asdict(subset.source), indent=1).encode())
    return [
        SubsetTask(subset.dataset_url, url, shard_name(number), parts, bounds)
        for number, parts in enumerate(subset.shards)
    ]


def write_subset_shard(task: SubsetTask) -> ShardInfo:
    """Write one shard of a subset: the samples as they are, in their order; again gives the same bytes.

    Raises:
        ShardError: A shard of the data set is damaged. No file is left.
        UsageError, JobError: A store refuses, or cannot be reached.
    """
    return write_shard(task.subset_url, task.name, _samples(task))


def finish_subset(subset: Subset, url: str, shards: Sequence[ShardInfo]) -> DatasetManifest:
    """Make a subset whole: write its manifest, when every task is done.

    Args:
        subset: What was chosen.
        url: Where it is.
        shards: Of all tasks, in any order.
    """
    manifest = DatasetManifest(
        format_version=FORMAT_VERSION,
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
        annotated=True,
        categories=subset.categories,
        skipped=subset.skipped,
    )
    write_dataset_manifest(url, manifest)
    return manifest


def _samples(task: SubsetTask) -> Iterator[Sample]:
    for part in task.parts:
        wanted = set(part.places)
        for place, sample in enumerate(read_shard(task.dataset_url, part.shard, bounds=task.bounds)):
            if place in wanted:
                yield sample
