"""How a stored sample becomes a row of a training's stream: one view for DenseCL, one for SOLO.

This runs in Ray Data tasks, one sample at a time: decoding and geometry, on uint8, without PyTorch. Rows become batches
in the train worker (`data.collate`); colours are changed there, on whole batches (`data.augment`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Bool
from PIL import Image

from freesolo.data.coco import sample_labels, without_masks
from freesolo.data.crops import cut, random_box, scaled_box
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.resizing import resize_photo
from freesolo.data.shards import Sample
from freesolo.ops.mask_storage import each_rle_pixels, pack_masks
from freesolo.ops.sizes import resized_size
from freesolo.settings import SegmentationViewSettings, ViewSettings

Row = dict[str, Any]


@runtime_checkable
class View(Protocol):
    """A way to look at samples.

    Attributes:
        task_bytes: Of the samples that one Ray task makes rows of, and at most of the rows that it hands on at a time.
            A task costs a core some 0.1 s beside its work, half of which is until its end is noticed; it is to take a
            second or two.
    """

    task_bytes: ClassVar[int]

    @property
    def schema(self) -> pa.Schema:
        """Of the rows; has `key` and `error`, which is null in a usable row."""

    def row(self, sample: Sample, labels: ImageLabels | None, random: np.random.Generator) -> Row:
        """One sample, decoded and cropped; an unusable one gives its key and the reason as `error`."""


@dataclass(frozen=True, slots=True)
class ContrastiveView:
    """Two random resized crops of each photo, for DenseCL (MoCo v2, arXiv:2003.04297)."""

    task_bytes: ClassVar[int] = 64 * 2**20

    settings: ViewSettings

    @property
    def schema(self) -> pa.Schema:
        """Of the rows."""
        return pa.schema(
            {
                "key": pa.string(),
                "error": pa.string(),
                "image_id": pa.int64(),
                "query_crop": pa.binary(),
                "key_crop": pa.binary(),
            }
        )

    def row(self, sample: Sample, labels: ImageLabels | None, random: np.random.Generator) -> Row:
        """Both crops of one photo as raw RGB bytes."""
        size = self.settings.size
        boxes = [random_box(sample.height, sample.width, self.settings.crop_scale, random) for _ in range(2)]
        # Decoding at a reduced size is exact enough where both crops still have `size` pixels a side.
        narrowest = min(side for _, _, width, height in boxes for side in (width, height))
        try:
            image = decode_photo(
                sample.image_bytes,
                min_short_side=math.ceil(min(sample.height, sample.width) * size / narrowest),
                size=(sample.height, sample.width),
            )
        except PhotoError as error:
            return {"key": sample.key, "error": str(error)}
        reduced = partial(scaled_box, size=(sample.height, sample.width), scaled_size=image.shape[:2])
        query_crop, key_crop = (cut(image, reduced(box), size) for box in boxes)
        return {
            "key": sample.key,
            "image_id": sample.image_id,
            "query_crop": query_crop.tobytes(),
            "key_crop": key_crop.tobytes(),
        }


@dataclass(frozen=True, slots=True)
class SegmentationView:
    """FreeSOLO's weak view: the photo and its masks resized to a random short side, flipped at random.

    Attributes:
        settings: Sizes and probabilities.
        embedding_channels: Of the labels; labels without embeddings get zeros.
        boxes_alone: Instances are their filled boxes; their masks are not looked at, not even by what is made of rows
            later, as copy-paste.
        category_ids: COCO's ids of the categories to tell apart, ascending; none: all objects are category 0.
    """

    task_bytes: ClassVar[int] = 16 * 2**20

    settings: SegmentationViewSettings
    embedding_channels: int
    boxes_alone: bool = False
    category_ids: tuple[int, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """Of the rows; masks are bits of their boxes alone, boxes four numbers after four, embeddings float16."""
        return pa.schema(
            {
                "key": pa.string(),
                "error": pa.string(),
                "image_id": pa.int64(),
                "height": pa.int32(),
                "width": pa.int32(),
                "pixels": pa.binary(),
                "masks": pa.binary(),
                "mask_boxes_xyxy": pa.list_(pa.int32()),
                "category_ids": pa.list_(pa.int64()),
                "scores": pa.list_(pa.float32()),
                "embeddings": pa.binary(),
            }
        )

    def row(self, sample: Sample, labels: ImageLabels | None, random: np.random.Generator) -> Row:
        """One photo and its labels at a random size."""
        labels = labels or self._own_labels(sample)
        short_side = int(random.choice(self.settings.short_sides))
        flip = random.random() < self.settings.flip_probability
        height, width = resized_size(sample.height, sample.width, short_side, self.settings.long_side_max)
        try:
            image = decode_photo(
                sample.image_bytes, min_short_side=min(height, width), size=(sample.height, sample.width)
            )
        except PhotoError as error:
            return {"key": sample.key, "error": str(error)}
        if labels.error:
            return {"key": sample.key, "error": f"unreadable when labelled: {labels.error}"}
        if any(each.embedding.size not in (0, self.embedding_channels) for each in labels.instances):
            return {
                "key": sample.key,
                "error": f"its labels' embeddings do not have {self.embedding_channels} channels",
            }
        if self.category_ids and any(each.category_id >= len(self.category_ids) for each in labels.instances):
            return {"key": sample.key, "error": f"its labels have a category beyond the {len(self.category_ids)} known"}
        pixels = resize_photo(image, height, width)
        resized = [(each, resized_mask(mask, height, width)) for each, mask in self._instances(labels)]
        instances = [each for each, part in resized if part is not None]
        parts = [part for _, part in resized if part is not None]
        if flip:
            pixels, parts = pixels[:, ::-1], [part.flipped(width) for part in parts]
        return {
            "key": sample.key,
            "image_id": sample.image_id,
            "height": height,
            "width": width,
            "pixels": pixels.tobytes(),
            "masks": pack_masks([part.pixels for part in parts]),
            "mask_boxes_xyxy": [side for part in parts for side in part.box_xyxy],
            "category_ids": [instance.category_id if self.category_ids else 0 for instance in instances],
            "scores": [instance.score for instance in instances],
            "embeddings": b"".join(self._embedding(instance.embedding).tobytes() for instance in instances),
        }

    def _own_labels(self, sample: Sample) -> ImageLabels:
        """A data set's annotations, their categories numbered as the model's are."""
        numbers = {coco_id: number for number, coco_id in enumerate(self.category_ids)}
        return sample_labels(without_masks(sample) if self.boxes_alone else sample, numbers or None)

    def _instances(self, labels: ImageLabels) -> Iterator[tuple[LabelledInstance, Bool[np.ndarray, "H W"]]]:
        """Each with what is known of its mask, over the photo."""
        masks: Iterator[Bool[np.ndarray, "H W"]]
        if self.boxes_alone:
            masks = (_filled_box(each, labels) for each in labels.instances)
        else:
            masks = each_rle_pixels([each.rle for each in labels.instances], labels.height, labels.width)
        yield from zip(labels.instances, masks, strict=True)

    def _embedding(self, embedding: np.ndarray) -> np.ndarray:
        return embedding if embedding.size else np.zeros(self.embedding_channels, np.float16)


def _filled_box(instance: LabelledInstance, labels: ImageLabels) -> Bool[np.ndarray, "H W"]:
    """Every pixel that the box touches."""
    x, y, width, height = instance.bbox_xywh
    box = np.zeros((labels.height, labels.width), bool)
    box[max(0, math.floor(y)) : math.ceil(y + height), max(0, math.floor(x)) : math.ceil(x + width)] = True
    return box


@dataclass(frozen=True, slots=True)
class MaskPart:
    """The part of a mask outside which there is nothing of it.

    Attributes:
        pixels: Of the part; one at least is True.
        box_xyxy: Where it is, in px, ends exclusive.
    """

    pixels: Bool[np.ndarray, "h w"]
    box_xyxy: tuple[int, int, int, int]

    def flipped(self, width: int) -> MaskPart:
        """That of the mask's mirror image, the mask being `width` wide."""
        left, top, right, bottom = self.box_xyxy
        return MaskPart(self.pixels[:, ::-1], (width - right, top, width - left, bottom))


