"""How a stored sample becomes a row of a stream, and rows become a batch: one view for DenseCL, one for SOLO.

`row` runs in Ray Data tasks, one sample at a time: decoding and geometry, on uint8. `batch` runs in the train worker.
Colour augmentation is not here: it is done on whole batches, on the training device (`data.augment`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from freesolo.data.augment import random_resized_crop
from freesolo.data.coco import sample_labels
from freesolo.data.labels import ImageLabels
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.shards import Sample
from freesolo.ops.images import pad_to_batch, resized_size
from freesolo.ops.masks import decode_rle, pack_masks, resize_masks_soft, unpack_masks
from freesolo.settings import SegmentationViewSettings, ViewSettings
from freesolo.types import ImageBatch, Instances, SegmentationBatch

Row = dict[str, Any]
Batch_co = TypeVar("Batch_co", covariant=True)


@runtime_checkable
class View(Protocol[Batch_co]):
    """A way to look at samples."""

    @property
    def schema(self) -> pa.Schema:
        """Of the rows; has `key` and `error`, which is null in a usable row."""

    def row(self, sample: Sample, labels: ImageLabels | None, random: np.random.Generator) -> Row:
        """One sample, decoded and cropped; an unusable one gives its key and the reason as `error`."""

    def batch(self, rows: list[Row]) -> Batch_co:
        """Usable rows, at least one, as tensors on the CPU."""


@dataclass(frozen=True, slots=True)
class CropPair:
    """Two crops of each image, before colour augmentation.

    Attributes:
        query: RGB, `(B, 3, S, S)`.
        key: RGB, `(B, 3, S, S)`.
        image_ids: The data set's ids, one an image.
    """

    query: UInt8[Tensor, "B 3 S S"]
    key: UInt8[Tensor, "B 3 S S"]
    image_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> CropPair:
        """The same record on another device."""
        return CropPair(
            self.query.to(device, non_blocking=True), self.key.to(device, non_blocking=True), self.image_ids
        )


@dataclass(frozen=True, slots=True)
class ContrastiveView:
    """Two random resized crops of each photo, for DenseCL (MoCo v2, arXiv:2003.04297)."""

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
        # Decoding at a reduced size is exact enough when a crop of the smallest scale still has `size` pixels a side.
        smallest_crop_side = self.settings.crop_scale[0] ** 0.5
        try:
            image = decode_photo(
                sample.image_bytes,
                min_short_side=round(self.settings.size / smallest_crop_side),
                size=(sample.height, sample.width),
            )
        except PhotoError as error:
            return {"key": sample.key, "error": str(error)}
        size, scale = self.settings.size, self.settings.crop_scale
        query_crop = random_resized_crop(image, size, scale, random)
        key_crop = random_resized_crop(image, size, scale, random)
        return {
            "key": sample.key,
            "image_id": sample.image_id,
            "query_crop": query_crop.tobytes(),
            "key_crop": key_crop.tobytes(),
        }

    def batch(self, rows: list[Row]) -> CropPair:
        """Crops stacked."""
        query = self._stack([row["query_crop"] for row in rows])
        key = self._stack([row["key_crop"] for row in rows])
        return CropPair(query, key, tuple(row["image_id"] for row in rows))

    def _stack(self, crops: list[bytes]) -> UInt8[Tensor, "B 3 S S"]:
        size = self.settings.size
        pixels = np.frombuffer(b"".join(crops), np.uint8).reshape(len(crops), size, size, 3)
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class SegmentationView:
    """FreeSOLO's weak view: the photo and its masks resized to a random short side, flipped at random.

    Attributes:
        settings: Sizes and probabilities.
        embedding_channels: Of the labels; labels without embeddings get zeros.
    """

    settings: SegmentationViewSettings
    embedding_channels: int

    @property
    def schema(self) -> pa.Schema:
        """Of the rows; masks are bits, embeddings float16."""
        return pa.schema(
            {
                "key": pa.string(),
                "error": pa.string(),
                "image_id": pa.int64(),
                "height": pa.int32(),
                "width": pa.int32(),
                "pixels": pa.binary(),
                "masks": pa.binary(),
                "category_ids": pa.list_(pa.int64()),
                "scores": pa.list_(pa.float32()),
                "embeddings": pa.binary(),
            }
        )

    def row(self, sample: Sample, labels: ImageLabels | None, random: np.random.Generator) -> Row:
        """One photo and its labels at a random size."""
        labels = labels or sample_labels(sample)
        short_side = int(random.choice(self.settings.short_sides))
        flip = random.random() < self.settings.flip_probability
        try:
            image = decode_photo(sample.image_bytes, min_short_side=short_side, size=(sample.height, sample.width))
        except PhotoError as error:
            return {"key": sample.key, "error": str(error)}
        if labels.error:
            return {"key": sample.key, "error": f"unreadable when labelled: {labels.error}"}
        if any(each.embedding.size not in (0, self.embedding_channels) for each in labels.instances):
            return {
                "key": sample.key,
                "error": f"its labels' embeddings do not have {self.embedding_channels} channels",
            }
        height, width = resized_size(sample.height, sample.width, short_side, self.settings.long_side_max)
        pixels = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        masks = self._masks(labels, height, width)
        kept = masks.flatten(1).any(dim=1)
        if flip:
            pixels, masks = pixels[:, ::-1], masks.flip(2)
        instances = [instance for instance, keep in zip(labels.instances, kept.tolist(), strict=True) if keep]
        return {
            "key": sample.key,
            "image_id": sample.image_id,
            "height": height,
            "width": width,
            "pixels": pixels.tobytes(),
            "masks": pack_masks(masks[kept]).tobytes(),
            "category_ids": [instance.category_id for instance in instances],
            "scores": [instance.score for instance in instances],
            "embeddings": b"".join(self._embedding(instance.embedding).tobytes() for instance in instances),
        }

    def batch(self, rows: list[Row]) -> SegmentationBatch:
        """Photos and masks padded to one extent."""
        images = [_pixels(row) for row in rows]
        pixels, sizes = pad_to_batch(images, self.settings.size_divisor)
        batch = ImageBatch(pixels, sizes, tuple(row["image_id"] for row in rows))
        counts = [len(row["scores"]) for row in rows]
        masks = torch.zeros(sum(counts), *pixels.shape[-2:], dtype=torch.bool)
        offset = 0
        for row, count in zip(rows, counts, strict=True):
            masks[offset : offset + count, : row["height"], : row["width"]] = _masks(row, count)
            offset += count
        embeddings = np.frombuffer(b"".join(row["embeddings"] for row in rows), np.float16)
        instances = Instances(
            image_index=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)),
            masks=masks,
            category_ids=torch.tensor([c for row in rows for c in row["category_ids"]], dtype=torch.int64),
            scores=torch.tensor([score for row in rows for score in row["scores"]], dtype=torch.float32),
            embeddings=torch.from_numpy(embeddings.astype(np.float32)).view(sum(counts), self.embedding_channels),
        )
        return SegmentationBatch(batch, instances)

    def _masks(self, labels: ImageLabels, height: int, width: int) -> Bool[Tensor, "N H W"]:
        resized = torch.zeros(len(labels.instances), height, width, dtype=torch.bool)
        # One at a time: a hundred masks of a large photo, as floats, would take tens of gigabytes.
        for row, instance in zip(resized, labels.instances, strict=True):
            mask = decode_rle([instance.rle], labels.height, labels.width)
            row[:] = (resize_masks_soft(mask.float(), height, width) > 0.5)[0]
        return resized

    def _embedding(self, embedding: np.ndarray) -> np.ndarray:
        return embedding if embedding.size else np.zeros(self.embedding_channels, np.float16)


def _pixels(row: Row) -> UInt8[Tensor, "3 H W"]:
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _masks(row: Row, count: int) -> Bool[Tensor, "N H W"]:
    packed = np.frombuffer(row["masks"], np.uint8).reshape(count, (row["height"] * row["width"] + 7) // 8)
    return unpack_masks(torch.from_numpy(packed.copy()), row["height"], row["width"])
