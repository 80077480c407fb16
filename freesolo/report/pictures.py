"""Masks drawn over photos, contact sheets, and pictures as files.

Legend of shapes: H, W height and width of a photo in px; N masks. Pictures are RGB in 0..255.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

GOLDEN_RATIO = 0.618033988749895
PAPER = (246, 245, 242)
INK = (52, 58, 64)
FADED = 0.6
"""Of the surroundings of an object that was cut out, the share that is paper."""

CUT_OUT_MIN = 8
"""Pixels of a photo across a cut-out, at least: a speck is shown with something around it."""

# From the least to the greatest of a map: dark to bright, so that it reads in grey too.
_HEAT = ((20, 12, 60), (110, 28, 110), (205, 60, 80), (248, 150, 40), (252, 245, 165))


def instance_colours(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Distinct colours, the same ones each time: hues a golden angle apart, in three strengths."""
    strengths = ((0.80, 1.00), (0.60, 0.95), (0.90, 0.80))
    colours = [colorsys.hsv_to_rgb((0.56 + n * GOLDEN_RATIO) % 1.0, *strengths[n % 3]) for n in range(count)]
    return np.round(np.asarray(colours, dtype=np.float64).reshape(count, 3) * 255).astype(np.uint8)


def draw_masks(
    photo: UInt8[np.ndarray, "H W 3"],
    masks: Bool[np.ndarray, "N H W"],
    scores: Float[np.ndarray, " N"] | None = None,
    *,
    opacity: float = 0.45,
) -> UInt8[np.ndarray, "H W 3"]:
    """A photo with its masks: each tinted in its own colour and outlined inside its border.

    Small masks are drawn over large ones, so that none is hidden. A mask keeps its colour whatever the others are.

    Args:
        photo: RGB.
        masks: N may be 0; then the photo is returned as it is, in a copy. Empty masks draw nothing.
        scores: Written onto their masks, in percent, where given.
        opacity: Of the tint, in [0, 1]; 0 draws outlines alone.
    """
    picture = photo.astype(np.float32)
    colours = instance_colours(len(masks))
    thickness = max(1, round(min(photo.shape[:2]) / 300))
    areas = masks.sum(axis=(1, 2))
    largest_first = np.argsort(-areas, kind="stable")
    for n in largest_first:
        picture[masks[n]] = (1 - opacity) * picture[masks[n]] + opacity * colours[n]
        picture[_inner_border(masks[n], thickness)] = colours[n]
    drawn = np.round(picture).astype(np.uint8)
    if scores is None:
        return drawn
    canvas = Image.fromarray(drawn)
    for n in largest_first:
        if areas[n]:
            _write_score(canvas, masks[n], float(scores[n]), tuple(int(c) for c in colours[n]))
    return np.asarray(canvas).copy()


def draw_similarity(
    photo: UInt8[np.ndarray, "H W 3"], similarity: Float[np.ndarray, "h w"], *, opacity: float = 0.7
) -> UInt8[np.ndarray, "H W 3"]:
    """A photo in grey under a map of its cells: from its least value, dark violet, to its greatest, light yellow.

    So is a Free Mask's soft mask scaled (arXiv:2202.12181 sec. 3.1); a map that is the same everywhere is dark.

    Args:
        photo: RGB.
        similarity: Of each cell of the photo to some point, of any scale; enlarged bilinearly.
        opacity: Of the map, in [0, 1].
    """
    height, width = photo.shape[:2]
    shifted = similarity.astype(np.float32) - similarity.min()
    share = shifted / max(float(shifted.max()), 1e-12)
    smooth = np.asarray(Image.fromarray(share).resize((width, height), Image.Resampling.BILINEAR))
    steps = np.linspace(0, 1, len(_HEAT))
    heat = np.stack([np.interp(smooth, steps, channel) for channel in np.transpose(_HEAT)], axis=2)
    grey = np.asarray(Image.fromarray(photo).convert("L"))[:, :, None]
    return np.round((1 - opacity) * grey + opacity * heat).astype(np.uint8)


