"""Which cell of which grid is trained towards which instance (SOLO, arXiv:1912.04488, sec. 3.3.1).

    levels      5, each with a grid of S x S cells and a range of scales; see `SoloModelSettings`
    candidates  every (instance, level, cell of the 3 x 3 around the instance's centre cell): N * 5 * 9, in that order
    positives   the candidates whose level and cell fit the instance, and which no smaller instance takes

A cell has one target. Where instances meet in a cell the one with the smallest mask has it, for its category, its
kernel, its embedding and its mask alike; of equal ones the last. The other instance has no positive in that cell.
# Deviation: the released SOLOv2 trains such a cell's kernel towards the masks of both, which no kernel can satisfy.

Nothing here loops over instances or cells or waits for the device; `count_slots` says how the host learns the counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from freesolo.ops.masks import Projections, areas
from freesolo.settings import SoloModelSettings
from freesolo.types import GridTargets, Instances

REACH = 1
"""Positive cells lie at most this many rows and columns from the centre's cell."""

CELLS_PER_LEVEL = (2 * REACH + 1) ** 2


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Every cell that could be positive, in the order of instances, levels, rows and columns.

    Attributes:
        valid: The level fits the instance's scale, the cell is in the grid and in the centre region, `(M,)`.
        instance: Row of `Instances`, `(M,)`.
        image: Image of the batch, `(M,)`.
        level: Pyramid level, `(M,)`.
        cell: Index among all levels' cells, `(M,)`; meaningless where not valid.
    """

    valid: Bool[Tensor, " M"]
    instance: Int64[Tensor, " M"]
    image: Int64[Tensor, " M"]
    level: Int64[Tensor, " M"]
    cell: Int64[Tensor, " M"]


def assign_targets(
    instances: Instances,
    batch_size: int,
    height: int,
    width: int,
    settings: SoloModelSettings,
    *,
    trim: bool | None = None,
) -> GridTargets:
    """Assign every cell of a batch in one pass over all instances.

    Source: SOLO (arXiv:1912.04488) sec. 3.3.1. An instance is positive on the levels whose range holds
    `sqrt(w * h)` of its box, ends included; there, in the cells that its centre region covers: its box scaled by
    `centre_sigma` about its centre of mass, clipped to the grid and to the 3 x 3 cells around the centre's cell.

    Args:
        instances: Of the whole batch. One with an empty mask has no positives.
        batch_size: Images in the batch.
        height: Of the batch's padded extent, in px: what the grids divide.
        width: Likewise.
        settings: Grids, scale ranges and sigma.
        trim: Return the valid slots alone, for which the host waits to count them; None: where that costs nothing, on
            the CPU.

    Returns:
        Slots in the order of instances, hence of images; the valid ones first, `slot_capacity` in all if not trimmed.
    """
    projections = Projections.of(instances.masks)
    candidates = _candidates(projections, instances.image_index, height, width, settings)
    cells = sum(size * size for size in settings.grid_sizes)
    smallest_last = projections.areas().argsort(descending=True, stable=True)
    rank = torch.empty_like(smallest_last).scatter_(0, smallest_last, _arange_like(smallest_last))

    # The highest rank in each cell, -1 in free ones; what is not valid goes to one cell past the end.
    address = torch.where(candidates.valid, candidates.image * cells + candidates.cell, batch_size * cells)
    highest = address.new_full((batch_size * cells + 1,), -1)
    highest.scatter_reduce_(0, address, rank[candidates.instance], reduce="amax")
    positive = candidates.valid & (highest[address] == rank[candidates.instance])

    categories = highest.new_full((batch_size * cells,), settings.num_categories)
    if len(instances) > 0:
        owner = smallest_last[highest[:-1].clamp(min=0)]
        categories = torch.where(highest[:-1] >= 0, instances.category_ids[owner], categories)
    if positive.device.type == "cpu" if trim is None else trim:
        kept = positive.nonzero()[:, 0]
    else:
        kept = (~positive).byte().argsort(stable=True)[: slot_capacity(len(instances), settings)]
    valid = positive[kept]
    return GridTargets(
        categories=categories.view(batch_size, cells),
        valid=valid,
        instance=candidates.instance[kept] * valid,
        image=candidates.image[kept] * valid,
        level=candidates.level[kept] * valid,
        cell=candidates.cell[kept] * valid,
    )


def slot_capacity(num_instances: int, settings: SoloModelSettings) -> int:
    """The most positives that so many instances can have: 9 on each of the levels whose ranges hold a same scale."""
    # Closed intervals all meet where one of them begins, if anywhere.
    starts = [low for low, _ in settings.scale_ranges]
    overlapping = max(sum(low <= start <= high for low, high in settings.scale_ranges) for start in starts)
    return num_instances * CELLS_PER_LEVEL * overlapping


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """How many valid slots each image has, on its way from the device to the host.

    Attributes:
        per_image: In host memory; undefined until `arrival` is over, `(B,)`.
        arrival: When the copy is done; None where it was never under way.
    """

    per_image: Int64[Tensor, " B"]
    arrival: torch.Event | None

    def wait(self) -> tuple[int, ...]:
        """The counts. Waits for what the device was given before `count_slots`, not for what it was given since."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return tuple(self.per_image.tolist())


