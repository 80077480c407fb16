"""Target assignment against a slow twin written from SOLO (arXiv:1912.04488) sec. 3.3.1, in loops over all cells."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from freesolo.settings import SoloModelSettings
from freesolo.solo.targets import assign_targets, mask_targets, slot_capacity
from freesolo.types import Instances


@dataclass(frozen=True)
class Shape:
    """What the twin knows of an instance: box edges, centre of mass, pixels."""

    left: int
    top: int
    right: int
    bottom: int
    x: float
    y: float
    area: int


def measure(mask: list[list[bool]]) -> Shape | None:
    pixels = [(row, column) for row, line in enumerate(mask) for column, inside in enumerate(line) if inside]
    if not pixels:
        return None
    rows, columns = [row for row, _ in pixels], [column for _, column in pixels]
    # A pixel sits at its centre, half a pixel from its edges. The subject divides in float32; so must its twin, or a
    # centre on the edge of a cell falls to either side.
    y = float(np.float32(sum(row + 0.5 for row in rows) / len(pixels)))
    x = float(np.float32(sum(column + 0.5 for column in columns) / len(pixels)))
    return Shape(min(columns), min(rows), max(columns) + 1, max(rows) + 1, x, y, len(pixels))


def cells_of(shape: Shape, size: int, height: int, width: int, sigma: float) -> list[tuple[int, int]]:
    """Positive cells on a grid of `size`: those the centre region covers, in the 3 x 3 around the centre's."""
    centre = (math.floor(shape.y / height * size), math.floor(shape.x / width * size))
    half_height, half_width = sigma / 2 * (shape.bottom - shape.top), sigma / 2 * (shape.right - shape.left)
    cells = []
    for row in range(size):
        for column in range(size):
            covered = (
                math.floor((shape.y - half_height) / height * size) <= row
                and row <= math.floor((shape.y + half_height) / height * size)
                and math.floor((shape.x - half_width) / width * size) <= column
                and column <= math.floor((shape.x + half_width) / width * size)
            )
            if covered and abs(row - centre[0]) <= 1 and abs(column - centre[1]) <= 1:
                cells.append((row, column))
    return cells


def twin(
    instances: Instances, batch_size: int, height: int, width: int, settings: SoloModelSettings
) -> tuple[list[list[int]], set[tuple[int, int, int, int]]]:
    """Categories of all cells, and the positives as (instance, image, level, cell)."""
    total = sum(size * size for size in settings.grid_sizes)
    categories = [[settings.num_categories] * total for _ in range(batch_size)]
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    shapes = [measure(mask.tolist()) for mask in instances.masks]
    # Later ones overwrite earlier ones; largest first, so the smaller wins, and of equal ones the last.
    order = sorted((n for n, shape in enumerate(shapes) if shape), key=lambda n: -shapes[n].area)
    for n in order:
        shape, image = shapes[n], int(instances.image_index[n])
        scale = math.sqrt((shape.right - shape.left) * (shape.bottom - shape.top))
        first_cell = 0
        for level, size in enumerate(settings.grid_sizes):
            low, high = settings.scale_ranges[level]
            if low <= scale <= high:
                for row, column in cells_of(shape, size, height, width, settings.centre_sigma):
                    cell = first_cell + row * size + column
                    categories[image][cell] = int(instances.category_ids[n])
                    owner[image, cell] = (n, level)
            first_cell += size * size
    return categories, {(n, image, level, cell) for (image, cell), (n, level) in owner.items()}


def random_instances(seed: int, batch_size: int, height: int, width: int, count: int, categories: int) -> Instances:
    """Boxes of all sizes, half of them with holes; some of one pixel, some empty, some on the edges, many on others."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, height, width), dtype=bool)
    for mask in masks:
        h, w = generator.integers(1, height + 1), generator.integers(1, width + 1)
        if generator.random() < 0.3:
            h, w = max(1, h // 8), max(1, w // 8)
        top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
        mask[top : top + h, left : left + w] = True
        if generator.random() < 0.5:
            mask &= generator.random((height, width)) < generator.choice([0.02, 0.5, 0.9])
    masks[generator.random(count) < 0.1] = False
    return Instances(
        image_index=torch.from_numpy(np.sort(generator.integers(0, batch_size, count))),
        masks=torch.from_numpy(masks),
        category_ids=torch.from_numpy(generator.integers(0, categories, count)),
        scores=torch.ones(count),
        embeddings=torch.zeros(count, 0),
    )


SETTINGS = [
    SoloModelSettings(
        num_categories=3,
        grid_sizes=(10, 9, 6, 4, 3),
        scale_ranges=((1, 12), (6, 24), (12, 48), (24, 96), (48, 256)),
    ),
    # A large sigma, so that the 3 x 3 clips; ranges with a gap; one open to everything.
    SoloModelSettings(
        num_categories=3,
        grid_sizes=(7, 5, 5, 2, 1),
        scale_ranges=((0, 1000), (1, 5), (8, 20), (20, 21), (30, 64)),
        centre_sigma=0.9,
    ),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("extent", [(64, 96), (40, 36)])
@pytest.mark.parametrize("count", [1, 5, 60])
def test_targets_equal_their_twin(settings: SoloModelSettings, extent: tuple[int, int], count: int):
    for seed in range(5):
        instances = random_instances(seed, 3, *extent, count, settings.num_categories)
        targets = assign_targets(instances, 3, *extent, settings)
        categories, positives = twin(instances, 3, *extent, settings)
        assert targets.categories.tolist() == categories
        assert targets.valid.all()
        columns = (targets.instance, targets.image, targets.level, targets.cell)
        slots = list(zip(*(column.tolist() for column in columns), strict=True))
        assert slots == sorted(positives)
        assert len(slots) <= slot_capacity(count, settings)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_reduced_masks_equal_their_twin(stride: int):
    instances = random_instances(stride, 1, 32, 48, 40, 1)
    reduced = mask_targets(instances, stride)
    for mask, got in zip(instances.masks.tolist(), reduced.tolist(), strict=True):
        rows, columns = 32 // stride, 48 // stride
        expected = [[False] * columns for _ in range(rows)]
        touched = [[False] * columns for _ in range(rows)]
        for row in range(rows):
            for column in range(columns):
                # A bilinear sample at the block's middle, which lies between pixels: the mean of the four around it.
                y, x = row * stride + stride // 2, column * stride + stride // 2
                expected[row][column] = mask[y - 1][x - 1] + mask[y - 1][x] + mask[y][x - 1] + mask[y][x] >= 2
                block = mask[row * stride : (row + 1) * stride]
                touched[row][column] = any(any(line[column * stride : (column + 1) * stride]) for line in block)
        assert got == (expected if any(map(any, expected)) else touched)