def draw_point(photo: UInt8[np.ndarray, "H W 3"], point: tuple[float, float]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture with a ring around a point.

    Args:
        photo: RGB.
        point: `x` and `y`, as shares of width and height.
    """
    canvas = Image.fromarray(photo)
    x, y = point[0] * canvas.width, point[1] * canvas.height
    radius = min(canvas.size) / 28
    pen = ImageDraw.Draw(canvas)
    for outer, colour in ((radius, (255, 255, 255)), (radius * 0.75, (0, 0, 0)), (radius * 0.5, (60, 220, 255))):
        pen.ellipse((x - outer, y - outer, x + outer, y + outer), fill=colour)
    return np.asarray(canvas).copy()


def contact_sheet(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    captions: Sequence[str] = (),
    *,
    columns: int = 4,
    cell: int = 256,
    gap: int = 12,
) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures side by side in a grid, each shrunk or enlarged to fit a square cell and standing at its foot.

    Args:
        pictures: Of any sizes; none at all gives one empty cell.
        captions: Under the pictures, cut to the cell's width; either one a picture or none.
        columns: Pictures in a row; fewer where there are fewer.
        cell: Side of the square that a picture is fitted to.
        gap: Pixels around the cells.

    Raises:
        ValueError: If captions and pictures differ in number.
    """
    if captions and len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions")
    columns = max(1, min(columns, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    font_size = max(9, cell // 18)
    font = ImageFont.load_default(size=font_size)
    caption_height = font_size * 2 if captions else 0
    pitch_y = cell + caption_height + gap
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * pitch_y + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, pixels in enumerate(pictures):
        left, top = gap + n % columns * (cell + gap), gap + n // columns * pitch_y
        picture = _fit(pixels, cell)
        sheet.paste(picture, (left + (cell - picture.width) // 2, top + cell - picture.height))
        if captions:
            text = _cut(captions[n], cell, font)
            pen.text((left + cell / 2, top + cell + caption_height / 2), text, font=font, fill=INK, anchor="mm")
    return np.asarray(sheet).copy()


def shrink(photo: UInt8[np.ndarray, "H W 3"], long_side_max: int) -> UInt8[np.ndarray, "h w 3"]:
    """The photo with its long side at most `long_side_max` px; itself where it is small enough."""
    height, width = _shrunk_size(photo.shape[0], photo.shape[1], long_side_max)
    if (height, width) == photo.shape[:2]:
        return photo
    return np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS)).copy()


def shrink_mask(mask: Bool[np.ndarray, "H W"], long_side_max: int) -> Bool[np.ndarray, "h w"]:
    """The mask at the size that `shrink` gives its photo: pixels of which half or more is covered.

    A mask too thin for that keeps the pixel that it covers most, so that no object vanishes from a picture.
    """
    height, width = _shrunk_size(mask.shape[0], mask.shape[1], long_side_max)
    if (height, width) == mask.shape:
        return mask
    soft = Image.fromarray(mask.astype(np.float32))
    coverage = np.asarray(soft.resize((width, height), Image.Resampling.BOX))
    shrunk: Bool[np.ndarray, "h w"] = coverage >= 0.5
    if mask.any() and not shrunk.any():
        shrunk = np.zeros_like(shrunk)
        shrunk.flat[int(coverage.argmax())] = True
    return shrunk


def cut_out(photo: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"], side: int) -> UInt8[np.ndarray, "h w 3"]:
    """One object of a photo, to be told at a glance: it in colour with a dark border, its surroundings grey and faded.

    Args:
        photo: RGB.
        mask: The object's; an empty one gives the whole photo, grey and faded.
        side: Of the picture's long side, in px.

    Returns:
        A square around the mask, a third larger than its box; cut off where the photo ends, which it never leaves.
    """
    window = _window(mask)
    soft = Image.fromarray(mask[window].astype(np.float32))
    scale = side / max(soft.size)
    size = (max(1, round(soft.width * scale)), max(1, round(soft.height * scale)))
    picture = Image.fromarray(np.ascontiguousarray(photo[window]))
    pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), np.float32)
    inside = np.asarray(soft.resize(size, Image.Resampling.BILINEAR)).clip(0.0, 1.0)
    if 0.0 < inside.max() < 0.5:
        inside = inside / inside.max()  # too thin for a pixel of the picture, it would hardly be seen
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.LANCZOS), np.float32)
    around = FADED * np.asarray(PAPER, np.float32) + (1 - FADED) * grey[:, :, None]
    drawn: Float[np.ndarray, "h w 3"] = around + inside[:, :, None] * (pixels - around)
    drawn[_inner_border(inside >= 0.5, max(1, side // 80))] = INK
    return np.asarray(drawn.round().clip(0, 255), np.uint8)


def encode_png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The picture as a PNG file, without loss."""
    return _encode(picture, "PNG", optimize=True)


def encode_jpeg(picture: UInt8[np.ndarray, "H W 3"], *, quality: int = 82) -> bytes:
    """The picture as a JPEG file."""
    return _encode(picture, "JPEG", quality=quality, optimize=True)


def encode_webp(picture: UInt8[np.ndarray, "H W 3"], *, quality: int = 80) -> bytes:
    """The picture as a WebP file: of a small one, half of what JPEG needs."""
    return _encode(picture, "WEBP", quality=quality)


def _encode(picture: UInt8[np.ndarray, "H W 3"], file_format: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, file_format, **options)
    return file.getvalue()


def _window(mask: Bool[np.ndarray, "H W"]) -> tuple[slice, slice]:
    """Rows and columns of a square around a mask, as far as the photo goes; all of them for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return slice(None), slice(None)
    spans = [(int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)]
    side = max(math.ceil(max(stop - start for start, stop in spans) * 4 / 3), CUT_OUT_MIN)
    top, left = (
        max(0, min((start + stop - side) // 2, length - side))
        for (start, stop), length in zip(spans, mask.shape, strict=True)
    )
    return slice(top, top + side), slice(left, left + side)


def _inner_border(mask: Bool[np.ndarray, "H W"], thickness: int) -> Bool[np.ndarray, "H W"]:
    """Pixels of the mask within `thickness` steps of a pixel outside it; the picture's edge is outside."""
    inside = mask
    for _ in range(thickness):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    border: Bool[np.ndarray, "H W"] = mask & ~inside
    return border


def _write_score(canvas: Image.Image, mask: Bool[np.ndarray, "H W"], score: float, colour: tuple[int, ...]) -> None:
    """Write a score on a chip of the mask's colour at the top left of its box, inside the picture."""
    rows, columns = np.nonzero(mask)
    pen = ImageDraw.Draw(canvas)
    font_size = max(9, min(canvas.size) // 32)
    font = ImageFont.load_default(size=font_size)
    text = f"{score * 100:.0f}"
    _, _, width, height = pen.textbbox((0, 0), text, font=font, anchor="lt")
    pad = max(2, font_size // 4)
    left = min(max(int(columns.min()), 0), max(canvas.width - int(width) - 2 * pad, 0))
    top = min(max(int(rows.min()), 0), max(canvas.height - int(height) - 2 * pad, 0))
    pen.rectangle((left, top, left + width + 2 * pad, top + height + 2 * pad), fill=colour)
    dark_text = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    pen.text((left + pad, top + pad), text, font=font, fill=(0, 0, 0) if dark_text else (255, 255, 255), anchor="lt")


def _fit(pixels: UInt8[np.ndarray, "_ _ 3"], side: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Pixels of an enlarged picture stay visible: the sheet shows what the model saw.
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _shrunk_size(height: int, width: int, long_side_max: int) -> tuple[int, int]:
    scale = min(1.0, long_side_max / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
