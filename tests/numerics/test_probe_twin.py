"""The numbers by which pre-training is followed, against a slow twin in Python's own arithmetic."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from freesolo.densecl.probe import cell_hits, knn_hits, retrieval_hits, similarity_map, true_cells

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def slow_retrieval(query: list[Vector], key: list[Vector]) -> list[bool]:
    return [max(range(len(key)), key=lambda j: dot(one, key[j])) == i for i, one in enumerate(query)]


def slow_true_cell(cell: int, query_box: Vector, key_box: Vector, side: int) -> int:
    """The one cell of the key crop, as a rectangle of the photo, that a query cell's middle lies in."""
    x, y, width, height = query_box
    middle = (x + (cell % side + 0.5) / side * width, y + (cell // side + 0.5) / side * height)
    for candidate in range(side * side):
        x, y, width, height = key_box
        left, top = x + candidate % side / side * width, y + candidate // side / side * height
        if left <= middle[0] < left + width / side and top <= middle[1] < top + height / side:
            return candidate
    return -1


def slow_knn(
    features: list[Vector], categories: list[int], photos: list[int], k: int, temperature: float
) -> list[bool]:
    """Wu et al. (arXiv:1805.01978) sec. 3.4, an object at a time."""
    hits = []
    for i, one in enumerate(features):
        others = [j for j in range(len(features)) if photos[j] != photos[i]]
        nearest = sorted(others, key=lambda j: -dot(one, features[j]))[:k]
        votes: dict[int, float] = defaultdict(float)
        for j in nearest:
            votes[categories[j]] += math.exp(dot(one, features[j]) / temperature)
        hits.append(bool(votes) and max(votes, key=lambda category: votes[category]) == categories[i])
    return hits


def unit_rows(count: int, channels: int, seed: int) -> Tensor:
    rows = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_retrieval(seed: int) -> None:
    query, noise = unit_rows(30, 4, seed), unit_rows(30, 4, seed + 100)
    key = torch.nn.functional.normalize(query + 0.3 * noise, dim=1)
    hits = retrieval_hits(query, key).tolist()
    assert hits == slow_retrieval(query.double().tolist(), key.double().tolist())
    assert 0 < sum(hits) < 30, "neither trivial nor hopeless"


@pytest.mark.parametrize("side", [1, 2, 7])
def test_true_cells(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    places, lengths = torch.randint(0, 100, (2, 20, 2), generator=generator).float()
    query_boxes = torch.cat([places, lengths + 50], dim=1)
    key_boxes = torch.cat([lengths, places + 50], dim=1)
    truth = true_cells(query_boxes, key_boxes, side)
    assert truth.tolist() == [
        [slow_true_cell(cell, query_box, key_box, side) for cell in range(side * side)]
        for query_box, key_box in zip(query_boxes.tolist(), key_boxes.tolist(), strict=True)
    ]
    assert (truth >= 0).any()


@pytest.mark.parametrize("seed", range(5))
def test_knn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    categories = torch.randint(0, 4, (40,), generator=generator)
    photos = torch.randint(0, 12, (40,), generator=generator)
    features = torch.nn.functional.normalize(
        torch.nn.functional.one_hot(categories, 4).float() + unit_rows(40, 4, seed), dim=1
    )
    for neighbours, temperature in ((1, 0.07), (20, 0.07), (100, 0.5)):
        hits = knn_hits(features, categories, photos, neighbours=neighbours, temperature=temperature).tolist()
        expected = slow_knn(features.double().tolist(), categories.tolist(), photos.tolist(), neighbours, temperature)
        assert hits == expected
        assert 0 < sum(hits) < 40


def test_a_similarity_map() -> None:
    features = unit_rows(12, 5, 0).T.reshape(5, 3, 4)
    cells = features.flatten(1).T.double().tolist()
    expected = [dot(cells[2 * 4 + 1], cell) for cell in cells]  # row 2 of 3, column 1 of 4
    found = similarity_map(features, x=0.3, y=0.99)
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert found[2, 1].item() == pytest.approx(1)


# --- by hand, and nothing at all ----------------------------------------------------------------------------------


def test_crops_of_the_same_part_match_cell_by_cell_and_apart_not_at_all() -> None:
    box = torch.tensor([[10.0, 20.0, 64.0, 32.0]])
    assert true_cells(box, box, 2).tolist() == [[0, 1, 2, 3]]
    assert true_cells(box, box + torch.tensor([64.0, 0, 0, 0]), 2).tolist() == [[-1, -1, -1, -1]]
    # The right half of the photo's part at twice the size: of each row its right cell is seen, in the left column.
    assert true_cells(box, torch.tensor([[42.0, 20.0, 64.0, 32.0]]), 2).tolist() == [[-1, 0, -1, 2]]


def test_cells_are_hit_where_the_likest_is_the_true_one() -> None:
    features = torch.eye(4)[None]
    shuffled = features[:, :, [1, 0, 2, 3]]
    assert cell_hits(features, shuffled, torch.tensor([[1, 0, 2, -1]])).tolist() == [[True, True, True, False]]
    assert cell_hits(features, shuffled, torch.tensor([[0, 0, 0, 0]])).tolist() == [[False, True, False, False]]


def test_features_that_are_all_the_same_find_one_in_n() -> None:
    same = torch.ones(8, 1)
    assert retrieval_hits(same, same).sum() == 1


def test_objects_of_the_same_photo_do_not_vote() -> None:
    features = torch.ones(4, 1)
    categories = torch.tensor([0, 0, 1, 1])
    assert knn_hits(features, categories, torch.tensor([0, 0, 1, 1])).tolist() == [False] * 4
    assert knn_hits(features, categories, torch.tensor([0, 1, 2, 3]), neighbours=3).sum() == 0  # two others outvote one
    assert knn_hits(features, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)).sum() == 0


def test_nothing_at_all() -> None:
    none = torch.zeros(0, 3)
    numbers = torch.zeros(0, dtype=torch.int64)
    assert retrieval_hits(none, none).shape == (0,)
    assert knn_hits(none, numbers, numbers).shape == (0,)
    assert true_cells(torch.zeros(0, 4), torch.zeros(0, 4), 7).shape == (0, 49)
    assert cell_hits(torch.zeros(0, 3, 49), torch.zeros(0, 3, 49), torch.zeros(0, 49, dtype=torch.int64)).numel() == 0
