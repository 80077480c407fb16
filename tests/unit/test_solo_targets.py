"""Target assignment by hand: levels, centre regions, collisions, empty and one-pixel masks, slots, reduced masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from freesolo.settings import SoloModelSettings
from freesolo.solo.targets import assign_targets, count_slots, mask_targets, slot_capacity
from freesolo.types import GridTargets, Instances

# Over 64 x 64 px: cells of 8, 16, 16, 32 and 64 px. The levels' first cells are 0, 64, 80, 96 and 100; 101 in all.
MODEL = SoloModelSettings(
    num_categories=2,
    grid_sizes=(8, 4, 4, 2, 1),
    scale_ranges=((1, 10), (10, 20), (20, 30), (30, 40), (40, 64)),
)


def with_boxes(*boxes: tuple[int, int, int, int], images: list[int] | None = None) -> Instances:
    """Filled boxes (left, top, right, bottom) of categories 0, 1, 0, 1, ..."""
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return Instances(
        image_index=torch.tensor(images or [0] * len(boxes)),
        masks=masks,
        category_ids=torch.arange(len(boxes)) % 2,
        scores=torch.ones(len(boxes)),
        embeddings=torch.zeros(len(boxes), 0),
    )


def assign(instances: Instances, batch_size: int = 1, model: SoloModelSettings = MODEL) -> GridTargets:
    return assign_targets(instances, batch_size, 64, 64, model)


def slots(targets: GridTargets) -> list[tuple[int, int, int, int]]:
    columns = (targets.instance, targets.image, targets.level, targets.cell)
    return [tuple(row) for row in torch.stack(columns, dim=1)[targets.valid].tolist()]


def test_a_box_within_one_cell():
    # 6 x 6 px, scale 6: level 0 only. Centre (43, 19), region 43 +- 0.6 x 19 +- 0.6: row 2, column 5 of cells of 8 px.
    targets = assign(with_boxes((40, 16, 46, 22)))
    assert slots(targets) == [(0, 0, 0, 2 * 8 + 5)]
    assert targets.categories[0, 21] == 0
    assert (targets.categories[0] == 2).sum() == 100


def test_a_scale_where_ranges_meet_is_on_both_levels():
    # 10 x 10 px at (15, 15): levels 0 and 1. Region 14..16: cells 1 and 2 of 8 px, cells 0 and 1 of 16 px, each way.
    level_0 = [1 * 8 + 1, 1 * 8 + 2, 2 * 8 + 1, 2 * 8 + 2]
    level_1 = [64 + 0, 64 + 1, 64 + 4, 64 + 5]
    expected = [(0, 0, 0, cell) for cell in level_0] + [(0, 0, 1, cell) for cell in level_1]
    assert slots(assign(with_boxes((10, 10, 20, 20)))) == expected


def test_scale_is_the_geometric_mean_of_the_box():
    # 32 x 2 px: sqrt(64) = 8, level 0, although the width alone is of level 3.
    assert {level for _, _, level, _ in slots(assign(with_boxes((0, 0, 32, 2))))} == {0}


def test_region_is_clipped_to_three_by_three_and_to_the_grid():
    wide = MODEL.model_copy(update={"centre_sigma": 1.0})
    # 50 x 2 px, scale 10, levels 0 and 1; on level 0 centre (25, 1): cell 3; the region covers columns 0..6, row 0.
    level_0 = [cell for _, _, level, cell in slots(assign(with_boxes((0, 0, 50, 2)), model=wide)) if level == 0]
    assert level_0 == [2, 3, 4]
    # In the corners: 8 x 8 px about (60, 60) and (4, 4), regions of twice that: 52..68 and -4..12, cells 6, 7 and 0, 1.
    wider = MODEL.model_copy(update={"centre_sigma": 2.0})
    assert [cell for *_, cell in slots(assign(with_boxes((56, 56, 64, 64)), model=wider))] == [54, 55, 62, 63]
    assert [cell for *_, cell in slots(assign(with_boxes((0, 0, 8, 8)), model=wider))] == [0, 1, 8, 9]


def test_centre_is_that_of_the_mass_not_of_the_box():
    # An L of 9 x 9 px and 17 pixels: a column x 0, y 3..11, and a row y 11, x 0..8. Mean x is
    # (9 * 0.5 + 1.5 + ... + 8.5) / 17 = (4.5 + 40) / 17 = 2.62; mean y 12 - 2.62 = 9.38; regions reach +- 0.9 about.
    # x 1.72..3.52 is column 0, y 8.48..10.28 row 1. About the box's centre, y 6.6..8.4, it would be rows 0 and 1.
    instances = with_boxes((0, 3, 1, 12))
    instances.masks[0, 11, 0:9] = True
    assert slots(assign(instances)) == [(0, 0, 0, 8)]


def test_the_smaller_mask_takes_the_cell_whatever_the_order():
    large, small = (32, 32, 42, 42), (34, 34, 40, 40)
    # On level 0 both centres, (37, 37), and regions lie in cell 4, each way. Level 1 is the large one's alone.
    for boxes, winner in (((large, small), 1), ((small, large), 0)):
        targets = assign(with_boxes(*boxes))
        assert sorted(slots(targets)) == sorted([(winner, 0, 0, 4 * 8 + 4), (1 - winner, 0, 1, 64 + 2 * 4 + 2)])
        assert targets.categories[0, 36] == winner  # the category is the row's here
        assert targets.categories[0, 74] == 1 - winner


def test_of_equal_masks_the_last_takes_the_cell():
    assert slots(assign(with_boxes((40, 16, 46, 22), (40, 16, 46, 22), (40, 16, 46, 22)))) == [(2, 0, 0, 21)]


def test_images_do_not_share_cells():
    box = (40, 16, 46, 22)
    targets = assign(with_boxes(box, box, images=[0, 2]), batch_size=3)
    assert slots(targets) == [(0, 0, 0, 21), (1, 2, 0, 21)]
    assert targets.categories[:, 21].tolist() == [0, 2, 1]


def test_a_one_pixel_mask_is_positive_in_its_cell():
    # Scale 1, the low end of level 0's range; the last pixel's centre is in the last cell.
    assert slots(assign(with_boxes((63, 63, 64, 64)))) == [(0, 0, 0, 63)]


def test_an_empty_mask_is_positive_nowhere_even_where_the_range_begins_at_zero():
    model = MODEL.model_copy(update={"scale_ranges": ((0, 10), *MODEL.scale_ranges[1:])})
    targets = assign(with_boxes((0, 0, 0, 0), (40, 16, 46, 22)), model=model)
    assert slots(targets) == [(1, 0, 0, 21)]


def test_no_instances():
    targets = assign(Instances.empty(64, 64), batch_size=2)
    assert targets.categories.shape == (2, 101)
    assert (targets.categories == 2).all()
    assert all(len(column) == 0 for column in (targets.valid, targets.instance, targets.level, targets.cell))
    assert count_slots(targets).wait() == (0, 0)


def test_a_scale_beyond_every_range_is_positive_nowhere():
    model = MODEL.model_copy(update={"scale_ranges": tuple((1.0, 5.0) for _ in range(5))})
    assert slots(assign(with_boxes((0, 0, 6, 6)), model=model)) == []


@pytest.mark.parametrize(
    ("ranges", "overlapping"),
    [
        (SoloModelSettings().scale_ranges, 3),  # a scale of 96 is in the first, where it ends, and in the next two
        (((1, 2), (3, 4), (5, 6), (7, 8), (9, 10)), 1),
        (((1, 2), (2, 3), (3, 4), (4, 5), (5, 6)), 2),
        (((0, 9), (0, 9), (0, 9), (0, 9), (9, 9)), 5),
    ],
)
def test_capacity_is_nine_cells_on_each_level_that_a_scale_can_be_on(ranges, overlapping):
    model = MODEL.model_copy(update={"scale_ranges": ranges})
    assert slot_capacity(7, model) == 7 * 9 * overlapping
    assert slot_capacity(0, model) == 0


def test_untrimmed_slots_have_a_fixed_capacity_and_the_valid_ones_come_first():
    instances = with_boxes((10, 10, 20, 20), (0, 0, 0, 0), (40, 16, 46, 22), images=[0, 0, 1])
    padded = assign_targets(instances, 3, 64, 64, MODEL, trim=False)
    trimmed = assign(instances, batch_size=3)
    assert len(padded.valid) == slot_capacity(3, MODEL)
    assert padded.valid.tolist() == [True] * 9 + [False] * (len(padded.valid) - 9)
    assert slots(padded) == slots(trimmed)
    assert all((column[9:] == 0).all() for column in (padded.instance, padded.image, padded.level, padded.cell))
    assert torch.equal(padded.categories, trimmed.categories)
    assert count_slots(padded).wait() == count_slots(trimmed).wait() == (8, 1, 0)
    assert len(assign_targets(Instances.empty(64, 64), 3, 64, 64, MODEL, trim=False).valid) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_targets_are_the_cpus_and_nothing_waits():
    instances = with_boxes((10, 10, 20, 20), (40, 16, 46, 22), (41, 17, 45, 21), images=[0, 1, 1])
    on_gpu = instances.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        targets = assign(on_gpu, batch_size=3)
        counts = count_slots(targets)
        reduced = mask_targets(on_gpu, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = assign(instances, batch_size=3)
    assert counts.wait() == (8, 1, 0)
    assert slots(targets) == slots(expected)
    assert torch.equal(targets.categories.cpu(), expected.categories)
    assert torch.equal(reduced.cpu(), mask_targets(instances, 4))


def test_reduced_masks_are_the_bilinear_resize():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 64, 32, generator=generator) < 0.5
    instances = with_boxes(*[(0, 0, 1, 1)] * 6)
    instances = Instances(instances.image_index, masks, instances.category_ids, instances.scores, instances.embeddings)
    soft = functional.interpolate(masks[:, None].float(), scale_factor=0.25, mode="bilinear", align_corners=False)
    assert torch.equal(mask_targets(instances, 4), soft[:, 0] >= 0.5)


def test_a_mask_between_samples_keeps_the_blocks_it_touches():
    # Column 3 of 64 is not among the columns 1 and 2 of its block that a resize by 4 looks at; nor is pixel (63, 63).
    instances = with_boxes((3, 0, 4, 64), (63, 63, 64, 64), (0, 0, 0, 0))
    reduced = mask_targets(instances, 4)
    assert reduced[0].nonzero().tolist() == [[row, 0] for row in range(16)]
    assert reduced[1].nonzero().tolist() == [[15, 15]]
    assert not reduced[2].any()


def test_no_masks_to_reduce():
    assert mask_targets(Instances.empty(64, 32), 4).shape == (0, 16, 8)


@pytest.mark.parametrize(("height", "width", "stride"), [(62, 64, 4), (64, 62, 4), (63, 63, 3)])
def test_masks_that_cannot_be_reduced(height, width, stride):
    with pytest.raises(ValueError, match=f"{height} x {width} px cannot be reduced by stride {stride}"):
        mask_targets(Instances.empty(height, width), stride)
