"""SOLO's losses against slow twins written from the papers' equations, with loops over cells, pixels and pairs.

Focal loss (arXiv:1708.02002) eq. 5; Dice (arXiv:1912.04488) eq. 3; the projection, pairwise and embedding terms of
FreeSOLO (arXiv:2202.12181) sec. 3.2 and BoxInst (arXiv:2012.02310) sec. 3.2; their means over positives and levels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from freesolo.ops.affinity import colour_similarity
from freesolo.settings import LossSettings
from freesolo.solo.heads.solov2 import SoloV2Head, SoloV2Predictions
from freesolo.solo.supervisions.base import LossInputs, Positives
from freesolo.solo.supervisions.boxes import Boxes
from freesolo.solo.supervisions.free_masks import FreeMasks
from freesolo.solo.supervisions.masks import Masks
from freesolo.solo.targets import assign_targets
from freesolo.types import ImageBatch, Instances
from tests.small import small_solo

HEIGHT, WIDTH = 64, 96
MODEL = small_solo(num_categories=2, embedding_channels=5, grid_sizes=(8, 7, 5, 3, 2), centre_sigma=0.4)
CELLS = sum(size * size for size in MODEL.grid_sizes)
STEPS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def twin_focal(logits: list[list[float]], category: list[int], alpha: float, gamma: float) -> float:
    """The sum over one image's cells and categories; `logits` is (C, L)."""
    total = 0.0
    for c, row in enumerate(logits):
        for cell, logit in enumerate(row):
            p = sigmoid(logit)
            if category[cell] == c:
                total -= alpha * (1 - p) ** gamma * math.log(p)
            else:
                total -= (1 - alpha) * p**gamma * math.log(1 - p)
    return total


def twin_dice(p: list[float], q: list[float]) -> float:
    overlap = sum(a * b for a, b in zip(p, q, strict=True))
    return 1 - 2 * overlap / (sum(a * a for a in p) + sum(b * b for b in q))


def columns_of(mask: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*mask, strict=True)]


def twin_max_projection(p: list[list[float]], q: list[list[float]]) -> float:
    rows = twin_dice([max(row) for row in p], [max(row) for row in q])
    return rows + twin_dice([max(column) for column in columns_of(p)], [max(column) for column in columns_of(q)])


def twin_mean_projection(p: list[list[float]], q: list[list[float]]) -> float:
    def means(lines: list[list[float]]) -> list[float]:
        return [sum(line) / len(line) for line in lines]

    return twin_dice(means(p), means(q)) + twin_dice(means(columns_of(p)), means(columns_of(q)))


def twin_pairwise(p: list[list[float]], q: list[list[float]], similarity: list[list[list[float]]]) -> tuple[float, int]:
    """The sum over the pairs whose first pixel lies in the box of `q` and whose similarity is 0.3 or more; how many."""
    inside = [(row, column) for row, line in enumerate(q) for column, value in enumerate(line) if value]
    top, bottom = min(row for row, _ in inside), max(row for row, _ in inside)
    left, right = min(column for _, column in inside), max(column for _, column in inside)
    total, count = 0.0, 0
    for row in range(top, bottom + 1):
        for column in range(left, right + 1):
            for k, (down, across) in enumerate(STEPS):
                if similarity[k][row][column] >= 0.3:
                    a, b = p[row][column], p[row + 2 * down][column + 2 * across]
                    total -= math.log(a * b + (1 - a) * (1 - b))
                    count += 1
    return total, count


def twin_embedding(predicted: list[float], target: list[float]) -> float:
    product = sum(a * b for a, b in zip(predicted, target, strict=True))
    return -product / math.hypot(*predicted) / math.hypot(*target)


def twin_level_mean(terms: list[tuple[int, float]]) -> float:
    """The mean over a level's positives, then over the levels that have any; `terms` are (level, value)."""
    levels = sorted({level for level, _ in terms})
    means = [np.mean([value for at, value in terms if at == level]) for level in levels]
    return float(np.mean(means)) if means else 0.0