def resized_mask(mask: Bool[np.ndarray, "H W"], height: int, width: int) -> MaskPart | None:
    """A mask at another size: the pixels of which it covers more than half, where it is resized as photos are.

    Only the part that holds it is worked on, which of most objects is small. None where nothing is left of it.
    """
    if not mask.any():
        return None
    source_rows, rows, (top, bottom) = _part(np.any(mask, axis=1, keepdims=True)[:, 0], height)
    source_columns, columns, (left, right) = _part(np.any(mask, axis=0, keepdims=True)[0], width)
    soft = Image.fromarray(mask[source_rows, source_columns].view(np.uint8) * 255).resize(
        (columns.stop - columns.start, rows.stop - rows.start),
        Image.Resampling.BILINEAR,
        box=(left, top, right, bottom),
    )
    pixels = np.asarray(soft) > 127
    return MaskPart(pixels, (columns.start, rows.start, columns.stop, rows.stop)) if pixels.any() else None


def _part(filled: Bool[np.ndarray, " n"], size: int) -> tuple[slice, slice, tuple[float, float]]:
    """Of one axis: the pixels that new ones are made of, the new ones, and their edges, in px of the former."""
    first, last = int(filled.argmax()), len(filled) - int(filled[::-1].argmax())
    scale = len(filled) / size
    reach = max(scale, 1.0)  # of Pillow's filter, to either side of a new pixel's centre
    new = slice(max(0, math.floor((first - reach) / scale)), min(size, math.ceil((last + reach) / scale)))
    start, stop = new.start * scale, new.stop * scale
    old = slice(max(0, math.floor(start - reach)), min(len(filled), math.ceil(stop + reach)))
    return old, new, (start - old.start, stop - old.start)
