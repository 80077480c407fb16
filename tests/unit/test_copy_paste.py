"""Copy-paste with drawn masks: what lands where, what is cut, what is refused, what travels along."""

from __future__ import annotations

import pytest
import torch

from freesolo.data.copy_paste import copy_paste
from freesolo.ops.masks import boxes_xyxy
from freesolo.types import ImageBatch, Instances, SegmentationBatch


def drawn(*rows: str) -> torch.Tensor:
    """A mask from a drawing: `#` is inside."""
    return torch.tensor([[character == "#" for character in row] for row in rows])


def batch_of(
    images: list[torch.Tensor], instances: list[tuple[int, torch.Tensor]], sizes: list[tuple[int, int]] | None = None
) -> SegmentationBatch:
    """Images of one extent; instances `(image, mask)` of category 10, 11, ..., score 0.9, 0.8, ..."""
    pixels = torch.stack(images)
    height, width = pixels.shape[-2:]
    count = len(instances)
    return SegmentationBatch(
        ImageBatch(pixels, torch.tensor(sizes or [(height, width)] * len(images)), tuple(range(len(images)))),
        Instances(
            image_index=torch.tensor([image for image, _ in instances], dtype=torch.int64),
            masks=torch.stack([mask for _, mask in instances]) if count else torch.zeros(0, height, width).bool(),
            category_ids=torch.arange(count) + 10,
            scores=0.9 - 0.1 * torch.arange(count),
            embeddings=torch.eye(count, 4),
        ),
    )


def flat(value: int, height: int = 4, width: int = 4) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def choosing(*wanted: bool) -> torch.Generator:
    """A generator whose first draws choose just these instances."""
    for seed in range(10_000):
        if (
            (torch.rand(len(wanted), generator=torch.Generator().manual_seed(seed)) < 0.5) == torch.tensor(wanted)
        ).all():
            return torch.Generator().manual_seed(seed)
    raise AssertionError("no seed found")


CORNER = drawn("##..", "##..", "....", "....")
COLUMN = drawn("...#", "...#", "...#", "...#")


def test_an_instance_lands_on_the_other_image():
    batch = batch_of([flat(50), flat(200)], [(0, COLUMN), (1, CORNER)])
    result = copy_paste(batch, choosing(False, True))
    assert torch.equal(result.images.pixels[0, 0], torch.where(CORNER, 200, 50))
    assert torch.equal(result.images.pixels[1], flat(200))
    assert result.instances.image_index.tolist() == [0, 0, 1]
    assert result.instances.category_ids.tolist() == [10, 11, 11]
    assert result.instances.scores.tolist() == pytest.approx([0.9, 0.8, 0.8])
    assert torch.equal(result.instances.embeddings, torch.eye(2, 4)[[0, 1, 1]])
    assert torch.equal(result.instances.masks, torch.stack([COLUMN, CORNER, CORNER]))


def test_the_input_is_not_changed():
    batch = batch_of([flat(50), flat(200)], [(0, COLUMN), (1, CORNER)])
    copy_paste(batch, choosing(True, True))
    assert torch.equal(batch.images.pixels, torch.stack([flat(50), flat(200)]))
    assert torch.equal(batch.instances.masks, torch.stack([COLUMN, CORNER]))


def test_both_ways_use_the_images_as_they_were():
    batch = batch_of([flat(50), flat(200)], [(0, COLUMN), (1, CORNER)])
    result = copy_paste(batch, choosing(True, True))
    assert torch.equal(result.images.pixels[0, 0], torch.where(CORNER, 200, 50))
    assert torch.equal(result.images.pixels[1, 0], torch.where(COLUMN, 50, 200))
    assert result.instances.image_index.tolist() == [0, 0, 1, 1]
    assert result.instances.category_ids.tolist() == [10, 11, 11, 10]


