"""Drawn masks with answers worked out by hand; the empty stack and the empty mask everywhere."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from pycocotools import mask as coco_mask
from torch.nn import functional

from freesolo.ops.mask_storage import check_rle_counts, pack_masks, rle_from_coco, unpack_masks
from freesolo.ops.masks import (
    Projections,
    areas,
    boxes_xywh,
    boxes_xyxy,
    decode_rle,
    encode_rle,
    mask_iou,
    resize_masks_soft,
)

NONE = torch.zeros(0, 4, 5, dtype=torch.bool)


def draw(*pictures: str) -> torch.Tensor:
    """Masks from pictures: rows separated by `/`, `#` inside."""
    return torch.tensor([[[cell == "#" for cell in row] for row in picture.split("/")] for picture in pictures])


ONE_PIXEL = "...../...../...#./....."
CORNER = "##.../#..../...../....."
EMPTY = "...../...../...../....."
FULL = "#####/#####/#####/#####"
APART = "#..../...../...../....#"


def random_masks(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) > 0.6


def test_boxes_have_exclusive_right_and_bottom_edges():
    masks = draw(ONE_PIXEL, CORNER, EMPTY, FULL, APART)
    expected = [[3, 2, 4, 3], [0, 0, 2, 2], [0, 0, 0, 0], [0, 0, 5, 4], [0, 0, 5, 4]]
    assert boxes_xyxy(masks).tolist() == expected
    assert boxes_xyxy(masks).dtype == torch.float32


def test_stored_boxes_have_width_and_height():
    masks = draw(ONE_PIXEL, CORNER, EMPTY, FULL)
    assert boxes_xywh(masks).tolist() == [[3, 2, 1, 1], [0, 0, 2, 2], [0, 0, 0, 0], [0, 0, 5, 4]]


def test_stored_boxes_agree_with_pycocotools():
    masks = random_masks(5, 9, 7) & (torch.rand(5, 9, 7, generator=torch.Generator().manual_seed(1)) > 0.7)
    assert boxes_xywh(masks).tolist() == coco_mask.toBbox(encode_rle(masks)).tolist()


def test_one_mask_of_whatever_stride_along_its_only_axis():
    # As pycocotools decodes it, for one; of a width that is whole words.
    decoded = decode_rle(encode_rle(torch.ones(1, 3, 8, dtype=torch.bool)), 3, 8)
    for stride in (1, 4, 24):
        mask = decoded.as_strided((1, 3, 8), (stride, 8, 1))
        assert boxes_xyxy(mask).tolist() == [[0, 0, 8, 3]]
        assert areas(mask).tolist() == [24]


def test_areas_count_pixels():
    assert areas(draw(ONE_PIXEL, CORNER, EMPTY, FULL)).tolist() == [1, 3, 0, 20]


def test_centre_of_mass_is_in_pixel_edges_y_then_x():
    # CORNER has pixels (0,0), (0,1), (1,0): centres y 0.5, 0.5, 1.5 and x 0.5, 1.5, 0.5, so 2.5 / 3 for both.
    masks = draw(ONE_PIXEL, CORNER, EMPTY, FULL, APART)
    expected = torch.tensor([[2.5, 3.5], [2.5 / 3, 2.5 / 3], [0.0, 0.0], [2.0, 2.5], [2.0, 2.5]])
    torch.testing.assert_close(Projections.of(masks).centres_of_mass(), expected)


def test_centre_of_mass_of_a_large_mask():
    # Positions of 2003 x 1999 pixels sum to some 4e9, beyond int32 and beyond float32's whole numbers.
    masks = torch.ones(1, 2003, 1999, dtype=torch.bool)
    assert Projections.of(masks).centres_of_mass().tolist() == [[1001.5, 999.5]]


@pytest.mark.parametrize("extent", [(1, 1), (3, 8), (5, 13), (300, 24), (2, 2041), (260, 2100)])
@pytest.mark.parametrize("layout", ["whole", "a slice", "transposed", "at an odd address"])
def test_projections_are_counts(extent: tuple[int, int], layout: str):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, *extent, generator=generator) < torch.tensor([0.5, 0.0, 1.1])[:, None, None]
    if layout == "a slice":
        masks = functional.pad(masks, (3, 2, 1, 0))[:, 1:, 3:-2]
    elif layout == "transposed":
        masks = masks.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "at an odd address":
        masks = functional.pad(masks.flatten(), (3, 0))[3:].view(masks.shape)
    projections = Projections.of(masks)
    assert projections.rows.tolist() == masks.long().sum(dim=2).tolist()
    assert projections.columns.tolist() == masks.long().sum(dim=1).tolist()
    assert projections.areas().tolist() == areas(masks).tolist() == masks.long().sum(dim=(1, 2)).tolist()


def test_mask_iou_of_every_pair():
    first = draw(CORNER, EMPTY)
    second = draw(CORNER, FULL, APART, EMPTY)
    # CORNER (3 px) and FULL (20): 3 / 20. CORNER and APART (2) share (0,0): 1 / (3 + 2 - 1).
    expected = [[1.0, 3 / 20, 1 / 4, 0.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(mask_iou(first, second), torch.tensor(expected))


def test_mask_iou_is_exact_under_autocast():
    masks = torch.zeros(2, 31, 31, dtype=torch.bool)
    masks[0, :30], masks[1, 1:] = True, True  # 930 px each, 899 in common: a count that bfloat16 does not have
    with torch.autocast("cpu", dtype=torch.bfloat16):
        iou = mask_iou(masks, masks)
    assert iou.dtype == torch.float32
    torch.testing.assert_close(iou[0, 1].item(), 899 / 961)


def test_resize_of_soft_masks_interpolates_between_pixel_centres():
    # Two pixels to four: the new centres lie at old positions -0.25, 0.25, 0.75, 1.25, clamped to the outer centres.
    resized = resize_masks_soft(torch.tensor([[[0.0, 1.0]]]), 1, 4)
    assert resized.tolist() == [[[0.0, 0.25, 0.75, 1.0]]]
    assert resize_masks_soft(torch.zeros(0, 3, 4), 6, 8).shape == (0, 6, 8)


def test_no_masks_have_no_anything():
    assert boxes_xyxy(NONE).shape == (0, 4)
    assert boxes_xywh(NONE).shape == (0, 4)
    assert areas(NONE).shape == (0,)
    assert Projections.of(NONE).centres_of_mass().shape == (0, 2)
    assert mask_iou(NONE, draw(FULL)).shape == (0, 1)
    assert encode_rle(NONE) == []
    assert decode_rle([], 4, 5).shape == (0, 4, 5)
    assert pack_masks([]) == b""
    assert list(unpack_masks(np.zeros(0, np.uint8), [])) == []


def test_run_lengths_go_down_columns():
    # ONE_PIXEL, column by column: 3 columns of 4 and 2 rows outside (14), 1 inside, 5 outside.
    (rle,) = encode_rle(draw(ONE_PIXEL))
    expected = coco_mask.frPyObjects({"size": [4, 5], "counts": [14, 1, 5]}, 4, 5)
    assert rle == {"size": [4, 5], "counts": expected["counts"].decode()}


def test_run_lengths_equal_one_call_of_pycocotools_a_mask():
    masks = torch.cat((random_masks(3, 6, 11), torch.zeros(1, 6, 11, dtype=torch.bool)))
    for rle, mask in zip(encode_rle(masks), masks, strict=True):
        assert rle["counts"].encode() == coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"]


def test_run_lengths_survive_json():
    masks = torch.cat((random_masks(4, 13, 6), draw(FULL).new_zeros(1, 13, 6), draw(FULL).new_ones(1, 13, 6)))
    decoded = decode_rle(json.loads(json.dumps(encode_rle(masks))), 13, 6)
    assert decoded.is_contiguous()
    assert torch.equal(decoded, masks)


def test_run_lengths_of_bytes_decode_too():
    rles = [{**rle, "counts": rle["counts"].encode()} for rle in encode_rle(draw(CORNER))]
    assert torch.equal(decode_rle(rles, 4, 5), draw(CORNER))


def test_run_lengths_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 5\].*\[5, 4\]"):
        decode_rle(encode_rle(draw(CORNER)), 5, 4)


def test_coco_segmentations_of_each_form():
    # Corners (1,1) to (4,3): columns 1..3, rows 1..2.
    drawn = draw("...../.###./.###./.....")
    polygon = [[1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]]
    uncompressed = {"size": [4, 5], "counts": [5, 2, 2, 2, 2, 2, 5]}
    (compressed,) = encode_rle(drawn)
    as_bytes = {**compressed, "counts": compressed["counts"].encode()}
    for segmentation in (polygon, uncompressed, compressed, as_bytes):
        assert rle_from_coco(segmentation, 4, 5) == compressed


def test_coco_segmentation_of_two_polygons_is_their_union():
    polygons = [[0.0, 0.0, 1.0, 0.0, 1.0, 4.0, 0.0, 4.0], [4.0, 0.0, 5.0, 0.0, 5.0, 4.0, 4.0, 4.0]]
    decoded = decode_rle([rle_from_coco(polygons, 4, 5)], 4, 5)
    assert torch.equal(decoded, draw("#...#/#...#/#...#/#...#"))


def test_coco_segmentations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="without polygons"):
        rle_from_coco([], 4, 5)
    with pytest.raises(ValueError, match="size"):
        rle_from_coco({"size": [5, 4], "counts": [20]}, 4, 5)


def test_packed_masks_unpack_to_themselves_each_of_its_own_size():
    sizes = [(1, 1), (2, 4), (3, 5), (7, 9), (1, 1)]
    masks = [random_masks(1, *size)[0].numpy() for size in sizes]

    packed = pack_masks(masks)

    assert len(packed) == 1 + 1 + 2 + 8 + 1
    for unpacked, mask in zip(unpack_masks(np.frombuffer(packed, np.uint8), sizes), masks, strict=True):
        assert np.array_equal(unpacked, mask)


def test_packed_masks_put_the_first_pixel_in_the_highest_bit():
    # CORNER row by row: 11000 10000 00000 00000 -> 1100 0100 | 0000 0000 | 0000 (0000)
    assert list(pack_masks([draw(CORNER)[0].numpy()])) == [0b11000100, 0, 0]


def test_bytes_of_another_extent_are_refused():
    packed = np.frombuffer(pack_masks([draw(CORNER)[0].numpy()]), np.uint8)
    for sizes in ([(5, 5)], [(4, 5), (1, 1)], []):
        with pytest.raises(ValueError, match="3 bytes cannot be masks of"):
            next(unpack_masks(packed, sizes))


# What made pycocotools 2.0.11 crash, hang or read memory that is not its own, and some more of its kind.
@pytest.mark.parametrize(
    ("counts", "complaint"),
    [
        ("", "is empty"),
        ("oooo", "breaks off in the midst of a run"),  # read past its end
        ("1", "does not add up"),  # decoded to whatever lay in memory
        ("4" * 3, "does not add up"),
        ("0`o0", "does not add up"),  # merging it did not end
        ("0" + "o" * 12 + "0", "has a run that is too long"),
        ("0040", "has a run of no pixels"),
        ("0/4", "has a character that is none of COCO's"),
        ("0\x7f4", "has a character that is none of COCO's"),
        ("é", "is not text of COCO's alphabet"),
        (b"\xff4", "has a character that is none of COCO's"),
        (5, "is not text of COCO's alphabet"),
        (None, "is not text of COCO's alphabet"),
    ],
)
def test_damaged_run_lengths_do_not_reach_c(counts, complaint):
    rle = {"size": [2, 2], "counts": counts}
    with pytest.raises(ValueError, match=complaint):
        decode_rle([rle], 2, 2)
    with pytest.raises(ValueError, match=complaint):
        rle_from_coco(rle, 2, 2)


def test_the_damaged_mask_is_named():
    good = encode_rle(random_masks(2, 9, 7))
    with pytest.raises(ValueError, match="run-length encoding 1 is empty"):
        decode_rle([good[0], {"size": [9, 7], "counts": ""}, good[1]], 9, 7)


def runs_by_the_letter(text: bytes) -> list[int] | None:
    """Runs of COCO's compressed form, character by character as C reads it; None for what it may not be."""
    runs: list[int] = []
    at = 0
    while at < len(text):
        number, width, more = 0, 0, True
        while more:
            if at == len(text) or not 48 <= text[at] < 112 or width == 6:
                return None
            value = text[at] - 48
            number |= (value & 31) << 5 * width
            more = bool(value & 32)
            at, width = at + 1, width + 1
            if not more and value & 16:
                number -= 1 << 5 * width
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
    return runs if runs and min(runs) >= 0 and 0 not in runs[1:] else None


