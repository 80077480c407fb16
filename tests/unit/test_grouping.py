"""Groups and nearest objects by embedding: hand-made directions, a slow twin, and what every grouping must satisfy."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freesolo.grouping import group_embeddings, nearest_objects


def towards(*degrees: float) -> np.ndarray:
    """Embeddings of two channels that point there, as a label set stores them."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)


def as_lists(groups: tuple[np.ndarray, ...]) -> list[list[int]]:
    return [group.tolist() for group in groups]


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """By the definition, number by number."""
    product = sum(float(a) * float(b) for a, b in zip(first, second, strict=True))
    lengths = [math.sqrt(sum(float(a) ** 2 for a in each)) for each in (first, second)]
    return product / (lengths[0] * lengths[1]) if all(lengths) else 0.0


# --- groups ---------------------------------------------------------------------------------------------------------


def test_separate_directions_are_groups_largest_first_and_most_central_first() -> None:
    # Around 0: 350, 0, 4 (mean about 358), so 0, then 4, then 350. Around 90: 88 and 92 are equally central.
    assert as_lists(group_embeddings(towards(88, 350, 180, 0, 92, 4), 3)) == [[3, 5, 1], [0, 4], [2]]


def test_only_the_direction_of_an_embedding_counts() -> None:
    lengths = np.array([[1.0], [20.0], [0.25], [7.0]])
    assert as_lists(group_embeddings(towards(0, 90, 1, 91) * lengths, 2)) == [[0, 2], [1, 3]]


def test_clouds_in_many_channels_come_out_whole() -> None:
    """Five clouds of 20 to 100 objects about axes of 64 channels, shuffled, each found without one stray."""
    random = np.random.default_rng(1)
    truth = random.permutation(np.repeat(np.arange(5), (100, 80, 60, 40, 20)))
    embeddings = (np.eye(64)[truth] + 0.05 * random.standard_normal((300, 64))).astype(np.float16)
    groups = group_embeddings(embeddings, 5)
    assert [sorted(group.tolist()) for group in groups] == [np.flatnonzero(truth == n).tolist() for n in range(5)]
    for group in groups:
        directions = [embeddings[n] / np.linalg.norm(embeddings[n].astype(np.float64)) for n in group]
        centre = sum(directions) / len(directions)
        likeness = [cosine(embeddings[n], centre) for n in group]
        assert likeness == pytest.approx(sorted(likeness, reverse=True), abs=1e-3)  # float16's precision


def test_there_are_no_more_groups_than_different_embeddings() -> None:
    assert as_lists(group_embeddings(towards(30, 30, 200, 30), 12)) == [[0, 1, 3], [2]]
    assert as_lists(group_embeddings(towards(45, 45, 45), 2)) == [[0, 1, 2]]
    assert as_lists(group_embeddings(towards(45), 12)) == [[0]]


def test_nothing_is_no_group_and_objects_without_embeddings_are_one() -> None:
    assert group_embeddings(np.zeros((0, 8), np.float16), 3) == ()
    assert group_embeddings(np.zeros((0, 0), np.float16), 3) == ()
    assert as_lists(group_embeddings(np.zeros((3, 0), np.float16), 2)) == [[0, 1, 2]]
    # Zeros, as a model may give, are a direction of their own: none.
    assert as_lists(group_embeddings(np.concatenate([towards(0, 1), np.zeros((3, 2))]), 2)) == [[2, 3, 4], [0, 1]]


def test_fewer_than_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match="0 groups: ask for at least one"):
        group_embeddings(towards(0), 0)


@settings(max_examples=25)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_every_object_is_in_one_group_and_a_seed_says_which(
    objects: int, channels: int, groups: int, seed: int, few_values: bool
) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(-1, 2, (objects, channels)) if few_values else random.standard_normal((objects, channels))
    embeddings = values.astype(np.float16)
    found = as_lists(group_embeddings(embeddings, groups, seed=seed))
    assert sorted(n for group in found for n in group) == list(range(objects))
    assert len(found) <= groups
    assert all(found)
    assert [len(group) for group in found] == sorted((len(group) for group in found), reverse=True)
    assert as_lists(group_embeddings(embeddings, groups, seed=seed)) == found


# --- nearest --------------------------------------------------------------------------------------------------------


def test_the_nearest_are_the_most_alike_without_the_object_itself() -> None:
    nearest, cosines = nearest_objects(towards(0, 90, 60, 10, 180), np.array([0, 4]), 2)
    assert nearest.tolist() == [[3, 2], [1, 2]]  # 10 and 60 degrees away; 90 and 120
    expected = np.cos(np.deg2rad([[10, 60], [90, 120]]))
    np.testing.assert_allclose(cosines, expected, atol=1e-3)


def test_the_nearest_are_those_of_a_slow_search() -> None:
    embeddings = np.random.default_rng(3).standard_normal((50, 12)).astype(np.float16)
    asked = [7, 0, 49, 20]
    nearest, cosines = nearest_objects(embeddings, np.array(asked), 6)
    for row, n in enumerate(asked):
        others = sorted((-cosine(embeddings[n], embeddings[m]), m) for m in range(50) if m != n)[:6]
        assert nearest[row].tolist() == [m for _, m in others]
        np.testing.assert_allclose(cosines[row], [-likeness for likeness, _ in others], atol=1e-8)


def test_of_equally_alike_ones_the_first_is_nearest_and_there_may_be_few() -> None:
    nearest, cosines = nearest_objects(towards(20, 20, 20), np.array([1]), 8)
    assert nearest.tolist() == [[0, 2]]
    assert cosines.tolist() == [[1.0, 1.0]]
    assert nearest_objects(towards(20), np.array([0]), 3)[0].shape == (1, 0)
    assert nearest_objects(towards(20, 30), np.zeros(0, np.int64), 3)[0].shape == (0, 1)
    assert nearest_objects(np.zeros((0, 4), np.float16), np.zeros(0, np.int64), 3)[0].shape == (0, 0)
    zeros = nearest_objects(np.zeros((3, 2), np.float16), np.array([2]), 2)
    assert (zeros[0].tolist(), zeros[1].tolist()) == ([[0, 1]], [[0.0, 0.0]])


def test_scikit_learn_is_loaded_by_whom_it_groups_for_alone() -> None:
    code = "import sys, freesolo.grouping; print({'sklearn', 'scipy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