def random_inputs(seed: int, count: int) -> LossInputs:
    """Three images, the last of which has no instances; predictions of any kind; nearly grey pixels."""
    generator = torch.Generator().manual_seed(seed)
    integers = np.random.default_rng(seed)
    masks = torch.zeros(count, HEIGHT, WIDTH, dtype=torch.bool)
    for mask in masks:
        h, w = (int(integers.integers(1, side // 2)) for side in (HEIGHT, WIDTH))
        top, left = int(integers.integers(0, HEIGHT - h)), int(integers.integers(0, WIDTH - w))
        mask[top : top + h, left : left + w] = True
    masks &= torch.rand(masks.shape, generator=generator) < 0.8
    instances = Instances(
        image_index=torch.from_numpy(np.sort(integers.integers(0, 2, count))),
        masks=masks,
        category_ids=torch.from_numpy(integers.integers(0, 2, count)),
        scores=torch.ones(count),
        embeddings=torch.nn.functional.normalize(torch.randn(count, 5, generator=generator), dim=1),
    )
    predictions = SoloV2Predictions(
        category_logits=2 * torch.randn(3, 2, CELLS, generator=generator),
        kernels=torch.randn(3, 32, CELLS, generator=generator),
        embeddings=torch.randn(3, 5, CELLS, generator=generator),
        mask_features=0.5 * torch.rand(3, 32, HEIGHT // 4, WIDTH // 4, generator=generator),
    )
    pixels = (120 + 10 * torch.rand(3, 3, HEIGHT, WIDTH, generator=generator)).byte()
    sizes = torch.tensor([[64, 96], [60, 77], [41, 96]])
    targets = assign_targets(instances, 3, HEIGHT, WIDTH, MODEL)
    images = ImageBatch(pixels, sizes, image_ids=(0, 1, 2))
    head, settings = SoloV2Head(MODEL), LossSettings()
    return LossInputs(
        head, predictions, targets.categories, Positives.of(targets), images, instances, settings, step=250
    )


def reduced(mask: torch.Tensor) -> list[list[float]]:
    """The mask at stride 4: a bilinear sample in the middle of each block; if all are below 0.5, blocks touched."""
    rows, columns = HEIGHT // 4, WIDTH // 4
    sampled = [
        [float(mask[4 * r + 1 : 4 * r + 3, 4 * c + 1 : 4 * c + 3].float().mean() >= 0.5) for c in range(columns)]
        for r in range(rows)
    ]
    if any(any(line) for line in sampled):
        return sampled
    return [[float(mask[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].any()) for c in range(columns)] for r in range(rows)]


def twin_masks(predictions: SoloV2Predictions, image: int, cell: int) -> list[list[float]]:
    """The mask of a cell: at each pixel the dot product of the cell's kernel and the features, then the sigmoid."""
    kernel = predictions.kernels[image, :, cell].double().numpy()
    features = predictions.mask_features[image].double().numpy()
    _, rows, columns = features.shape
    return [[sigmoid(float(np.dot(kernel, features[:, r, c]))) for c in range(columns)] for r in range(rows)]


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 4), (2, 9), (3, 0)])
def test_free_mask_losses_equal_their_twin(seed: int, count: int):
    inputs = random_inputs(seed, count)
    predictions, instances, positives = inputs.predictions, inputs.instances, inputs.positives
    similarity = colour_similarity(inputs.images.pixels, inputs.images.valid_pixels())
    losses = FreeMasks().losses(inputs)
    terms: dict[str, list[tuple[int, float]]] = {
        name: [] for name in ("max_projection", "mean_projection", "pairwise", "embedding")
    }
    columns = (positives.instance, positives.image, positives.level, positives.cell)
    for instance, image, level, cell in zip(*(column.tolist() for column in columns), strict=True):
        p, q = twin_masks(predictions, image, cell), reduced(instances.masks[instance])
        embedding = predictions.embeddings[image, :, cell].tolist()
        pair_sum, pairs = twin_pairwise(p, q, similarity[image].tolist())
        values = {
            "max_projection": twin_max_projection(p, q),
            "mean_projection": twin_mean_projection(p, q),
            "pairwise": pair_sum / max(pairs, 1),
            "embedding": twin_embedding(embedding, instances.embeddings[instance].tolist()),
        }
        for name, value in values.items():
            terms[name].append((level, value))
    assert len({level for level, _ in terms["pairwise"]}) >= min(2, count)

    images = set(instances.image_index.tolist())
    focal = sum(
        twin_focal(predictions.category_logits[image].tolist(), inputs.categories[image].tolist(), 0.25, 2.0)
        for image in images
    )
    weights = {"max_projection": 1.0, "mean_projection": 0.1, "pairwise": 250 / 1000, "embedding": 4.0}
    expected = {name: weights[name] * twin_level_mean(terms[name]) for name in weights}
    expected["category"] = focal / (len(positives.cell) + 1)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 4), (2, 9), (3, 0)])
def test_mask_losses_equal_their_twin(seed: int, count: int):
    inputs = random_inputs(seed, count)
    predictions, instances, positives = inputs.predictions, inputs.instances, inputs.positives
    losses = Masks().losses(inputs)
    dice = []
    columns = (positives.instance, positives.image, positives.cell)
    for instance, image, cell in zip(*(column.tolist() for column in columns), strict=True):
        p, q = twin_masks(predictions, image, cell), reduced(instances.masks[instance])
        dice.append(twin_dice([value for row in p for value in row], [value for row in q for value in row]))
    focal = sum(
        twin_focal(predictions.category_logits[image].tolist(), inputs.categories[image].tolist(), 0.25, 2.0)
        for image in range(3)
    )
    expected = {
        "category": focal / (len(positives.cell) + 1),
        "dice": 3 * (sum(dice) / len(dice) if dice else 0.0),
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 4), (2, 9), (3, 0)])
def test_box_losses_equal_their_twin(seed: int, count: int):
    inputs = random_inputs(seed, count)
    predictions, instances, positives = inputs.predictions, Boxes().trusted(inputs.instances), inputs.positives
    similarity = colour_similarity(inputs.images.pixels, inputs.images.valid_pixels())
    losses = Boxes().losses(replace(inputs, instances=instances))
    projections, pair_sums, pair_counts = [], [], []
    columns = (positives.instance, positives.image, positives.cell)
    for instance, image, cell in zip(*(column.tolist() for column in columns), strict=True):
        p, q = twin_masks(predictions, image, cell), reduced(instances.masks[instance])
        projections.append(twin_max_projection(p, q))
        pair_sum, pairs = twin_pairwise(p, q, similarity[image].tolist())
        pair_sums.append(pair_sum)
        pair_counts.append(pairs)
    focal = sum(
        twin_focal(predictions.category_logits[image].tolist(), inputs.categories[image].tolist(), 0.25, 2.0)
        for image in range(3)
    )
    expected = {
        "category": focal / (len(positives.cell) + 1),
        "max_projection": sum(projections) / max(len(projections), 1),
        "pairwise": 250 / 1000 * sum(pair_sums) / max(sum(pair_counts), 1),
    }
    assert count == 0 or sum(pair_counts) > 0
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)
