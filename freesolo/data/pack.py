"""Photos into the shards of a data set.

    find_photos ─▶ plan_shards ─▶ pack_shard, in parallel, here or on a cluster ─▶ finish_data_set: the manifest

Which photo lies in which shard is decided before any is opened: photos are put in the order of a seeded hash of their
relative names and cut into runs of `samples_per_shard`. So a shard is a random subset, near-duplicates of one folder
spread over all shards, and the same photos and seed give byte-identical shards whatever did the work. A photo that
cannot be read leaves its shard one short; a shard of which none can be read is not written, and its number not reused.

Keys are the image ids, zero-padded: unique where base names are not (cat/1.jpg, dog/1.jpg), and free of the dots at
which WebDataset would split them. The name is kept in `file_name`.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass

from freesolo.data import files
from freesolo.data.coco import annotation_rle
from freesolo.data.lease import held
from freesolo.data.photos import PhotoError, decode_photo, photo_size
from freesolo.data.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DatasetManifest,
    Sample,
    ShardInfo,
    SkippedPhoto,
    check_record,
    over_bytes,
    shard_name,
    write_dataset_manifest,
    write_shard,
)
from freesolo.data.sources import PhotoCollection, PhotoSource, as_utf8, find_photos
from freesolo.errors import JobError, UsageError
from freesolo.settings import DEFAULT_BOUNDS, BoundsSettings


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write.

    Attributes:
        dataset_url: Of the data set.
        name: Of the shard.
        photos: In the order of the shard.
        bounds: A larger photo is skipped, unread.
    """

    dataset_url: str
    name: str
    photos: tuple[PhotoSource, ...]
    bounds: BoundsSettings = DEFAULT_BOUNDS


@dataclass(frozen=True, slots=True)
class PackedShard:
    """What became of a `ShardTask`.

    Attributes:
        name: Of the shard.
        info: None where no photo could be read, and no shard was written.
        skipped: Photos that could not be read, in the order of the shard.
        photos: How many the task had.
    """

    name: str
    info: ShardInfo | None
    skipped: tuple[SkippedPhoto, ...]
    photos: int


