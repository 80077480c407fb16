"""Masks as the runs of pixels down their columns, which is what COCO stores: enlarged without making a pixel.

Down a column, a bilinearly enlarged mask is a straight line between one row of the small mask and the next, so it
passes the threshold once between them or not at all. Where, is told by the two values: there are as many numbers to
look at as rows of the small mask, not of the large one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

from freesolo.ops.mask_storage import Rle, as_text
from freesolo.ops.masks import Projections, decode_rle


@dataclass(frozen=True, slots=True)
class ColumnRuns:
    """The masks of one image. No run is empty; runs of a column are in order and don't overlap, but may touch.

    Attributes:
        count: Of masks; a mask may be without runs.
        height: Of all masks, in px.
        width: Of all masks, in px.
        columns: Of each run its mask's index, times `width`, plus its column; ascending, `(K,)`.
        tops: First row of each run, `(K,)`.
        bottoms: One past its last row, `(K,)`.
    """

    count: int
    height: int
    width: int
    columns: Int64[Tensor, " K"]
    tops: Int64[Tensor, " K"]
    bottoms: Int64[Tensor, " K"]

    @classmethod
    def enlarged(cls, soft: Float[Tensor, "N h w"], height: int, width: int, threshold: float) -> ColumnRuns:
        """What `resize_masks_soft(soft, height, width) > threshold` has; smaller than `soft` will do, too.

        A value within rounding of the threshold may fall on either side of it. Waits for the device.

        Args:
            soft: Finite; N may be 0.
            height: Of the result, in px.
            width: Of the result, in px.
            threshold: What a pixel of the mask is above.
        """
        count, rows, _ = soft.shape
        if count == 0:
            none = torch.zeros(0, dtype=torch.int64, device=soft.device)
            return cls(0, height, width, none, none, none)
        threshold = torch.tensor(threshold, dtype=soft.dtype).item()  # as the masks are compared with it
        wide = functional.interpolate(soft[:, None], size=(rows, width), mode="bilinear", align_corners=False)[:, 0]
        wide = wide.transpose(1, 2).flatten(0, 1)  # the columns of all masks, (N * width, h)
        # Above and below the mask there is nothing: each column begins as often as it ends.
        inside = functional.pad(wide > threshold, (1, 1))
        changes = inside[:, 1:] != inside[:, :-1]
        columns, gaps = changes.nonzero().unbind(dim=1)
        passes = _passes(wide, columns, gaps, height, threshold)
        tops, bottoms = passes[0::2], passes[1::2]
        seen = bottoms > tops  # between two rows of the result
        return cls(count, height, width, columns[0::2][seen], tops[seen], bottoms[seen])

    def __getitem__(self, kept: Bool[Tensor, " N"]) -> ColumnRuns:
        """Some of the masks."""
        masks = self.columns // self.width
        run_kept = kept[masks]
        columns = self.columns - self.width * (~kept).cumsum(dim=0)[masks]
        return ColumnRuns(
            int(kept.sum()), self.height, self.width, columns[run_kept], self.tops[run_kept], self.bottoms[run_kept]
        )

    def projections(self) -> Projections:
        """How many pixels of each mask every row and every column holds."""
        columns = self.columns.new_zeros(self.count * self.width)
        columns.index_add_(0, self.columns, self.bottoms - self.tops)
        # A row holds as many pixels more than the one above it as runs begin there, and fewer as end.
        first = self.columns // self.width * (self.height + 1)
        begun = self.columns.new_zeros(self.count * (self.height + 1))
        begun.index_add_(0, first + self.tops, torch.ones_like(self.tops))
        begun.index_add_(0, first + self.bottoms, torch.full_like(self.tops, -1))
        rows = begun.view(self.count, self.height + 1)[:, :-1].cumsum(dim=1)
        return Projections(rows.int(), columns.view(self.count, self.width).int())

    def encode_rle(self) -> list[Rle]:
        """As `masks.encode_rle` encodes their pixels."""
        pixels = self.height * self.width
        begins = (self.columns * self.height + self.tops).cpu().numpy()
        ends = (self.columns * self.height + self.bottoms).cpu().numpy()
        firsts = np.arange(self.count) * pixels
        of_masks = np.searchsorted(begins, firsts[1:])
        counts = [
            {"size": [self.height, self.width], "counts": _counts(begin - first, end - first, pixels)}
            for first, begin, end in zip(firsts, np.split(begins, of_masks), np.split(ends, of_masks), strict=False)
        ]
        return [as_text(rle) for rle in coco_mask.frPyObjects(counts, self.height, self.width)] if counts else []

    def pixels(self) -> Bool[Tensor, "N H W"]:
        """The masks themselves, on the CPU."""
        return decode_rle(self.encode_rle(), self.height, self.width)


def _counts(begins: Int64[np.ndarray, " K"], ends: Int64[np.ndarray, " K"], pixels: int) -> list[int]:
    """COCO's counts of one mask: pixels outside, inside, outside, ... in turn, columns after one another."""
    apart = begins[1:] != ends[:-1]  # what ends at the foot of a column may go on at the head of the next one
    joined = begins[np.append(True, apart)[: len(begins)]], ends[np.append(apart, True)[: len(ends)]]
    counts: list[int] = np.diff(np.stack(joined, axis=1).ravel(), prepend=0, append=pixels).tolist()
    return counts if counts[-1] else counts[:-1]


def _passes(
    wide: Float[Tensor, "columns h"],
    columns: Int64[Tensor, " P"],
    gaps: Int64[Tensor, " P"],
    height: int,
    threshold: float,
) -> Int64[Tensor, " P"]:
    """The first row of the result that is past the threshold, where the values before and after a gap are not on its
    same side.

    Args:
        wide: Masks of the wanted width; each column's rows lie together.
        columns: Of each pass.
        gaps: Between rows `gap - 1` and `gap` of `wide`; 0 is above the first row, h below the last.
        height: Wanted.
        threshold: Passed from below by a column's 1st, 3rd, ... pass, from above by the others.
    """
    rows = wide.shape[1]
    before = wide[columns, (gaps - 1).clamp(min=0)].double()
    after = wide[columns, gaps.clamp(max=rows - 1)].double()
    # Row y of the result lies at (y + 1/2) * h / H - 1/2 of the rows of the mask.
    share = (threshold - before) / (after - before)
    row = (gaps - 0.5 + share) * (height / rows) - 0.5
    # What is at the threshold is not above it.
    passes = torch.where(after > before, row.floor() + 1, row.ceil())
    passes = torch.where(gaps == 0, 0.0, torch.where(gaps == rows, float(height), passes))
    return passes.long()
