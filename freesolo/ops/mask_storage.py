"""The forms in which masks are stored: COCO's run-length encodings, and bits.

Arrays of numpy, not tensors: the processes that read and decode photos for a training load no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt8
from pycocotools import mask as coco_mask

Rle: TypeAlias = dict[str, Any]
"""COCO's compressed run-length encoding: `size` is `[height, width]`, `counts` text (so that JSON takes it)."""

# pycocotools' C code trusts what it is given: runs that do not add up to the mask are decoded to whatever lay in
# memory, a number that does not end is read past its end, a polygon far outside is a crash or an endless loop. So
# nothing reaches it that was not checked here.
_COUNT_CHARACTERS = 6  # of a run: C shifts an int, and six of 5 bits hold every run of a mask below 2**29 pixels
_MAX_MASK_PIXELS = 2**29 - 1
_MAX_COORDINATE = 1_000_000.0  # px; C counts fifths of a pixel in an int
_MAX_OUTLINE = 4_000_000.0  # px of all polygons of one mask; C takes 40 bytes for each


def rle_pixels(rles: Sequence[Rle], height: int, width: int) -> Bool[np.ndarray, "N H W"]:
    """The masks of one image's run-length encodings, one call of pycocotools for all of them.

    Args:
        rles: Compressed encodings; `counts` may be text or bytes.
        height: Of the image, in px.
        width: Of the image, in px.

    Returns:
        Masks whose columns lie together in memory, as COCO has them; `(0, height, width)` for none.

    Raises:
        ValueError: If an encoding is of another size, or damaged.
    """
    _check(rles, height, width)
    if not rles:
        return np.zeros((0, height, width), bool)
    pixels: np.ndarray = coco_mask.decode(list(rles)).transpose(2, 0, 1).view(bool)
    return pixels


def each_rle_pixels(rles: Sequence[Rle], height: int, width: int) -> Iterator[Bool[np.ndarray, "H W"]]:
    """As `rle_pixels`, a mask at a time: all masks of a large photo are more than a process should hold.

    Raises:
        ValueError: As `rle_pixels`, before the first.
    """
    _check(rles, height, width)
    for rle in rles:
        yield coco_mask.decode(rle).view(bool)


