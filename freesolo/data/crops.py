"""Random crops of a photo, on the host."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8

from freesolo.data.resizing import resize_photo

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_ATTEMPTS = 10  # to fit a random rectangle into an image, as in torchvision


def random_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random part of an image, of aspect ratio 3/4 to 4/3.

    Args:
        height: Of the image in px.
        width: Of the image in px.
        scale: Least and greatest share of the image's area.
        rng: Source of randomness.

    Returns:
        Its box, xywh in px. Where no such part fits (a very long image), the largest part in the middle whose ratio is
        allowed.
    """
    low, high = _ASPECT_RATIOS
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return int(left), int(top), crop_width, crop_height
    crop_width = min(width, max(1, round(height * high)))
    crop_height = min(height, max(1, round(width / low)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def scaled_box(
    box_xywh: tuple[int, int, int, int], *, size: tuple[int, int], scaled_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where a box of an image is in the image at another size: every pixel there that it touches.

    Args:
        box_xywh: In px of the image; not empty, and wholly inside.
        size: Height and width of the image.
        scaled_size: Those that it has now.

    Returns:
        Not empty, and wholly inside; the box itself where the size is the same.
    """
    left, top, width, height = box_xywh
    (down, across), (rows, columns) = size, scaled_size
    first_row, first_column = top * rows // down, left * columns // across
    last_row, last_column = -(-(top + height) * rows // down), -(-(left + width) * columns // across)
    return first_column, first_row, last_column - first_column, last_row - first_row


def cut(
    image: UInt8[np.ndarray, "H W 3"], box_xywh: tuple[int, int, int, int], size: int
) -> UInt8[np.ndarray, "S S 3"]:
    """A part of an image, not empty, resized to a square of `size` px, bilinearly with antialiasing."""
    left, top, width, height = box_xywh
    # Cut before resizing, so that pixels just outside it don't shine in.
    return resize_photo(image[top : top + height, left : left + width], size, size)
