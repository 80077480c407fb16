"""Masks over photos, contact sheets, and outlines that a browser can draw."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from freesolo.report.outline import outline_path
from freesolo.report.pictures import (
    CUT_OUT_MIN,
    INK,
    PAPER,
    contact_sheet,
    cut_out,
    draw_masks,
    draw_point,
    draw_similarity,
    encode_jpeg,
    encode_png,
    encode_webp,
    instance_colours,
    shrink,
    shrink_mask,
)

PATH_COMMAND = re.compile(r"([Mhvz])(-?\d+)?(?: (-?\d+))?")


def gray_photo(height: int = 12, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def square(height: int, width: int, top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def polygons_of(path: str) -> list[list[tuple[int, int]]]:
    """Corners (x, y) of each polygon of path data made of M, h, v and z."""
    polygons: list[list[tuple[int, int]]] = []
    for command, first, second in PATH_COMMAND.findall(path):
        if command == "M":
            polygons.append([(int(first), int(second))])
        elif command in "hv":
            x, y = polygons[-1][-1]
            polygons[-1].append((x + int(first), y) if command == "h" else (x, y + int(first)))
    return polygons


def filled(path: str, height: int, width: int) -> np.ndarray:
    """The even-odd fill, pixel by pixel: a pixel is inside if a ray from its middle to the left crosses oddly often."""
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons_of(path):
        for (x, y), (next_x, next_y) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
            assert x == next_x or y == next_y, "every edge runs along pixels"
            if x == next_x:
                for row in range(min(y, next_y), max(y, next_y)):
                    mask[row, x:] ^= True
    return mask


# --- outlines -------------------------------------------------------------------------------------------------------


def test_the_outline_of_one_pixel_is_its_square() -> None:
    assert outline_path(square(3, 5, 1, 3, 1)) == "M3 1h1v1h-1z"


def test_an_empty_mask_has_no_outline() -> None:
    assert outline_path(np.zeros((4, 4), dtype=bool)) == ""
    assert outline_path(np.zeros((0, 4), dtype=bool)) == ""


def test_a_hole_is_a_polygon_of_its_own() -> None:
    ring = square(5, 5, 0, 0, 5) ^ square(5, 5, 2, 2, 1)
    assert outline_path(ring) == "M0 0h5v5h-5zM2 2h1v1h-1z"


@settings(max_examples=300)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_filling_the_outline_gives_the_mask_back(mask: np.ndarray) -> None:
    assert np.array_equal(filled(outline_path(mask), *mask.shape), mask)


@pytest.mark.parametrize("corner", [(0, 0), (0, 1)])
def test_pixels_that_touch_across_a_diagonal(corner: tuple[int, int]) -> None:
    checkered = np.indices((4, 4)).sum(axis=0) % 2 == corner[1]
    assert np.array_equal(filled(outline_path(checkered), 4, 4), checkered)


# --- overlays -------------------------------------------------------------------------------------------------------


def test_a_mask_is_tinted_inside_and_outlined_at_its_border() -> None:
    mask = square(12, 16, 2, 3, 5)
    drawn = draw_masks(gray_photo(), mask[None], opacity=0.5)
    colour = instance_colours(1)[0]
    assert np.array_equal(drawn[2, 3], colour)  # border
    assert np.array_equal(drawn[6, 7], colour)
    inside = np.round(0.5 * 100 + 0.5 * colour.astype(np.float64))  # half photo, half colour
    assert np.array_equal(drawn[4, 5], inside)
    assert np.array_equal(drawn[~mask], gray_photo()[~mask])


def test_a_mask_at_the_edge_of_the_picture_is_outlined_there() -> None:
    drawn = draw_masks(gray_photo(), np.ones((1, 12, 16), dtype=bool))
    assert np.array_equal(drawn[0, 5], instance_colours(1)[0])


def test_no_masks_leave_a_copy_of_the_photo() -> None:
    photo = gray_photo()
    drawn = draw_masks(photo, np.zeros((0, 12, 16), dtype=bool), np.zeros(0))
    assert np.array_equal(drawn, photo)
    assert not np.shares_memory(drawn, photo)


def test_one_pixel_is_seen() -> None:
    drawn = draw_masks(gray_photo(), square(12, 16, 4, 9, 1)[None], opacity=0.0)
    assert np.array_equal(drawn[4, 9], instance_colours(1)[0])
    assert (drawn != 100).any(axis=2).sum() == 1


def test_a_small_mask_lies_over_a_large_one_whatever_their_order() -> None:
    small, large = square(12, 16, 4, 4, 3), square(12, 16, 1, 1, 10)
    for masks, small_at in ((np.stack([small, large]), 0), (np.stack([large, small]), 1)):
        drawn = draw_masks(gray_photo(), masks)
        assert np.array_equal(drawn[4, 4], instance_colours(2)[small_at])


def test_scores_are_written_in_the_picture_even_at_its_corner() -> None:
    photo = gray_photo(60, 80)
    masks = np.stack([square(60, 80, 59, 79, 1), np.zeros((60, 80), dtype=bool)])
    plain = draw_masks(photo, masks)
    scored = draw_masks(photo, masks, np.array([0.87, 0.5]))
    assert scored.shape == photo.shape
    changed = (scored != plain).any(axis=2)
    assert 30 < changed.sum() < 600  # one chip; the empty mask has none
    assert changed[40:, 50:].sum() == changed.sum()  # in the corner where its mask is


def test_instance_colours_are_distinct_and_stable() -> None:
    colours = instance_colours(20)
    assert instance_colours(0).shape == (0, 3)
    assert np.array_equal(instance_colours(5), colours[:5])
    apart = np.abs(colours[:, None].astype(int) - colours[None].astype(int)).sum(axis=2)
    assert apart[~np.eye(20, dtype=bool)].min() > 30


# --- contact sheets -------------------------------------------------------------------------------------------------


def test_a_contact_sheet_places_pictures_in_rows() -> None:
    red, blue = np.zeros((10, 20, 3), np.uint8), np.zeros((20, 10, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = contact_sheet([red, blue, red], columns=2, cell=40, gap=4)
    assert sheet.shape == (2 * 44 + 4, 2 * 44 + 4, 3)
    assert sheet[34, 24].tolist() == [255, 0, 0]  # the first cell's lower half: a wide picture stands at its foot
    assert sheet[22, 24].tolist() == sheet[0, 0].tolist()
    assert sheet[24, 68].tolist() == [0, 0, 255]
    blue_columns = np.flatnonzero((sheet[24] == [0, 0, 255]).all(axis=1))
    assert (blue_columns.min(), blue_columns.max()) == (58, 77)  # 20 wide in the middle of 48 to 87
    assert sheet[78, 24].tolist() == [255, 0, 0]
    assert sheet[68, 68].tolist() == sheet[0, 0].tolist()  # nothing in the fourth


def test_a_contact_sheet_of_nothing_is_an_empty_cell() -> None:
    sheet = contact_sheet([], cell=40, gap=4)
    assert sheet.shape == (48, 48, 3)
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) == 1


def test_captions_stand_below_and_are_cut_to_fit() -> None:
    pictures = [gray_photo(), gray_photo()]
    sheet = contact_sheet(pictures, ["short", "a long name " * 20], columns=2, cell=64, gap=4)
    assert sheet.shape[0] > 64 + 8
    paper = sheet[0, 0]
    assert (sheet[68:, 4:68] != paper).any()  # text under the first
    assert (sheet[:, 136:] == paper).all()  # and none in the right margin


def test_captions_must_be_as_many_as_pictures() -> None:
    with pytest.raises(ValueError, match="1 pictures but 2 captions"):
        contact_sheet([gray_photo()], ["a", "b"])


# --- sizes and files ------------------------------------------------------------------------------------------------


def test_a_large_photo_is_shrunk_and_a_small_one_kept() -> None:
    assert shrink(gray_photo(100, 200), 50).shape == (25, 50, 3)
    assert shrink(gray_photo(200, 1), 50).shape == (50, 1, 3)
    assert shrink(gray_photo(1, 200), 50).shape == (1, 50, 3)
    assert np.array_equal(shrink(gray_photo(), 50), gray_photo())


def test_a_shrunk_mask_keeps_pixels_that_are_half_covered() -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[:2, :2] = True  # all of the first pixel of the small mask
    mask[0, 2:4] = True  # half of the second
    mask[2, 4] = True  # a quarter of one in the second row
    assert shrink_mask(mask, 4).tolist() == [[True, True, False, False], [False, False, False, False]]
    assert np.array_equal(shrink_mask(mask, 8), mask)


def test_a_mask_too_thin_to_shrink_keeps_a_pixel() -> None:
    shrunk = shrink_mask(square(40, 80, 21, 60, 1), 8)  # by ten: row 2, column 6
    assert np.argwhere(shrunk).tolist() == [[2, 6]]
    assert not shrink_mask(np.zeros((40, 80), dtype=bool), 8).any()


def test_pictures_are_written_as_files() -> None:
    picture = draw_masks(gray_photo(), square(12, 16, 2, 3, 5)[None])
    with Image.open(io.BytesIO(encode_png(picture))) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), picture)
    with Image.open(io.BytesIO(encode_jpeg(picture))) as image:
        assert (image.format, image.size) == ("JPEG", (16, 12))


# --- cut-outs -------------------------------------------------------------------------------------------------------


def red_square(height: int, width: int, top: int, left: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A red square on blue, and its mask."""
    mask = square(height, width, top, left, side)
    photo = np.full((height, width, 3), (0, 0, 200), np.uint8)
    photo[mask] = (200, 0, 0)
    return photo, mask