def pack(
    photos: str | Sequence[str],
    dataset_url: str,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    max_bad_samples: float = 0.001,
    images: str | None = None,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> DatasetManifest:
    """Pack photos into a data set, on this machine.

    Args:
        photos: A folder, a glob, a COCO JSON, or a list of photos; see `find_photos`.
        dataset_url: Where the data set goes; must have none yet.
        samples_per_shard: How many photos a shard has at most.
        seed: Of the order of the photos.
        max_bad_samples: Share of photos that may be unreadable.
        images: The folder of a COCO JSON's photos.
        workers: Processes; each holds one photo at a time. 1: this one.
        progress: Called with the number of photos that a finished shard took.

    Returns:
        The manifest, which is in place.

    Raises:
        UsageError: There are no photos, none can be read, or there is a data set already.
        JobError: More than `max_bad_samples` of the photos cannot be read (names the first few), or a store failed.
    """
    collection = find_photos(photos, images=images)
    tasks = plan_shards(collection, dataset_url, samples_per_shard=samples_per_shard, seed=seed)
    packed: list[PackedShard] = []
    with packing(dataset_url), closing(_pack_all(tasks, workers)) as shards:
        for shard in shards:
            packed.append(shard)
            check_skipped(collection, packed, max_bad_samples=max_bad_samples)
            if progress is not None:
                progress(shard.photos)
        return finish_data_set(collection, dataset_url, packed, max_bad_samples=max_bad_samples)


@contextmanager
def packing(dataset_url: str) -> Iterator[None]:
    """Be the only one who packs the data set, for the time of the block.

    Raises:
        UsageError: There is a data set at `dataset_url`.
        LeaseError: Somebody else packs it.
    """
    with held(files.join(dataset_url, ".lease")):
        _refuse_finished(dataset_url)  # by who held the lease just now
        yield


def _refuse_finished(dataset_url: str) -> None:
    if files.exists(files.join(dataset_url, MANIFEST_NAME)):
        raise UsageError(f"{dataset_url}: there is a data set already; give another URL, or remove that one")


def plan_shards(
    collection: PhotoCollection,
    dataset_url: str,
    *,
    samples_per_shard: int,
    seed: int,
    bounds: BoundsSettings = DEFAULT_BOUNDS,
) -> list[ShardTask]:
    """Decide which photo goes into which shard, and in what order.

    Args:
        collection: The photos.
        dataset_url: Where the data set goes.
        samples_per_shard: How many photos a shard has at most, at least 1.
        seed: Of the order.
        bounds: Larger photos will be skipped, unread.

    Raises:
        UsageError: There is a data set, or something else with a manifest, at `dataset_url`.
    """
    _refuse_finished(dataset_url)
    photos = sorted(collection.photos, key=lambda photo: (_rank(photo.file_name, seed), photo.image_id))
    starts = range(0, len(photos), samples_per_shard)
    return [
        ShardTask(dataset_url, shard_name(index), tuple(photos[start : start + samples_per_shard]), bounds)
        for index, start in enumerate(starts)
    ]


def pack_shard(task: ShardTask) -> PackedShard:
    """Write one shard: every photo is read and decoded to be sure of it, and stored as it was found.

    Raises:
        UsageError, JobError: A store refuses, or cannot be reached. A photo that is missing or damaged is no error.
    """
    skipped: list[SkippedPhoto] = []
    readable = _readable(task, skipped)
    first = next(readable, None)
    info = write_shard(task.dataset_url, task.name, _chain(first, readable)) if first is not None else None
    return PackedShard(task.name, info, tuple(skipped), len(task.photos))


def check_skipped(collection: PhotoCollection, packed: Iterable[PackedShard], *, max_bad_samples: float) -> None:
    """Stop when too many photos cannot be read.

    Raises:
        JobError: More than `max_bad_samples` of the collection; names the first few.
    """
    skipped = _all_skipped(collection, packed)
    if len(skipped) > max_bad_samples * len(collection.photos):
        named = "; ".join(f"{photo.file_name}: {photo.reason}" for photo in skipped[:3])
        raise JobError(
            f"{collection.name}: {len(skipped)} of {len(collection.photos)} photos cannot be used, more than "
            f"max_bad_samples={max_bad_samples:g} allows; first: {named}"
        )


def finish_data_set(
    collection: PhotoCollection, dataset_url: str, packed: Sequence[PackedShard], *, max_bad_samples: float
) -> DatasetManifest:
    """Make the data set whole: write its manifest, when every task of `plan_shards` is done.

    Args:
        collection: The photos.
        dataset_url: The data set.
        packed: Of all tasks, in any order.
        max_bad_samples: Share of photos that may be unreadable.

    Raises:
        UsageError: No photo could be read.
        JobError: More than `max_bad_samples` of them could not; names the first few.
    """
    if all(shard.info is None for shard in packed):
        first = _all_skipped(collection, packed)[0]
        raise UsageError(
            f"{collection.name}: none of {len(collection.photos)} photos can be read; {first.file_name}: {first.reason}"
        )
    check_skipped(collection, packed, max_bad_samples=max_bad_samples)
    ordered = sorted(packed, key=lambda shard: shard.name)
    manifest = DatasetManifest(
        format_version=FORMAT_VERSION,
        shards=tuple(shard.info for shard in ordered if shard.info is not None),
        annotated=collection.annotated,
        categories=collection.categories,
        skipped=tuple(_all_skipped(collection, packed)),
    )
    write_dataset_manifest(dataset_url, manifest)
    return manifest


def _pack_all(tasks: Sequence[ShardTask], workers: int) -> Generator[PackedShard, None, None]:
    """Shards as they are done, in order."""
    if workers == 1 or len(tasks) == 1:
        yield from map(pack_shard, tasks)
        return
    # Started anew and not forked: the stores' clients have threads, which a fork does not survive.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context)
    try:
        yield from executor.map(pack_shard, tasks)
    except BrokenProcessPool as error:
        raise JobError("a packing process was killed (by the system, for its memory?); give fewer workers") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _readable(task: ShardTask, skipped: list[SkippedPhoto]) -> Iterator[Sample]:
    """The photos that can be read, one at a time; the others are added to `skipped`."""
    for photo in task.photos:
        try:
            yield _sample(photo, task.bounds)
        except (PhotoError, files.UnreadableFileError) as error:
            skipped.append(SkippedPhoto(photo.file_name, as_utf8(str(error))))


def _sample(photo: PhotoSource, bounds: BoundsSettings) -> Sample:
    """Read one photo and check all of it.

    Raises:
        PhotoError: It or one of its annotations is damaged, they do not fit together, or it is over the bounds.
    """
    too_large = over_bytes(files.size(photo.url) or 0, bounds)
    if too_large:
        raise PhotoError(too_large)
    data = files.read_bytes(photo.url)
    height, width = photo_size(data, max_pixels=bounds.max_pixels)
    # An eighth of the size is several times faster to make, and meets every damaged byte on the way.
    decode_photo(data, max_pixels=bounds.max_pixels, min_short_side=1)
    if photo.size is not None and photo.size != (height, width):
        claimed = f"{photo.size[1]} x {photo.size[0]}"
        raise PhotoError(f"{width} x {height} pixels, annotated as {claimed} (was it turned, or resized?)")
    sample = Sample(
        key=f"{photo.image_id:012d}",
        image_bytes=data,
        image_id=photo.image_id,
        file_name=photo.file_name,
        width=width,
        height=height,
        annotations=photo.annotations,
    )
    try:
        for annotation in photo.annotations:
            annotation_rle(annotation, height, width)
        check_record(sample, bounds)
    except ValueError as error:
        raise PhotoError(str(error)) from error
    return sample


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def _all_skipped(collection: PhotoCollection, packed: Iterable[PackedShard]) -> list[SkippedPhoto]:
    """By name, so that the manifest does not depend on who was ready first."""
    skipped = [*collection.skipped, *(photo for shard in packed for photo in shard.skipped)]
    return sorted(skipped, key=lambda photo: (photo.file_name, photo.reason))


def _rank(file_name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{file_name}".encode(errors="surrogateescape")).digest()
