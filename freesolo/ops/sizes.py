"""The size that an image is resized to."""

from __future__ import annotations


def resized_size(height: int, width: int, short_side: int, long_side_max: int) -> tuple[int, int]:
    """Height and width after a resize that keeps the aspect ratio.

    The short side becomes `short_side`, unless the long side would then exceed `long_side_max`: that then becomes
    the long side. Whole-number arithmetic, halves rounded up, so that every machine agrees; no side is below 1.

    Raises:
        ValueError: If a number is not positive.
    """
    if min(height, width, short_side, long_side_max) <= 0:
        raise ValueError(f"sizes must be positive: {height} x {width} to {short_side}, at most {long_side_max}")
    short, long = min(height, width), max(height, width)
    numerator, denominator = (
        (short_side, short) if long * short_side <= long_side_max * short else (long_side_max, long)
    )
    new_height, new_width = ((2 * side * numerator + denominator) // (2 * denominator) for side in (height, width))
    return max(1, new_height), max(1, new_width)