def rle_from_coco(segmentation: Any, height: int, width: int) -> Rle:
    """The run-length encoding of a COCO annotation's `segmentation`, whichever of COCO's three forms it has.

    Args:
        segmentation: Polygons `[[x1, y1, x2, y2, ...], ...]` (their union), an uncompressed encoding (`counts` a list)
            or a compressed one. Comes from a file of anyone's, so anything else is looked at, too, and refused.
        height: Of the image, in px.
        width: Of the image, in px.

    Raises:
        ValueError: If there are no polygons, they are not lists of x, y, x, y, ... within reason, or an encoding is of
            another size or damaged.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("a segmentation without polygons")
        polygons = _checked_polygons(segmentation)
        return as_text(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("a segmentation that is neither polygons nor a run-length encoding")
    _check_size(segmentation, height, width)
    counts = segmentation["counts"]
    if isinstance(counts, list):
        runs = {"size": [height, width], "counts": _checked_runs(counts, height * width)}
        return as_text(coco_mask.frPyObjects(runs, height, width))
    check_rle_counts([counts], [height * width])
    return as_text(segmentation)


def check_rle_counts(counts: Sequence[Any], pixels: Sequence[int]) -> None:
    """See that compressed run lengths are what `pycocotools` writes, of many masks at once.

    Args:
        counts: Of each mask: what a file says they are, text or bytes if they are any.
        pixels: Height times width of each mask.

    Raises:
        ValueError: If counts are no text of COCO's alphabet, break off in the midst of a run, have a run of no pixels
            other than the first, or do not add up to the mask's pixels; says which mask.
    """
    encoded = [_ascii(text, index) for index, text in enumerate(counts)]
    if not encoded:
        return
    lengths = np.array([len(text) for text in encoded])
    mask_pixels = np.array([min(count, 2**62) for count in pixels], np.int64)
    _refuse(lengths == 0, "is empty")
    _refuse((mask_pixels < 0) | (mask_pixels > _MAX_MASK_PIXELS), f"is of a mask of over {_MAX_MASK_PIXELS} pixels")
    characters = np.frombuffer(b"".join(encoded), np.uint8) - np.uint8(48)  # below 48 wraps round, to above 63
    mask_of_character = np.repeat(np.arange(len(encoded)), lengths)
    _refuse(characters > 63, "has a character that is none of COCO's", mask_of_character)
    is_last = (characters & 32) == 0
    _refuse(~is_last[np.cumsum(lengths) - 1], "breaks off in the midst of a run")

    # A number is its characters' low 5 bits, least first; the last one's bit 4 is the sign.
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    widths = ends - starts + 1
    mask_of_run = mask_of_character[ends]
    _refuse(widths > _COUNT_CHARACTERS, "has a run that is too long", mask_of_run)
    place = np.arange(len(characters)) - np.repeat(starts, widths)
    numbers = np.add.reduceat((characters & 31).astype(np.int64) << (5 * place), starts)
    numbers -= np.where(characters[ends] & 16, np.int64(1) << (5 * widths), 0)

    runs = _undo_differences(numbers, mask_of_run)
    first = np.concatenate([[True], mask_of_run[1:] != mask_of_run[:-1]])
    _refuse((runs < 0) | ((runs == 0) & ~first), "has a run of no pixels", mask_of_run)
    totals = np.add.reduceat(runs, np.flatnonzero(first))
    _refuse(totals != mask_pixels, "does not add up to the pixels of its image")


def pack_masks(masks: Sequence[Bool[np.ndarray, "_ _"]]) -> bytes:
    """Masks, each of its own size, as bits: eight pixels a byte in row order, the most significant first.

    Each mask is padded to whole bytes.
    """
    return b"".join(np.packbits(mask).tobytes() for mask in masks)


def unpack_masks(
    packed: UInt8[np.ndarray, " bytes"], sizes: Sequence[tuple[int, int]]
) -> Iterator[Bool[np.ndarray, "_ _"]]:
    """The inverse of `pack_masks`.

    Args:
        packed: Bits of the masks.
        sizes: Height and width of each.

    Raises:
        ValueError: If the bytes are not those of masks of these sizes; before the first.
    """
    ends = np.cumsum([(height * width + 7) // 8 for height, width in sizes], dtype=np.int64)
    if len(packed) != (ends[-1] if len(ends) else 0):
        raise ValueError(f"{len(packed)} bytes cannot be masks of {list(sizes)!r:.60} pixels")
    for mask, (height, width) in zip(np.split(packed, ends)[:-1], sizes, strict=True):
        yield np.unpackbits(mask, count=height * width).view(bool).reshape(height, width)


def _check(rles: Sequence[Rle], height: int, width: int) -> None:
    for rle in rles:
        _check_size(rle, height, width)
    check_rle_counts([rle["counts"] for rle in rles], [height * width] * len(rles))


def as_text(rle: Rle) -> Rle:
    """An encoding as pycocotools gives it, or as a file has it, with text as counts."""
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}


def _check_size(rle: Rle, height: int, width: int) -> None:
    size = rle.get("size")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(f"a mask of size {size!r:.40} (height, width) in an image of [{height}, {width}]")


def _ascii(counts: object, index: int) -> bytes:
    if isinstance(counts, str) and counts.isascii():
        return counts.encode("ascii")
    if isinstance(counts, bytes):
        return counts
    raise ValueError(f"run-length encoding {index} is not text of COCO's alphabet")


def _refuse(wrong: Bool[np.ndarray, " n"], complaint: str, mask_of: Integer[np.ndarray, " n"] | None = None) -> None:
    """Raise if anything is wrong with a mask; `mask_of` tells which mask each entry of `wrong` belongs to."""
    if wrong.any():
        index = int(np.argmax(wrong))
        mask = index if mask_of is None else int(mask_of[index])
        raise ValueError(f"run-length encoding {mask} {complaint}")


def _undo_differences(
    numbers: Int64[np.ndarray, " n"], mask_of_run: Integer[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Runs from what COCO stores of them: from the fourth on, the difference to the run two before."""
    changes = np.flatnonzero(np.concatenate([[True], mask_of_run[1:] != mask_of_run[:-1]]))
    sizes = np.diff(np.concatenate([changes, [len(numbers)]]))
    place = np.arange(len(numbers)) - np.repeat(changes, sizes)
    runs = numbers.copy()
    for chain in ((place % 2 == 1), (place % 2 == 0) & (place > 0)):
        sums = np.cumsum(np.where(chain, numbers, 0))
        before = np.repeat(sums[changes] - np.where(chain, numbers, 0)[changes], sizes)
        runs[chain] = (sums - before)[chain]
    return runs


def _checked_runs(runs: Sequence[Any], pixels: int) -> list[int]:
    """Uncompressed runs, without the empty ones that some tools write within."""
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != pixels or pixels > _MAX_MASK_PIXELS:
        raise ValueError(f"counts that are not whole numbers from 0 that add up to {pixels} pixels")
    merged: list[int] = []
    for place, run in enumerate(runs):
        if run or not merged:
            if len(merged) % 2 == place % 2:
                merged.append(run)
            else:
                merged[-1] += run  # an empty run before it: it goes on with the one before that
    return merged


def _checked_polygons(polygons: Sequence[Any]) -> list[list[float]]:
    outline = 0.0
    checked: list[list[float]] = []
    for polygon in polygons:
        if not isinstance(polygon, list | tuple) or len(polygon) % 2 or len(polygon) < 6:
            raise ValueError("a polygon that is not a list of x, y, x, y, ... of three points or more")
        if not all(
            type(each) in (int, float) and -_MAX_COORDINATE <= each <= _MAX_COORDINATE for each in polygon
        ):  # which NaN is not, either
            raise ValueError(f"a polygon with a coordinate that is no number within {_MAX_COORDINATE:g} px")
        points = np.array(polygon, np.float64).reshape(-1, 2)
        outline += float(np.abs(points - np.roll(points, 1, axis=0)).sum())
        checked.append(points.flatten().tolist())
    if outline > _MAX_OUTLINE:
        raise ValueError(f"polygons with an outline of {outline:.0f} px, more than {_MAX_OUTLINE:.0f}")
    return checked