def test_what_was_pasted_over_is_pasted_as_it_was():
    # Each covers one pixel, (0, 0), of the other: a quarter of the row, a third of the column.
    row, column = drawn("####", "....", "....", "...."), drawn("#...", "#...", "#...", "....")
    result = copy_paste(batch_of([flat(50), flat(200)], [(0, row), (1, column)]), choosing(True, True))
    assert torch.equal(result.images.pixels[0, 0], torch.where(column, 200, 50))
    assert torch.equal(result.images.pixels[1, 0], torch.where(row, 50, 200))


def test_what_is_below_is_cut_and_its_box_follows():
    below = drawn("####", "....", "....", "....")
    above = drawn("...#", "...#", "...#", "...#")  # covers a quarter of it
    result = copy_paste(batch_of([flat(0), flat(9)], [(0, below), (1, above)]), choosing(False, True))
    assert torch.equal(result.instances.masks[0], drawn("###.", "....", "....", "...."))
    assert boxes_xyxy(result.instances.masks)[0].tolist() == [0, 0, 3, 1]
    assert torch.equal(result.instances.masks[1], above)


@pytest.mark.parametrize(
    ("pasted", "accepted"),
    [
        (drawn("#...", "....", "....", "####"), True),  # 1 of 4
        (drawn("##..", "....", "....", "...."), False),  # 2 of 4: a half
        (drawn("###.", "....", "....", "...."), False),
    ],
)
def test_one_that_would_cover_half_is_not_pasted(pasted, accepted):
    below = drawn("####", "....", "....", "....")
    result = copy_paste(batch_of([flat(0), flat(9)], [(0, below), (1, pasted)]), choosing(False, True))
    assert (len(result.instances) == 3) == accepted
    assert (result.images.pixels[0].sum() > 0) == accepted
    if not accepted:
        assert torch.equal(result.instances.masks[0], below)


def test_one_refused_does_not_keep_the_others_away():
    large, small = drawn("####", "####", "####", "####"), drawn("....", "....", "....", "#...")
    batch = batch_of([flat(0), flat(9)], [(0, drawn("####", "....", "....", "....")), (1, large), (1, small)])
    result = copy_paste(batch, choosing(False, True, True))
    assert result.instances.category_ids.tolist() == [10, 12, 11, 12]
    assert torch.equal(result.images.pixels[0, 0], torch.where(small, 9, 0))


def test_what_is_wholly_hidden_by_several_is_removed():
    below = drawn("###.", "....", "....", "....")
    thirds = [
        drawn("#...", "....", "....", "...."),
        drawn(".#..", "....", "....", "...."),
        drawn("..#.", "....", "....", "...."),
    ]  # each a third of it
    batch = batch_of([flat(0), flat(9)], [(0, below), *((1, third) for third in thirds)])
    result = copy_paste(batch, choosing(False, True, True, True))
    assert result.instances.category_ids.tolist() == [11, 12, 13, 11, 12, 13]
    assert result.instances.image_index.tolist() == [0, 0, 0, 1, 1, 1]


def test_pasted_instances_do_not_cut_one_another():
    first, second = drawn("####", "####", "....", "...."), drawn("....", "####", "####", "....")
    result = copy_paste(batch_of([flat(0), flat(9)], [(1, first), (1, second)]), choosing(True, True))
    assert torch.equal(result.instances.masks[:2], torch.stack([first, second]))


def test_images_of_other_sizes_are_resized_to_fit():
    # The source is 2 x 2 in a 4 x 4 extent; the target 4 x 4: every pixel becomes 2 x 2.
    source = flat(0)
    source[:, 0, 0], source[:, 0, 1], source[:, 1, 0], source[:, 1, 1] = 10, 10, 91, 91
    mask = drawn("#...", "#...", "....", "....")
    batch = batch_of([flat(200), source], [(1, mask)], sizes=[(4, 4), (2, 2)])
    result = copy_paste(batch, choosing(True))
    left = drawn("##..", "##..", "##..", "##..")
    assert torch.equal(result.instances.masks, torch.stack([left, mask]))
    # Bilinear, rows a quarter and three quarters of the way from 10 to 91: 10, 30.25, 70.75, 91, rounded.
    assert result.images.pixels[0, 0].tolist() == [[v, v, 200, 200] for v in (10, 30, 71, 91)]


