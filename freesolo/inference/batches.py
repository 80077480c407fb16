"""Which photos go through the network together: decided by the shard alone, before a single one is decoded.

A network's output for a photo may differ in the last bits with what else is in its batch. So a batch is made of
neighbours in a shard that have one size once resized, and never depends on how many workers there are, which of them
is faster, or how often one has died: that is why a label set made again is the same, byte for byte.

    shard ──(read_batches: by recorded sizes)──▶ EncodedBatch ──(decode_batch)──▶ DecodedBatch ──(model)──▶ labels

Photos wait for others of their size as the bytes of their files, a twentieth of their pixels. An unreadable one leaves
its batch without moving any other photo to another batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64, UInt8

from freesolo.data.label_records import ImageLabels
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.resizing import resize_photo
from freesolo.data.shards import Sample, ShardError, ShardInfo, read_shard, shard_index
from freesolo.ops.sizes import resized_size
from freesolo.settings import DEFAULT_BOUNDS, BoundsSettings

# Photos of rare sizes wait for company while this many batches' worth of photos are waiting in all; then the largest
# group goes as it is. It bounds the memory of reading a shard, whatever sizes its photos have: 40 MB of COCO's photos
# at a batch size of 8, in groups of 3.4 on average; without a bound they would be of 3.6.
MAX_WAITING_BATCHES = 32


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How photos are resized and grouped.

    Attributes:
        short_side: Of a photo as the network sees it, in px.
        long_side_max: Where the long side would be longer, it is made this instead.
        batch_size: Most photos of a forward pass.
        size_divisor: Heights and widths are padded to multiples of this; 1: photos that share a batch have one size.
        bounds: A larger photo is an unreadable one.
    """

    short_side: int
    long_side_max: int
    batch_size: int
    size_divisor: int = 1
    bounds: BoundsSettings = DEFAULT_BOUNDS

    def resized(self, labels: ImageLabels) -> tuple[int, int]:
        """Height and width to which a photo is resized."""
        return resized_size(labels.height, labels.width, self.short_side, self.long_side_max)

    def extent(self, labels: ImageLabels) -> tuple[int, int]:
        """Height and width of a photo with its padding: photos of one extent may share a batch."""
        height, width = self.resized(labels)
        return -(-height // self.size_divisor) * self.size_divisor, -(-width // self.size_divisor) * self.size_divisor


@dataclass(frozen=True, slots=True)
class Entry:
    """A photo's place in its shard, and what is known of it: at first nothing but its name and size.

    Attributes:
        index: Place in the shard, from 0.
        labels: Its record in the label set, so far.
    """

    index: int
    labels: ImageLabels


@dataclass(frozen=True, slots=True)
class EncodedPhoto:
    """A photo as it lies in the shard."""

    entry: Entry
    data: bytes


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Photos of one shard that go through the network together.

    Attributes:
        shard: Its name.
        photos: All of one extent.
        lost: Entries of the shard that cannot be read from it, each with its error.
    """

    shard: str
    photos: tuple[EncodedPhoto, ...]
    lost: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """The readable photos of a batch, resized and padded at the right and bottom.

    Attributes:
        shard: Its name.
        pixels: RGB, `(B, H, W, 3)`; B may be 0.
        sizes: Height and width of each without the padding, `(B, 2)`.
        readable: One an image of `pixels`.
        unreadable: The others, each with its error.
    """

    shard: str
    pixels: UInt8[np.ndarray, "B H W 3"]
    sizes: Int64[np.ndarray, "B 2"]
    readable: tuple[Entry, ...]
    unreadable: tuple[Entry, ...]


def read_batches(dataset_url: str, shard: ShardInfo, plan: BatchPlan) -> Iterator[EncodedBatch]:
    """The batches of one shard, streamed; every sample that the manifest counts is in exactly one of them.

    Samples that a truncated or missing shard has lost come as `lost` entries, under names made of the shard's and their
    place. The last batch waits for the end of the shard, where its checksum is known: no shard that was altered can get
    a complete label file.

    Raises:
        ShardError: The shard was altered since its manifest was written.
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    count = 0
    lost_because: ShardError | None = None

    def photos() -> Iterator[EncodedPhoto]:
        nonlocal count, lost_because
        try:
            for sample in read_shard(dataset_url, shard, bounds=plan.bounds):
                yield EncodedPhoto(Entry(count, _unlabelled(sample)), sample.image_bytes)
                count += 1
        except ShardError as error:
            if count >= shard.samples:
                raise
            lost_because = error

    groups = group_by_extent(photos(), plan)
    waiting: EncodedBatch | None = None
    for group in groups:
        if waiting is not None:
            yield waiting
        waiting = EncodedBatch(shard.name, group)
    if waiting is not None:
        yield waiting
    if lost_because is not None:
        lost = tuple(_lost_entry(shard, index, str(lost_because)) for index in range(count, shard.samples))
        yield EncodedBatch(shard.name, (), lost)


def group_by_extent(photos: Iterable[EncodedPhoto], plan: BatchPlan) -> Iterator[tuple[EncodedPhoto, ...]]:
    """Photos in groups of one extent, at most `batch_size` each, in the order in which groups fill.

    What is left at the end comes last, first-come groups first. Nothing but the photos' sizes and order matters.
    """
    waiting: dict[tuple[int, int], list[EncodedPhoto]] = {}
    waiting_photos = 0
    for photo in photos:
        extent = plan.extent(photo.entry.labels)
        group = waiting.setdefault(extent, [])
        group.append(photo)
        waiting_photos += 1
        if len(group) < plan.batch_size:
            if waiting_photos < MAX_WAITING_BATCHES * plan.batch_size:
                continue
            extent = max(waiting, key=lambda size: len(waiting[size]))  # of equal ones the one that came first
        waiting_photos -= len(waiting[extent])
        yield tuple(waiting.pop(extent))
    for group in waiting.values():
        yield tuple(group)


def decode_batch(batch: EncodedBatch, plan: BatchPlan) -> DecodedBatch:
    """Decode, resize and stack the photos of a batch; those that cannot be read are told apart, none is left out."""
    images: list[UInt8[np.ndarray, "h w 3"]] = []
    readable: list[Entry] = []
    unreadable = list(batch.lost)
    for photo in batch.photos:
        try:
            images.append(_decode(photo, *plan.resized(photo.entry.labels)))
            readable.append(photo.entry)
        except PhotoError as error:
            unreadable.append(replace(photo.entry, labels=replace(photo.entry.labels, error=str(error))))
    extent = plan.extent(readable[0].labels) if readable else (0, 0)
    pixels = np.zeros((len(images), *extent, 3), np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(len(images), 2)
    return DecodedBatch(batch.shard, pixels, sizes, tuple(readable), tuple(unreadable))


def _decode(photo: EncodedPhoto, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """A photo at the network's size.

    Raises:
        PhotoError: It cannot be read, or is not of the size that its record says: its masks would not fit it.
    """
    labels = photo.entry.labels
    if labels.error is not None:
        raise PhotoError(labels.error)
    image = decode_photo(photo.data, min_short_side=min(height, width), size=(labels.height, labels.width))
    return resize_photo(image, height, width)


def _unlabelled(sample: Sample) -> ImageLabels:
    return ImageLabels(
        key=sample.key,
        image_id=sample.image_id,
        file_name=sample.file_name,
        width=sample.width,
        height=sample.height,
        error=sample.error,
        instances=(),
    )


def _lost_entry(shard: ShardInfo, index: int, error: str) -> Entry:
    """A sample that the manifest counts and the shard no longer holds: its own name is lost with it."""
    name = f"{shard.name}.{index}"  # no sample has this key: keys have no dots
    image_id = -(shard_index(shard.name) * 2**32 + index + 1)  # nor this id, where ids are not negative
    return Entry(index, ImageLabels(name, image_id, name, width=0, height=0, error=error, instances=()))
