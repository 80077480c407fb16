"""The photos by which a pre-training is looked at while it runs: the same ones, cut the same way, at every look.

Which photo lies in which shard is a seeded hash's choice (`data.pack`), so a data set's first photos are as good a
sample of it as any, and no more than part of a shard is read for them where shards are of the usual size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, UInt8

from freesolo.data.coco import category_index, sample_labels
from freesolo.data.crops import cut, random_box
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.shards import DatasetManifest, Sample, ShardError, read_shard
from freesolo.settings import BoundsSettings, ProbeSettings, ViewSettings

_LOG = logging.getLogger(__name__)
PICTURED_PHOTOS = 4
OBJECTS_A_PHOTO = 2  # the largest ones


@dataclass(frozen=True, slots=True)
class PicturedPhoto:
    """A photo that is shown, with its points.

    Attributes:
        file_name: As its data set has it.
        pixels: RGB, its middle square.
        points: `x` and `y` of each, as shares of width and height, in [0, 1).
    """

    file_name: str
    pixels: UInt8[np.ndarray, "P P 3"]
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class ProbePhotos:
    """Crops of N photos, and of the M largest objects in them where they are annotated.

    Attributes:
        query: A random crop of each photo.
        key: Another one.
        query_boxes_xywh: Where in its photo each query crop lies, in px.
        key_boxes_xywh: Where the key crop lies.
        objects: Squares around objects; M is 0 without annotations.
        categories: Of the objects, 0..K-1.
        photos: Which of the photos each object is in.
        pictured: The first few.
    """

    query: UInt8[np.ndarray, "N S S 3"]
    key: UInt8[np.ndarray, "N S S 3"]
    query_boxes_xywh: Float[np.ndarray, "N 4"]
    key_boxes_xywh: Float[np.ndarray, "N 4"]
    objects: UInt8[np.ndarray, "M S S 3"]
    categories: Int64[np.ndarray, " M"]
    photos: Int64[np.ndarray, " M"]
    pictured: tuple[PicturedPhoto, ...]

    def __len__(self) -> int:
        return len(self.query)


def read_probe_photos(
    dataset_url: str,
    manifest: DatasetManifest,
    settings: ProbeSettings,
    views: ViewSettings,
    *,
    bounds: BoundsSettings,
    seed: int,
) -> ProbePhotos:
    """Read the first photos of a data set that can be read; what cannot is told in the log, and others take its place.

    Args:
        dataset_url: Of the data set.
        manifest: Its manifest; where it has two categories or more, objects are cut out too.
        settings: How many photos, and how large the pictured ones are.
        views: The size and scale of the training's crops.
        bounds: A larger sample is not read.
        seed: Of the crops and the points.

    Returns:
        Fewer photos than wanted where there are no more, none at all included.

    Raises:
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    size = views.size
    categories = category_index(manifest.categories) if manifest.annotated else {}
    crops: dict[str, list[np.ndarray]] = {"query": [], "key": []}
    boxes: dict[str, list[tuple[int, int, int, int]]] = {"query": [], "key": []}
    objects: list[np.ndarray] = []
    object_categories: list[int] = []
    object_photos: list[int] = []
    pictured: list[PicturedPhoto] = []
    for number, (sample, image) in enumerate(_photos(dataset_url, manifest, settings.photos, bounds)):
        random = np.random.default_rng([seed, number])
        for name in ("query", "key"):
            box = random_box(sample.height, sample.width, views.crop_scale, random)
            crops[name].append(cut(image, box, size))
            boxes[name].append(box)
        if len(pictured) < PICTURED_PHOTOS:
            pictured.append(_pictured(sample, image, settings.picture_size, random))
        for category, box in _largest_objects(sample, categories) if len(categories) > 1 else ():
            objects.append(cut(image, box, size))
            object_categories.append(category)
            object_photos.append(number)
    return ProbePhotos(
        query=np.array(crops["query"], np.uint8).reshape(-1, size, size, 3),
        key=np.array(crops["key"], np.uint8).reshape(-1, size, size, 3),
        query_boxes_xywh=np.array(boxes["query"], np.float32).reshape(-1, 4),
        key_boxes_xywh=np.array(boxes["key"], np.float32).reshape(-1, 4),
        objects=np.array(objects, np.uint8).reshape(-1, size, size, 3),
        categories=np.array(object_categories, np.int64),
        photos=np.array(object_photos, np.int64),
        pictured=tuple(pictured),
    )


def _photos(
    url: str, manifest: DatasetManifest, count: int, bounds: BoundsSettings
) -> Iterator[tuple[Sample, UInt8[np.ndarray, "H W 3"]]]:
    """The first photos that can be decoded. A damaged shard gives what comes before the damage."""
    found = 0
    for shard in manifest.shards:
        if found == count:
            return
        try:
            for sample in read_shard(url, shard, bounds=bounds):
                image = _decoded(sample)
                if image is not None:
                    found += 1
                    yield sample, image
                if found == count:
                    return
        except ShardError as error:
            _LOG.warning("photos to look at pre-training by: %s", error)


def _decoded(sample: Sample) -> UInt8[np.ndarray, "H W 3"] | None:
    try:
        if sample.error is not None:
            raise PhotoError(sample.error)
        return decode_photo(sample.image_bytes, size=(sample.height, sample.width))
    except PhotoError as error:
        _LOG.warning("photos to look at pre-training by: %s is left out: %s", sample.key, error)
        return None


def _pictured(
    sample: Sample, image: UInt8[np.ndarray, "H W 3"], size: int, random: np.random.Generator
) -> PicturedPhoto:
    """A point in the middle ninth, where photographers put objects, and one left, right, above or below of it."""
    side = min(sample.height, sample.width)
    pixels = cut(image, ((sample.width - side) // 2, (sample.height - side) // 2, side, side), size)
    middle, other = random.uniform(1 / 3, 2 / 3, size=2), random.uniform(1 / 10, 9 / 10, size=2)
    other[random.integers(2)] = random.choice([random.uniform(1 / 10, 1 / 4), random.uniform(3 / 4, 9 / 10)])
    points = tuple((float(x), float(y)) for x, y in (middle, other))
    return PicturedPhoto(sample.file_name, pixels, points)


def _largest_objects(sample: Sample, categories: dict[int, int]) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Category and square of the largest objects, largest first; none where annotations are damaged."""
    instances = sample_labels(sample, categories).instances
    largest = sorted(instances, key=lambda instance: -instance.bbox_xywh[2] * instance.bbox_xywh[3])[:OBJECTS_A_PHOTO]
    return [
        (instance.category_id, _square_around(instance.bbox_xywh, sample.height, sample.width)) for instance in largest
    ]


def _square_around(bbox_xywh: tuple[float, float, float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """The square that a box just fits into, moved into the photo, and cut where the photo is narrower."""
    x, y, box_width, box_height = bbox_xywh
    side = max(1, round(max(box_width, box_height)))
    square_width, square_height = min(side, width), min(side, height)
    left = min(max(round(x + (box_width - square_width) / 2), 0), width - square_width)
    top = min(max(round(y + (box_height - square_height) / 2), 0), height - square_height)
    return left, top, square_width, square_height