def test_a_smaller_target_keeps_its_padding():
    mask = drawn("####", "####", "####", "####")
    small = flat(0)
    small[:, :2, :2] = 200
    result = copy_paste(batch_of([small, flat(9)], [(1, mask)], sizes=[(2, 2), (4, 4)]), choosing(True))
    assert torch.equal(result.instances.masks[0], drawn("##..", "##..", "....", "...."))
    assert torch.equal(result.images.pixels[0, 0], torch.where(result.instances.masks[0], 9, 0))


def test_a_mask_too_thin_for_the_target_is_not_pasted():
    extent = drawn(*["#" + "." * 15] * 16)
    speck = torch.zeros_like(extent)
    speck[0, 0] = True
    batch = batch_of([flat(5, 16, 16), flat(9, 16, 16)], [(1, speck)], sizes=[(2, 2), (16, 16)])
    result = copy_paste(batch, choosing(True))
    assert len(result.instances) == 1
    assert torch.equal(result.images.pixels, batch.images.pixels)


def test_the_middle_image_and_a_single_one_receive_nothing():
    three = batch_of([flat(0), flat(100), flat(200)], [(0, CORNER), (1, COLUMN), (2, CORNER)])
    result = copy_paste(three, choosing(True, True, True))
    assert torch.equal(result.images.pixels[1], flat(100))
    assert result.instances.image_index.tolist() == [0, 1, 2]  # the corners hide each other: refused
    single = batch_of([flat(0)], [(0, CORNER)])
    result = copy_paste(single, choosing(True))
    assert torch.equal(result.instances.masks, CORNER[None])


def test_no_instances_and_no_images():
    empty = batch_of([flat(1), flat(2)], [])
    result = copy_paste(empty, torch.Generator())
    assert len(result.instances) == 0
    assert result.instances.embeddings.shape == (0, 4)
    assert torch.equal(result.images.pixels, empty.images.pixels)
    none = SegmentationBatch(
        ImageBatch(torch.zeros(0, 3, 4, 4), torch.zeros(0, 2, dtype=torch.int64), ()), Instances.empty(4, 4)
    )
    assert len(copy_paste(none, torch.Generator()).instances) == 0


def test_an_empty_mask_keeps_nobody_away_and_is_removed():
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    result = copy_paste(batch_of([flat(0), flat(9)], [(0, nothing), (1, CORNER)]), choosing(False, True))
    assert result.instances.category_ids.tolist() == [11, 11]


def test_about_half_of_the_instances_are_pasted():
    pixel = [torch.zeros(20, 20, dtype=torch.bool) for _ in range(400)]
    for index, mask in enumerate(pixel):
        mask.view(-1)[index] = True
    batch = batch_of([flat(0, 20, 20), flat(9, 20, 20)], [])
    instances = Instances(
        torch.ones(400, dtype=torch.int64),
        torch.stack(pixel),
        torch.zeros(400, dtype=torch.int64),
        torch.ones(400),
        torch.zeros(400, 0),
    )
    results = [
        copy_paste(SegmentationBatch(batch.images, instances), torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    pasted = [(result.images.pixels[0, 0] == 9) for result in results]
    assert pasted[0].float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(pasted[0], pasted[1])
    assert not torch.equal(pasted[0], pasted[2])


def test_float_images_stay_float():
    batch = batch_of([flat(50).float(), flat(200).float()], [(1, CORNER)])
    result = copy_paste(batch, choosing(True))
    assert result.images.pixels.dtype == torch.float32
    assert torch.equal(result.images.pixels[0, 0], torch.where(CORNER, 200.0, 50.0))