def count_slots(targets: GridTargets) -> SlotCounts:
    """Send the number of valid slots of each image to the host, without waiting for it.

    The masks of slots that hold nothing would be most of a step's memory, and one matrix product per image needs to
    know which slots are whose. Called before the network's forward pass, the copy is over long before its result is
    wanted, and the device never idles.
    """
    images = torch.arange(targets.categories.shape[0], device=targets.image.device)
    counts = ((targets.image == images[:, None]) & targets.valid).sum(dim=1)
    if counts.device.type != "cuda":
        return SlotCounts(counts.cpu(), None)
    on_host = counts.to("cpu", non_blocking=True)
    arrival = torch.Event(counts.device)
    arrival.record()
    return SlotCounts(on_host, arrival)


def mask_targets(instances: Instances, stride: int) -> Bool[Tensor, "N h w"]:
    """The instances' masks at the resolution of the predicted ones.

    A bilinear resize (pixel centres, no antialiasing) thresholded at 0.5: with an even stride, two or more of the four
    pixels at the middle of each `stride` x `stride` block.

    # Deviation: a mask too thin for any block keeps the blocks that it touches, so that no positive is taught an empty
    mask, which is what the released SOLOv2 does to it.

    Args:
        instances: N may be 0.
        stride: Even.

    Raises:
        ValueError: If the stride is odd, or does not divide the masks' height and width.
    """
    height, width = instances.masks.shape[1:]
    if stride % 2 or height % stride or width % stride:
        raise ValueError(
            f"masks of {height} x {width} px cannot be reduced by stride {stride}: it must be even and fit"
        )
    # Rows first, which are contiguous, then columns; as bytes, which a CPU takes many at a time.
    pixels, middle = instances.masks.view(torch.uint8), stride // 2
    rows = pixels[:, middle - 1 :: stride] + pixels[:, middle::stride]
    resized = rows[..., middle - 1 :: stride] + rows[..., middle::stride] >= 2
    vanished = areas(resized) == 0
    if vanished.device.type == "cpu":
        # Only those few are looked at again; a device would be waited for to know which they are.
        resized[vanished] = _touched(pixels[vanished], stride)
        return resized
    return torch.where(vanished[:, None, None], _touched(pixels, stride), resized)


def _touched(pixels: UInt8[Tensor, "N H W"], stride: int) -> Bool[Tensor, "N h w"]:
    """The blocks of `stride` x `stride` pixels, 0 or 1 each, in which there is a 1."""
    rows = reduce(torch.bitwise_or, (pixels[:, row::stride] for row in range(stride)))
    return reduce(torch.bitwise_or, (rows[..., column::stride] for column in range(stride))).bool()


def _candidates(
    projections: Projections, image_index: Int64[Tensor, " N"], height: int, width: int, settings: SoloModelSettings
) -> _Candidates:
    """All candidates. In float64, so that a coordinate on the edge of a cell falls into the same cell everywhere."""
    device = image_index.device
    boxes = projections.boxes_xyxy().double()
    box_size = torch.stack((boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]), dim=1)  # (N, 2): height, width
    centre = projections.centres_of_mass().double()  # (N, 2): y, x
    grid = _constants(settings.grid_sizes, device)
    extent = _constants((height, width), device)
    low, high = (_constants(ends, device) for ends in zip(*settings.scale_ranges, strict=True))

    scale = box_size.prod(dim=1).sqrt()[:, None]
    in_range = (low <= scale) & (scale <= high) & (scale > 0)  # (N, 5); an empty mask has scale 0

    def cells_of(position: Tensor) -> Tensor:
        return (position[:, None, :] / extent * grid[:, None]).floor().long()  # (N, 5, 2): row, column

    half_region = box_size * (settings.centre_sigma / 2)
    centre_cell, last = cells_of(centre), (grid.long() - 1)[:, None]
    first_cell = cells_of(centre - half_region).clamp(min=0)
    last_cell = torch.minimum(cells_of(centre + half_region), last)

    steps = torch.arange(-REACH, REACH + 1, device=device)
    cells = centre_cell[..., None] + steps  # (N, 5, 2, 3): row or column at each step
    covered = (first_cell[..., None] <= cells) & (cells <= last_cell[..., None])
    valid = in_range[:, :, None, None] & covered[:, :, 0, :, None] & covered[:, :, 1, None, :]  # (N, 5, 3, 3)
    size = grid.long()
    offset = (size * size).cumsum(0) - size * size
    index = offset[:, None, None] + cells[:, :, 0, :, None] * size[:, None, None] + cells[:, :, 1, None, :]
    instance = torch.arange(len(image_index), device=device)[:, None, None, None].expand_as(valid)
    level = torch.arange(len(settings.grid_sizes), device=device)[None, :, None, None].expand_as(valid)
    image = image_index[:, None, None, None].expand_as(valid)
    return _Candidates(*(column.flatten() for column in (valid, instance, image, level, index)))


def _constants(values: tuple[float | int, ...], device: torch.device) -> Tensor:
    # Filled number by number: a tensor made from a list on the host would have to be sent, and the sending waited for.
    return torch.stack([torch.full((), float(value), dtype=torch.float64, device=device) for value in values])


def _arange_like(index: Tensor) -> Tensor:
    return torch.arange(index.shape[0], device=index.device)