ALPHABET = strategies.integers(48, 111) | strategies.integers(48, 52) | strategies.integers(0, 255)


@given(strategies.lists(strategies.lists(ALPHABET, max_size=8).map(bytes), max_size=4), strategies.integers(0, 30))
@settings(max_examples=500)
def test_run_lengths_are_judged_as_letter_by_letter(texts, pixels):
    judged = [runs_by_the_letter(text) for text in texts]
    if all(runs is not None and sum(runs) == pixels for runs in judged):
        check_rle_counts(texts, [pixels] * len(texts))
    else:
        with pytest.raises(ValueError, match="run-length encoding"):
            check_rle_counts(texts, [pixels] * len(texts))


@given(strategies.integers(1, 40), strategies.integers(1, 40), strategies.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_every_mask_is_taken(height, width, seed):
    drawn = np.random.default_rng(seed)
    masks = torch.from_numpy(drawn.random((3, height, width)) < drawn.random())
    assert torch.equal(decode_rle(encode_rle(masks), height, width), masks)
    for mask in masks:
        flat = mask.T.flatten().tolist()
        runs, inside = [0], False
        for pixel in flat:
            if pixel != inside:
                runs, inside = [*runs, 0], pixel
            runs[-1] += 1
        # Tools that write a mask tile by tile leave empty runs within.
        spread = [part for run in runs for part in (run - 1, 0, 1)] if min(runs[1:], default=1) > 0 < runs[0] else runs
        rle = rle_from_coco({"size": [height, width], "counts": spread}, height, width)
        assert torch.equal(decode_rle([rle], height, width)[0], mask)


@pytest.mark.parametrize("counts", [[-5, 9], [2**40], [1.5, 2.5], [True, 3], ["4"], [3], [5], [], [10**400], [None]])
def test_uncompressed_runs_are_whole_numbers_that_add_up(counts):
    with pytest.raises(ValueError, match="counts that are not whole numbers from 0 that add up to 4 pixels"):
        rle_from_coco({"size": [2, 2], "counts": counts}, 2, 2)


@pytest.mark.parametrize(
    ("polygon", "complaint"),
    [
        ([0, 0, 1e9, 0, 1e9, 1e9], "no number within 1e\\+06 px"),  # a segmentation fault
        ([0, 0, float("nan"), 0, 1, 1], "no number within"),
        ([0, 0, float("inf"), 0, 1, 1], "no number within"),
        ([0, 0, 10**400, 0, 1, 1], "no number within"),
        ([0, 0, "1", 0, 1, 1], "no number within"),
        ([0, 0, 1, 1], "three points or more"),
        ([0, 0, 1, 1, 2, 2, 3], "list of x, y, x, y"),
        ("abcdef", "list of x, y, x, y"),
        ([0, 0, 9e5, 9e5] * 3, "an outline of"),  # gigabytes
    ],
)
def test_polygons_that_c_cannot_stand_do_not_reach_it(polygon, complaint):
    with pytest.raises(ValueError, match=complaint):
        rle_from_coco([polygon], 4, 4)


@pytest.mark.parametrize(
    "segmentation", ["abc", 5, {}, {"size": [4, 4]}, {"size": "44", "counts": "0"}, {"counts": "0"}]
)
def test_what_is_no_segmentation_is_refused(segmentation):
    with pytest.raises(ValueError, match=r"neither polygons nor|a mask of size"):
        rle_from_coco(segmentation, 4, 4)
