"""How rows of a training's stream (`data.views`) become a batch of tensors, in the train worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from freesolo.data.views import ContrastiveView, Row, SegmentationView
from freesolo.ops.images import pad_to_batch
from freesolo.ops.masks import unpack_masks
from freesolo.types import ImageBatch, Instances, SegmentationBatch


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


def collate_crops(view: ContrastiveView, rows: Sequence[Row]) -> CropPair:
    """Usable rows of a view, stacked."""
    size = view.settings.size
    query, key = (_stacked([row[name] for row in rows], size) for name in ("query_crop", "key_crop"))
    return CropPair(query, key, tuple(row["image_id"] for row in rows))


def collate_photos(view: SegmentationView, rows: Sequence[Row]) -> SegmentationBatch:
    """Usable rows of a view, at least one; photos and masks padded to one extent of multiples of `size_divisor`."""
    pixels, sizes = pad_to_batch([_pixels(row) for row in rows], view.settings.size_divisor)
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
        embeddings=torch.from_numpy(embeddings.astype(np.float32)).view(sum(counts), view.embedding_channels),
    )
    return SegmentationBatch(batch, instances)


def _stacked(crops: list[bytes], size: int) -> UInt8[Tensor, "B 3 S S"]:
    pixels = np.frombuffer(b"".join(crops), np.uint8).reshape(len(crops), size, size, 3)
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()


def _pixels(row: Row) -> UInt8[Tensor, "3 H W"]:
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _masks(row: Row, count: int) -> Bool[Tensor, "N H W"]:
    packed = np.frombuffer(row["masks"], np.uint8).reshape(count, (row["height"] * row["width"] + 7) // 8)
    return unpack_masks(torch.from_numpy(packed.copy()), row["height"], row["width"])
