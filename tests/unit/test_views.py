"""A sample's crops are the same parts of the photo, decoded at whatever size is enough for them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from freesolo.data import views
from freesolo.data.crops import cut, random_box, scaled_box
from freesolo.data.photos import decode_photo
from freesolo.data.shards import Sample
from freesolo.data.views import ContrastiveView, MaskPart, resized_mask
from freesolo.settings import ViewSettings

SCALE = (0.2, 1.0)
HEIGHT, WIDTH = 600, 900


@pytest.fixture(scope="module")
def sample() -> Sample:
    """A photo whose pixels tell where they are."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([rows * 255 / HEIGHT, columns * 255 / WIDTH, np.full_like(rows, 128)], axis=2).astype(np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=95)
    return Sample("photo", jpeg.getvalue(), 1, "photo.jpg", width=WIDTH, height=HEIGHT)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [32, 224, 1000])
def test_crops_are_the_drawn_parts_of_the_photo(
    sample: Sample, size: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, ...]] = []

    def decode(*args: object, **options: object) -> np.ndarray:
        image = decode_photo(*args, **options)  # type: ignore[arg-type]
        decoded.append(image.shape[:2])
        return image

    monkeypatch.setattr(views, "decode_photo", decode)
    view = ContrastiveView(ViewSettings(size=size, crop_scale=SCALE))
    row = view.row(sample, None, np.random.default_rng(seed))

    random = np.random.default_rng(seed)
    boxes = [random_box(HEIGHT, WIDTH, SCALE, random) for _ in range(2)]
    whole = decode_photo(sample.image_bytes)
    for name, box in zip(("query_crop", "key_crop"), boxes, strict=True):
        crop = np.frombuffer(row[name], np.uint8).reshape(size, size, 3).astype(float)
        # A pixel at the edge of a reduced photo is of eight at the most, of which the crop may have one.
        assert np.abs(crop - cut(whole, box, size)).max() <= 255 * 8 / HEIGHT + 2
        assert np.abs(crop - cut(whole, box, size)).mean() <= 1.5
    (shape,) = decoded
    reduction = shape[0] / HEIGHT
    narrowest = min(side for box in boxes for side in box[2:])
    assert narrowest * reduction >= min(size, narrowest) - 1
    assert reduction <= 0.5 or size > 32, "a small crop of a large photo costs no full decoding"


def test_a_scaled_box_is_every_pixel_that_it_touches() -> None:
    # Pixels 3..6 of 10 are 1.5..3.5 of 5: columns 1, 2 and 3; rows 0..3 of 8 are 0..2 of 4.
    assert scaled_box((3, 0, 4, 4), size=(8, 10), scaled_size=(4, 5)) == (1, 0, 3, 2)
    assert scaled_box((3, 0, 4, 4), size=(8, 10), scaled_size=(8, 10)) == (3, 0, 4, 4)
    assert scaled_box((9, 7, 1, 1), size=(8, 10), scaled_size=(1, 1)) == (0, 0, 1, 1), "never empty"


def test_scaled_boxes_stay_inside() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width, rows, columns = random.integers(1, 50, 4).tolist()
        rows, columns = min(rows, height), min(columns, width)
        box = random_box(height, width, SCALE, random)
        left, top, across, down = scaled_box(box, size=(height, width), scaled_size=(rows, columns))
        assert 0 <= left < left + across <= columns
        assert 0 <= top < top + down <= rows


@pytest.mark.parametrize("size", [(48, 64), (30, 41), (97, 128), (5, 6), (1, 1)])
def test_masks_are_resized_as_photos_are(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    height, width = size
    wrong = 0
    for _ in range(60):
        mask = np.zeros((48, 64), bool)
        top, left = random.integers(0, (48, 64))
        down, across = random.integers(1, (48, 64))
        mask[top : top + down, left : left + across] = (
            random.random((48, 64))[top : top + down, left : left + across] > 0.3
        )
        soft = Image.fromarray(mask.view(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
        # What is covered to a half, give or take the last bit, may fall to either side.
        wrong += int(
            (whole(mask, height, width) != (np.asarray(soft) > 127))[np.abs(np.asarray(soft) - 127.5) > 2].sum()
        )
    assert wrong == 0


def test_no_mask_and_the_smallest_ones() -> None:
    assert resized_mask(np.zeros((4, 6), bool), 8, 12) is None
    dot = np.zeros((4, 6), bool)
    dot[3, 5] = True
    assert whole(dot, 4, 6).tolist() == dot.tolist()
    assert whole(dot, 8, 12).sum() == 4, "one of its pixels is four of half the size"
    assert resized_mask(dot, 2, 3) is None, "a quarter of a pixel is none"
    assert whole(np.ones((4, 6), bool), 7, 5).all()


def test_a_mirrored_part_lies_where_the_mirrored_mask_has_it() -> None:
    mask = np.zeros((9, 14), bool)
    mask[2:5, 1:4] = True
    mask[4, 6] = True
    part = resized_mask(mask, 9, 14)
    assert part is not None

    np.testing.assert_array_equal(placed(part.flipped(14), 9, 14), mask[:, ::-1])
    assert part.flipped(14).flipped(14).box_xyxy == part.box_xyxy


def whole(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A resized mask, not its part alone."""
    part = resized_mask(mask, height, width)
    return np.zeros((height, width), bool) if part is None else placed(part, height, width)


def placed(part: MaskPart, height: int, width: int) -> np.ndarray:
    """A part in its place."""
    mask = np.zeros((height, width), bool)
    left, top, right, bottom = part.box_xyxy
    mask[top:bottom, left:right] = part.pixels
    return mask
