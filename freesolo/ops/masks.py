"""Boolean masks: boxes, areas, centres, overlaps; from and to the forms in which they are stored.

Masks are `(N, H, W)`; N may be 0 everywhere. Boxes `_xyxy` are pixel edges with exclusive x2 and y2: a one-pixel mask
at row r and column c has the box `(c, r, c + 1, r + 1)`. Functions of tensors neither copy to the host nor wait for the
device; those that encode to bytes do both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int32, Int64
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

from freesolo.ops.gram import gram
from freesolo.ops.mask_storage import Rle, as_text, rle_pixels

_NO_OVERFLOW = 255
"""So many ones are the most that a byte can hold."""


@dataclass(frozen=True, slots=True)
class Projections:
    """How many pixels of each mask every row and every column holds: all that boxes, areas and centres are told from.

    Attributes:
        rows: `(N, H)`.
        columns: `(N, W)`.
    """

    rows: Int32[Tensor, "N H"]
    columns: Int32[Tensor, "N W"]

    @classmethod
    def of(cls, masks: Bool[Tensor, "N H W"]) -> Projections:
        """Two passes over the masks."""
        words = _words(masks)
        return cls(_count_rows(words), _count_columns(words, masks.shape[2]))

    def boxes_xyxy(self) -> Float[Tensor, "N 4"]:
        """Tight boxes as pixel edges `(x1, y1, x2, y2)`; all 0 for an empty mask."""
        top, bottom = _extent(self.rows > 0)
        left, right = _extent(self.columns > 0)
        return torch.stack((left, top, right, bottom), dim=1).float()

    def boxes_xywh(self) -> Float[Tensor, "N 4"]:
        """Tight boxes in COCO's stored format `(x, y, width, height)`; all 0 for an empty mask."""
        left, top, right, bottom = self.boxes_xyxy().unbind(dim=1)
        return torch.stack((left, top, right - left, bottom - top), dim=1)

    def areas(self) -> Int64[Tensor, " N"]:
        """Pixels of each mask."""
        return self.rows.sum(dim=1)

    def centres_of_mass(self) -> Float[Tensor, "N 2"]:
        """Mean position `(y, x)` of the pixels of each mask; `(0, 0)` for an empty mask.

        A pixel sits at its centre: a one-pixel mask at row r and column c has the centre of mass `(r + 0.5, c + 0.5)`,
        in the same coordinates as the boxes. Sums are of integers, so the result does not depend on their order.
        """
        twice_area = 2 * self.areas().clamp(min=1)
        moments = []
        for counts in (self.rows, self.columns):
            twice_position = 2 * torch.arange(counts.shape[1], device=counts.device) + 1
            moments.append((counts * twice_position).sum(dim=1) / twice_area)
        return torch.stack(moments, dim=1)


def boxes_xyxy(masks: Bool[Tensor, "N H W"]) -> Float[Tensor, "N 4"]:
    """As `Projections.boxes_xyxy`."""
    return Projections.of(masks).boxes_xyxy()


def boxes_xywh(masks: Bool[Tensor, "N H W"]) -> Float[Tensor, "N 4"]:
    """As `Projections.boxes_xywh`."""
    return Projections.of(masks).boxes_xywh()


def areas(masks: Bool[Tensor, "N H W"]) -> Int64[Tensor, " N"]:
    """Pixels of each mask."""
    return _count_rows(_words(masks)).sum(dim=1)


def mask_iou(first: Bool[Tensor, "N ..."], second: Bool[Tensor, "M ..."]) -> Float[Tensor, "N M"]:
    """Intersection over union of every pair; 0 where both masks are empty.

    One matrix product of zeros and ones: exact in float32 for masks of up to 2**24 pixels, TF32 included. Autocast is
    switched off, because bfloat16 cannot hold the counts.
    """
    with torch.autocast(device_type=first.device.type, enabled=False):
        flat_first = first.flatten(1).float()
        flat_second = flat_first if second is first else second.flatten(1).float()
        intersection = gram(flat_first) if second is first else flat_first @ flat_second.T
        union = flat_first.sum(dim=1)[:, None] + flat_second.sum(dim=1)[None, :] - intersection
        return intersection / union.clamp(min=1.0)


def resize_masks_soft(masks: Float[Tensor, "N h w"], height: int, width: int) -> Float[Tensor, "N H W"]:
    """Soft masks resized bilinearly (pixel centres, no antialiasing)."""
    resized = functional.interpolate(masks[:, None], size=(height, width), mode="bilinear", align_corners=False)
    return resized[:, 0]


def encode_rle(masks: Bool[Tensor, "N H W"]) -> list[Rle]:
    """Run-length encode a stack of masks, one call of pycocotools for all of them.

    Returns:
        One encoding a mask, in order; an empty list for no masks.
    """
    if masks.shape[0] == 0:
        return []
    # COCO runs down columns: transposed here, the memory is already the (H, W, N) Fortran order that pycocotools wants.
    columns_first = masks.view(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    encoded = coco_mask.encode(columns_first.transpose(2, 1, 0))
    return [as_text(rle) for rle in encoded]


def decode_rle(rles: Sequence[Rle], height: int, width: int) -> Bool[Tensor, "N H W"]:
    """`rle_pixels` as a tensor on the CPU, its rows together in memory.

    Raises:
        ValueError: If an encoding is of another size, or damaged.
    """
    return torch.from_numpy(rle_pixels(rles, height, width)).contiguous()


def _words(masks: Bool[Tensor, "N H W"]) -> Int64[Tensor, "N H words"]:
    """Eight neighbours of a row as the bytes of a word, which are added all at once: as many as `_NO_OVERFLOW` words,
    ten times as fast as booleans into int32. The last word of a row is filled up with zeros."""
    missing = -masks.shape[2] % 8
    if missing or not masks.is_contiguous() or masks.storage_offset() % 8:
        masks = functional.pad(masks, (0, missing)).contiguous()
    # Flat, because an axis of one entry may have any stride, which a view of words refuses.
    return masks.view(-1).view(torch.int64).view(*masks.shape[:2], masks.shape[2] // 8)


def _count_rows(words: Int64[Tensor, "N H words"]) -> Int32[Tensor, "N H"]:
    """Pixels of each row."""
    sums = torch.stack([part.sum(dim=2) for part in words.split(_NO_OVERFLOW, dim=2)], dim=2)
    return sums.view(torch.uint8).sum(dim=2, dtype=torch.int32)


def _count_columns(words: Int64[Tensor, "N H words"], width: int) -> Int32[Tensor, "N W"]:
    """Pixels of each of so many columns."""
    sums = torch.stack([part.sum(dim=1) for part in words.split(_NO_OVERFLOW, dim=1)], dim=1)
    return sums.view(torch.uint8)[:, :, :width].sum(dim=1, dtype=torch.int32)


def _extent(occupied: Bool[Tensor, "N length"]) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
    """First occupied position and one past the last; both 0 where nothing is occupied."""
    length = occupied.shape[1]
    positions = torch.arange(length, device=occupied.device)
    start = torch.where(occupied, positions, length).amin(dim=1)
    end = torch.where(occupied, positions + 1, 0).amax(dim=1)
    return torch.minimum(start, end), end  # with none occupied, start is `length` and end is 0