def test_an_object_is_cut_out_in_colour_with_what_is_around_it_grey() -> None:
    # The square of 30 px is shown in one of 40: 5 px around it, which 4 times as large are 20 of 160.
    picture = cut_out(*red_square(100, 120, 20, 50, 30), 160)
    assert picture.shape == (160, 160, 3)
    assert picture[80, 80].tolist() == [200, 0, 0]
    grey = 0.6 * np.array(PAPER) + 0.4 * round(0.114 * 200)  # the brightness of that blue
    np.testing.assert_allclose(picture[4, 80], grey, atol=1.5)
    np.testing.assert_allclose(picture[80, 156], grey, atol=1.5)
    rows = np.flatnonzero((picture[:, 80] == INK).all(axis=1))
    assert (rows.min(), rows.max()) == (20, 139)  # the border's first and last row
    assert len(rows) == 4  # two px thick


def test_a_cut_out_ends_where_the_photo_does() -> None:
    # 40 px around a square in the corner: moved inside. Of a photo 20 px high all of the height.
    assert cut_out(*red_square(100, 120, 0, 90, 30), 80).shape == (80, 80, 3)
    corner = cut_out(*red_square(100, 120, 0, 90, 30), 80)
    assert corner[2:58, 22:78, 0].min() > 50  # the square is at the top right, ink or red
    assert cut_out(*red_square(20, 200, 0, 0, 18), 96).shape == (80, 96, 3)  # 20 of 24 px
    assert cut_out(np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), bool), 96).shape == (96, 96, 3)


