"""Fractions of labelled photos: nested, balanced, seeded, refused where a category would be left without an object."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from freesolo.config import TrainJob
from freesolo.config_file import parse_config
from freesolo.data.shards import (
    DatasetManifest,
    Sample,
    read_dataset_manifest,
    read_shard,
    shard_name,
    write_dataset_manifest,
    write_shard,
)
from freesolo.data.subset import (
    SubsetSource,
    choose_subset,
    finish_subset,
    finished_subset,
    part_of,
    photo_objects,
    rank_photos,
    subset_tasks,
    survey_shard,
    write_subset_shard,
)
from freesolo.errors import UsageError
from freesolo.settings import DEFAULT_BOUNDS, BoundsSettings
from freesolo.stages import StageFolder
from freesolo.train.segmentation import labels_url

CATEGORIES = (
    {"id": 18, "name": "dog"},
    {"id": 3, "name": "car"},
    {"id": 7, "name": "unicorn"},
)  # no photo has a unicorn
SIDE = 16

photos_of_categories = st.lists(st.lists(st.integers(1, 5), unique=True, max_size=3), min_size=1, max_size=40)


def ranked(categories: Sequence[Sequence[int]], seed: int = 0) -> list[int]:
    return rank_photos(photo_objects([10 * number for number in range(len(categories))], categories), seed).tolist()


def slow_rank(categories: Sequence[Sequence[int]], alone: dict[int | None, list[int]]) -> list[int]:
    """The definition, in exact fractions: again and again the category with the smallest share, and its next photo.

    Args:
        categories: Of each photo.
        alone: The photos of each category (None: of no object) in their seeded order.
    """
    order: list[int] = []
    while len(order) < len(categories):
        shares = {
            category: (
                Fraction(len(set(photos) & set(order)), len(photos)),
                category is None,
                len(photos),
                category or 0,
            )
            for category, photos in alone.items()
        }
        least = min(shares, key=lambda category: shares[category])
        order.append(next(photo for photo in alone[least] if photo not in order))
    return order


@given(photos_of_categories, st.integers(0, 3))
def test_the_rank_is_what_its_definition_says(categories: list[list[int]], seed: int) -> None:
    single = ranked([[1]] * len(categories), seed)  # of one category alone: the seeded order itself
    alone: dict[int | None, list[int]] = {}
    for photo in single:
        for category in categories[photo] or (None,):
            alone.setdefault(category, []).append(photo)
    assert ranked(categories, seed) == slow_rank(categories, alone)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=60), st.integers(0, 3))
def test_every_category_has_its_share_to_within_a_photo(category_of_photo: list[int], seed: int) -> None:
    """Of photos with one category each; None of the first n photos' shares is a photo off any other's."""
    order = ranked([[category] for category in category_of_photo], seed)
    totals = {category: category_of_photo.count(category) for category in category_of_photo}
    taken = dict.fromkeys(totals, 0)
    for photo in order:
        taken[category_of_photo[photo]] += 1
        for one, other in ((a, b) for a in totals for b in totals):
            assert Fraction(taken[one] - 1, totals[one]) <= Fraction(taken[other], totals[other])


@given(photos_of_categories, st.randoms(use_true_random=False))
def test_the_rank_is_of_the_photos_and_not_of_their_order(categories: list[list[int]], random: object) -> None:
    ids = list(range(100, 100 + len(categories)))
    shuffled = list(range(len(ids)))
    random.shuffle(shuffled)
    straight = [ids[photo] for photo in rank_photos(photo_objects(ids, categories), 0)]
    there = photo_objects([ids[photo] for photo in shuffled], [categories[photo] for photo in shuffled])
    assert [ids[shuffled[photo]] for photo in rank_photos(there, 0)] == straight
    assert sorted(straight) == ids


def test_seeds_differ() -> None:
    categories = [[1, 2], [1], [2], []] * 8
    assert ranked(categories, 0) == ranked(categories, 0)
    assert len({tuple(ranked(categories, seed)) for seed in range(5)}) == 5


def test_photos_without_objects_are_spread_evenly() -> None:
    """Of 40 photos 10 have none: of each run of 4 photos one, give or take one."""
    order = ranked([[1]] * 30 + [[]] * 10)
    for count in range(1, 41):
        assert abs(sum(photo >= 30 for photo in order[:count]) - count / 4) <= 1


@pytest.mark.parametrize(
    ("fraction", "whole", "part"),
    [(0.07, 100, 7), (0.05, 19, 1), (0.05, 21, 2), (1e-05, 7, 1), (1.0, 7, 7), (0.5, 0, 0)],
)
def test_a_fraction_is_rounded_up_as_it_is_written(fraction: float, whole: int, part: int) -> None:
    assert part_of(whole, fraction) == part


# --- of a data set --------------------------------------------------------------------------------------------------


def sample(image_id: int, *categories: int, size: int = SIDE, **changes: object) -> Sample:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (image_id % 250, 90, 40)).save(file, "JPEG")
    annotations = tuple(
        {"id": 10 * image_id + number, "image_id": image_id, "category_id": category, "bbox": [2.5, 3, 8, 7]} | changes
        for number, category in enumerate(categories)
    )
    return Sample(f"{image_id:012d}", file.getvalue(), image_id, f"folder/ü{image_id}.jpg", size, size, annotations)


def written(url: str, shards: Sequence[Sequence[Sample]]) -> DatasetManifest:
    infos = tuple(write_shard(url, shard_name(number), samples) for number, samples in enumerate(shards))
    manifest = DatasetManifest(1, infos, True, CATEGORIES, ())
    write_dataset_manifest(url, manifest)
    return manifest


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """30 photos in 4 shards, one of them empty: 20 of cars, 10 of dogs, of which 5 with a car, 5 of nothing."""
    samples = [sample(number, *([3] * (number % 6 < 4) + [18] * (number % 6 in (3, 4)))) for number in range(30)]
    url = str(tmp_path / "photos")
    written(url, [samples[:11], [], samples[11:20], samples[20:]])
    return url


def take(
    dataset: str, url: str, fraction: float, seed: int = 0, bounds: BoundsSettings = DEFAULT_BOUNDS
) -> DatasetManifest:
    """What `ingest.choose_subsets_on_cluster` and `write_subset_on_cluster` do, without a cluster."""
    manifest = read_dataset_manifest(dataset)
    surveys = [survey_shard(dataset, shard, manifest.categories, bounds) for shard in manifest.shards]
    subset = choose_subset(dataset, manifest, surveys, SubsetSource(manifest.digest, fraction, seed))
    return finish_subset(
        subset, url, [write_subset_shard(task) for task in reversed(subset_tasks(subset, url, bounds))]
    )


def samples_of(url: str) -> list[Sample]:
    return [sample for shard in read_dataset_manifest(url).shards for sample in read_shard(url, shard)]


def test_a_subset_is_a_data_set_of_the_same_samples_in_their_order(dataset: str, tmp_path: Path) -> None:
    manifest = take(dataset, str(tmp_path / "half"), 0.5)
    assert manifest.samples == 15
    assert manifest.annotated
    assert manifest.categories == CATEGORIES
    assert len(manifest.shards) == 1  # of few samples one shard is enough
    taken = {sample.image_id for sample in samples_of(str(tmp_path / "half"))}
    assert samples_of(str(tmp_path / "half")) == [one for one in samples_of(dataset) if one.image_id in taken]
    of = [{each["category_id"] for each in one.annotations} for one in samples_of(str(tmp_path / "half"))]
    assert sum(3 in kinds for kinds in of) == 10
    assert sum(18 in kinds for kinds in of) in (5, 6)
    assert sum(not kinds for kinds in of) in (2, 3)


def test_the_bytes_are_those_of_packing_the_same_samples(dataset: str, tmp_path: Path) -> None:
    url = str(tmp_path / "half")
    take(dataset, url, 0.5)
    again = write_shard(str(tmp_path / "twin"), shard_name(0), samples_of(url))
    assert read_dataset_manifest(url).shards == (again,)
    take(dataset, str(tmp_path / "again"), 0.5)
    assert read_dataset_manifest(str(tmp_path / "again")).digest == read_dataset_manifest(url).digest


@given(st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_a_larger_fraction_contains_a_smaller_one(one: float, other: float) -> None:
    small, large = sorted((one, other))
    order = ranked([[1 + number % 3] for number in range(50)])
    assert set(order[: part_of(50, small)]) <= set(order[: part_of(50, large)])


def test_a_fraction_of_a_data_set_contains_a_smaller_one(dataset: str, tmp_path: Path) -> None:
    kept: list[set[int]] = []
    for fraction in (0.07, 0.2, 0.5, 1.0):
        take(dataset, str(tmp_path / str(fraction)), fraction)
        kept.append({sample.image_id for sample in samples_of(str(tmp_path / str(fraction)))})
    assert [len(ids) for ids in kept] == [3, 6, 15, 30]
    assert all(small < large for small, large in itertools.pairwise(kept))


def test_a_fraction_that_leaves_a_category_empty_is_refused(tmp_path: Path) -> None:
    """It says which, and a fraction that is accepted; a category of no photo at all asks for nothing."""
    url = str(tmp_path / "photos")
    written(url, [[sample(number, 3 if number else 18) for number in range(30)]])
    with pytest.raises(
        UsageError,
        match=r"photos: a fraction of 0.03 is 1 of its 30 photos, which leaves 1 of 2 categories without an object: "
        r"(car|dog); 0.06 of them \(2 photos\) would do",
    ):
        take(url, str(tmp_path / "few"), 0.03)
    assert not (tmp_path / "few").exists()
    assert take(url, str(tmp_path / "enough"), 0.06).samples == 2


def test_crowds_and_empty_masks_are_no_objects(tmp_path: Path) -> None:
    url = str(tmp_path / "photos")
    flat = {"segmentation": {"size": [SIDE, SIDE], "counts": [SIDE * SIDE]}}
    written(url, [[sample(1, 3, iscrowd=1), sample(2, 3, **flat), sample(3, 18)]])
    survey = survey_shard(url, read_dataset_manifest(url).shards[0], CATEGORIES, DEFAULT_BOUNDS)
    assert survey.objects.of_photo() == [[], [], [18]]
    nothing = str(tmp_path / "nothing")
    written(nothing, [[sample(1, 3, iscrowd=1), sample(2)]])
    with pytest.raises(UsageError, match=r"nothing: none of its photos has an annotated object"):
        take(nothing, str(tmp_path / "half"), 0.5)


def test_a_photo_over_the_bounds_is_in_no_fraction_and_told(tmp_path: Path) -> None:
    url = str(tmp_path / "photos")
    written(url, [[sample(1, 3), sample(2, 3, size=100), sample(3, 18)]])
    manifest = take(url, str(tmp_path / "all"), 1.0, bounds=BoundsSettings(max_pixels=99 * 99))
    assert [one.image_id for one in samples_of(str(tmp_path / "all"))] == [1, 3]
    assert [photo.file_name for photo in manifest.skipped] == ["folder/ü2.jpg"]
    assert "bounds.max_pixels" in manifest.skipped[0].reason


def test_a_photo_whose_annotations_are_damaged_is_in_no_fraction_and_told(tmp_path: Path) -> None:
    """It is not one without objects: what is in it is not known."""
    url = str(tmp_path / "photos")
    damaged = sample(2, 3, segmentation=[[1] * 7])
    written(url, [[sample(1, 3), damaged, sample(3, 18), sample(4), sample(5, 99)]])
    manifest = take(url, str(tmp_path / "all"), 1.0)
    assert [one.image_id for one in samples_of(str(tmp_path / "all"))] == [1, 3, 4]
    assert [photo.file_name for photo in manifest.skipped] == ["folder/ü2.jpg", "folder/ü5.jpg"]
    assert manifest.skipped[0].reason.startswith("annotation 20 is damaged")
    assert manifest.skipped[1].reason == "annotation 50 has no known category: 99"


def test_shards_of_which_little_is_taken_become_one(tmp_path: Path) -> None:
    url = str(tmp_path / "photos")
    written(url, [[sample(100 * shard + number, 3) for number in range(100)] for shard in range(8)])
    halves = take(url, str(tmp_path / "half"), 0.75)
    assert halves.samples == 600
    assert all(shard.samples >= 256 for shard in halves.shards[:-1])
    assert len(halves.shards) == 2 or halves.shards[-1].samples < 256


def test_a_finished_subset_is_found_and_another_one_is_refused(dataset: str, tmp_path: Path) -> None:
    url, digest = str(tmp_path / "half"), read_dataset_manifest(dataset).digest
    source = SubsetSource(digest, 0.5, 0)
    assert finished_subset(url, source) is None
    manifest = take(dataset, url, 0.5)
    assert finished_subset(url, source) == manifest
    with pytest.raises(
        UsageError, match=r"half: a subset of something else: seed: 0, now 1; choose another --run-name"
    ):
        finished_subset(url, SubsetSource(digest, 0.5, 1))
    with pytest.raises(UsageError, match=r"photos: a data set that is no subset"):
        finished_subset(dataset, source)
    Path(url, "manifest.json").unlink()
    assert finished_subset(url, source) is None, "half of a subset is none"


def test_a_run_keeps_each_fraction_in_a_folder_of_its_own() -> None:
    """A sweep may be over data sets, fractions and seeds."""
    folder, sources = StageFolder("storage", "run", "train"), itertools.product("ab", (0.05, 0.1), (0, 1))
    urls = [labels_url(folder, SubsetSource(digest * 64, fraction, seed)) for digest, fraction, seed in sources]
    assert urls[0] == "storage/run/labelled-aaaaaaaa-0.05-seed-0"
    assert len(set(urls)) == 8


def test_a_fraction_is_of_annotations_and_not_of_a_label_set() -> None:
    raw = {"dataset": "data", "train": {"loop": {"steps": 1, "batch_size": 1}}}
    assert parse_config(TrainJob, raw | {"label_fraction": 0.05}, source="x").label_fraction == 0.05
    with pytest.raises(
        UsageError, match=r"label_fraction=0.05: a fraction is of a data set's own annotations, not of .*/l;"
    ):
        parse_config(TrainJob, raw | {"label_fraction": 0.05, "labels": "l"}, source="x")
    for wrong in (0, 1.5):
        with pytest.raises(UsageError, match=rf"label_fraction={wrong}: input should be"):
            parse_config(TrainJob, raw | {"label_fraction": wrong}, source="x")


def test_a_large_data_set_is_ranked_in_seconds() -> None:
    """A sixth of COCO's photos, of as many categories."""
    random = np.random.default_rng(0)
    categories = [random.choice(80, random.integers(0, 5), replace=False).tolist() for _ in range(20_000)]
    assert sorted(ranked(categories)) == list(range(20_000))
