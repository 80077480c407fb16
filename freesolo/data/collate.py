"""How rows of a training's stream (`data.views`) become a batch of tensors, in the train worker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from torch import Tensor

from freesolo.data.views import ContrastiveView, Row, SegmentationView
from freesolo.ops.mask_storage import unpack_masks
from freesolo.types import CropPair, ImageBatch, Instances, SegmentationBatch


def collate_crops(view: ContrastiveView, rows: Sequence[Row]) -> CropPair:
    """Usable rows of a view, stacked."""
    size = view.settings.size
    query, key = (_stacked([row[name] for row in rows], size) for name in ("query_crop", "key_crop"))
    return CropPair(query, key, tuple(row["image_id"] for row in rows))


def collate_photos(view: SegmentationView, rows: Sequence[Row]) -> SegmentationBatch:
    """Usable rows of a view, at least one; photos and masks padded to one extent of multiples of `size_divisor`."""
    counts = [len(row["scores"]) for row in rows]
    divisor = view.settings.size_divisor
    height, width = (-(-max(row[side] for row in rows) // divisor) * divisor for side in ("height", "width"))
    pixels = np.zeros((len(rows), 3, height, width), np.uint8)
    masks = np.zeros((sum(counts), height, width), bool)
    first = 0
    for image, row, count in zip(pixels, rows, counts, strict=True):
        image[:, : row["height"], : row["width"]] = _pixels(row["pixels"], row["height"], row["width"]).transpose(
            2, 0, 1
        )
        boxes = np.reshape(row["mask_boxes_xyxy"], (count, 4)).tolist()
        part_sizes = [(bottom - top, right - left) for left, top, right, bottom in boxes]
        parts = unpack_masks(np.frombuffer(row["masks"], np.uint8), part_sizes)
        for mask, part, (left, top, right, bottom) in zip(masks[first : first + count], parts, boxes, strict=True):
            mask[top:bottom, left:right] = part
        first += count
    embeddings = np.concatenate([np.frombuffer(row["embeddings"], np.float16) for row in rows])
    sizes = torch.tensor([[row["height"], row["width"]] for row in rows], dtype=torch.int64)
    return SegmentationBatch(
        images=ImageBatch(torch.from_numpy(pixels), sizes, tuple(row["image_id"] for row in rows)),
        instances=Instances(
            image_index=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)),
            masks=torch.from_numpy(masks),
            category_ids=torch.tensor([c for row in rows for c in row["category_ids"]], dtype=torch.int64),
            scores=torch.tensor([score for row in rows for score in row["scores"]], dtype=torch.float32),
            embeddings=torch.from_numpy(embeddings.astype(np.float32)).view(sum(counts), view.embedding_channels),
        ),
    )


def _stacked(crops: Sequence[bytes | pa.Buffer], size: int) -> UInt8[Tensor, "B 3 S S"]:
    pixels = np.empty((len(crops), 3, size, size), np.uint8)
    for image, crop in zip(pixels, crops, strict=True):
        image[...] = _pixels(crop, size, size).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _pixels(data: bytes | pa.Buffer, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)
