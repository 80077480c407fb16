"""Photos at another size: what Pillow makes of them, to within one level."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import UInt8
from PIL import Image

from freesolo.data.resizing import resize_photo


def photo(height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """Noise, of which every pixel counts."""
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "new_size"),
    [
        ((48, 64), (21, 28)),
        ((48, 64), (96, 128)),
        ((37, 50), (64, 17)),
        ((1, 1), (3, 5)),
        ((1, 9), (4, 4)),
        ((9, 5), (1, 1)),
    ],
)
def test_a_photo_is_resized_as_pillow_would(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    image = photo(*size)

    resized = resize_photo(image, *new_size)

    expected = np.asarray(Image.fromarray(image).resize(new_size[::-1], Image.Resampling.BILINEAR))
    assert resized.shape == (*new_size, 3)
    assert np.abs(resized.astype(int) - expected).max() <= 1


def test_half_the_size_weighs_pixels_by_their_distance() -> None:
    """By hand: a triangle two new pixels wide, of which the photo's edge cuts off what lies outside."""
    image = np.repeat(np.uint8([[[0], [80], [160], [240]]]), 3, axis=2)

    resized = resize_photo(image, 1, 2)

    # New pixels at 1 and 3, weights 1 - |distance| / 2: 3/4, 3/4 and 1/4 of those within.
    assert resized[0, :, 0].tolist() == [
        round((0.75 * 0 + 0.75 * 80 + 0.25 * 160) / 1.75),
        round((0.25 * 80 + 0.75 * 160 + 0.75 * 240) / 1.75),
    ]


def test_the_same_size_is_the_same_photo() -> None:
    image = photo(12, 7)

    np.testing.assert_array_equal(resize_photo(image, 12, 7), image)


def test_a_part_of_a_photo_is_all_that_is_seen_of_it() -> None:
    image = photo(20, 30)
    part = image[4:14, 5:25]

    np.testing.assert_array_equal(resize_photo(part, 6, 8), resize_photo(part.copy(), 6, 8))