def test_a_speck_is_shown_with_something_around_it_and_nothing_as_nothing() -> None:
    speck = cut_out(*red_square(50, 50, 20, 20, 1), 10 * CUT_OUT_MIN)
    # 10 px of the picture are one of the photo; the window's middle is the speck's left top corner, or near it.
    reddish = speck[:, :, 0].astype(int) - speck[:, :, 2] > 50
    assert 16 <= reddish.sum() <= 200
    photo = np.full((20, 40, 3), (0, 90, 0), np.uint8)
    empty = cut_out(photo, np.zeros((20, 40), bool), 20)
    assert empty.shape == (10, 20, 3)
    assert np.ptp(empty.reshape(-1, 3), axis=0).tolist() == [0, 0, 0]


def test_a_line_too_thin_for_the_picture_is_seen_all_the_same() -> None:
    mask = np.zeros((400, 400), bool)
    mask[200, :] = True
    photo = np.full((400, 400, 3), (0, 0, 200), np.uint8)
    photo[mask] = (250, 0, 0)
    thin = cut_out(photo, mask, 40)
    faint = cut_out(photo, np.zeros_like(mask), 40)
    assert np.abs(thin.astype(int) - faint).max() > 60


def test_a_small_picture_is_a_small_webp() -> None:
    picture = cut_out(*red_square(100, 120, 20, 50, 30), 128)
    with Image.open(io.BytesIO(encode_webp(picture))) as image:
        assert (image.format, image.size) == ("WEBP", (128, 128))
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - picture).mean() < 5
    assert len(encode_webp(picture)) < len(encode_jpeg(picture))


# --- maps of similarity -------------------------------------------------------------------------------------------


def test_a_map_is_brightest_where_it_is_greatest_whatever_its_scale():
    similarity = np.array([[0.125, 0.25], [0.375, 1.0]], dtype=np.float32)  # exact, and so is half of each
    drawn = draw_similarity(gray_photo(8, 8), similarity)
    brightness = drawn.sum(axis=2)
    assert drawn.shape == (8, 8, 3)
    assert np.unravel_index(brightness.argmax(), brightness.shape)[0] >= 4
    assert brightness[7, 7] > brightness[7, 0] > brightness[0, 7] > brightness[0, 0]
    assert np.array_equal(drawn, draw_similarity(gray_photo(8, 8), similarity * 0.5 + 0.25))


def test_a_flat_map_and_a_map_of_one_cell_are_dark():
    flat = draw_similarity(gray_photo(), np.full((3, 4), 0.7, dtype=np.float32))
    assert np.array_equal(flat, draw_similarity(gray_photo(), np.ones((1, 1), dtype=np.float32)))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1
    assert flat.mean() < 100


def test_a_point_is_drawn_where_it_is_on_a_copy():
    photo = gray_photo(100, 200)
    drawn = draw_point(photo, (0.25, 0.5))
    assert (photo == 100).all()
    rows, columns = np.nonzero((drawn != photo).any(axis=2))
    assert rows.mean() == pytest.approx(50, abs=0.5)
    assert columns.mean() == pytest.approx(50, abs=0.5)
    assert np.ptp(rows) < 10
