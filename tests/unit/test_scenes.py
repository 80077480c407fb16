"""Composite scenes: reproducible, with masks that are exactly what is seen, of objects that stand out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from freesolo.data import files
from freesolo.data.coco import ground_truth
from freesolo.data.cutouts import HORSE, OBJECTS
from freesolo.data.pack import pack
from freesolo.data.photos import decode_photo, file_extension
from freesolo.data.scenes import compose_scenes, demo_photos
from freesolo.errors import UsageError

SIZE = 96


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    assert compose_scenes(str(folder), 30, SIZE, seed=3) == str(folder / "annotations.json")
    return folder


def document(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    return read


def masks_by_image(read: dict[str, Any]) -> dict[int, list[np.ndarray]]:
    masks: dict[int, list[np.ndarray]] = {image["id"]: [] for image in read["images"]}
    for annotation in read["annotations"]:
        masks[annotation["image_id"]].append(coco_mask.decode(annotation["segmentation"]).astype(bool))
    return masks


def pixels(folder: Path, image_id: int) -> np.ndarray:
    return decode_photo((folder / "images" / f"{image_id:06d}.jpg").read_bytes())


def test_every_scene_has_its_picture_and_one_to_six_objects(scenes: Path) -> None:
    read = document(scenes)
    assert [image["id"] for image in read["images"]] == list(range(1, 31))
    assert [category["name"] for category in read["categories"]] == ["object"]
    counts = [len(masks) for masks in masks_by_image(read).values()]
    assert min(counts) >= 1
    assert max(counts) <= 6
    assert len(set(counts)) >= 4
    for image in read["images"]:
        assert pixels(scenes, image["id"]).shape == (SIZE, SIZE, 3) == (image["height"], image["width"], 3)
    assert len(files.list_files(str(scenes))) == 31


def test_masks_are_what_is_seen_once(scenes: Path) -> None:
    overlapping_boxes = 0
    for masks in masks_by_image(document(scenes)).values():
        assert np.sum(masks, axis=0).max() == 1  # no pixel belongs to two objects
        for mask in masks:
            assert mask.shape == (SIZE, SIZE)
            assert mask.mean() > 0.002
            assert mask.mean() < 0.6
        boxes = [(rows.min(), rows.max(), cols.min(), cols.max()) for rows, cols in map(np.nonzero, masks)]
        for i, (top, bottom, left, right) in enumerate(boxes):
            for low, high, west, east in boxes[:i]:
                overlapping_boxes += top <= high and low <= bottom and left <= east and west <= right
    assert overlapping_boxes > 10  # objects do lie over one another


def test_annotations_agree_with_their_masks(scenes: Path) -> None:
    read = document(scenes)
    assert [annotation["id"] for annotation in read["annotations"]] == list(range(1, len(read["annotations"]) + 1))
    for annotation in read["annotations"]:
        rows, columns = np.nonzero(coco_mask.decode(annotation["segmentation"]))
        assert annotation["area"] == len(rows)
        assert annotation["bbox"] == [
            columns.min(),
            rows.min(),
            columns.max() - columns.min() + 1,
            rows.max() - rows.min() + 1,
        ]
        assert (annotation["category_id"], annotation["iscrowd"]) == (1, 0)


def test_objects_are_in_the_picture_where_their_masks_are(scenes: Path) -> None:
    """Colours change more across a mask's edge than across the same edge moved somewhere else."""
    across, elsewhere = [], []
    for image_id, masks in masks_by_image(document(scenes)).items():
        picture = pixels(scenes, image_id).astype(float)
        steps = np.abs(np.diff(picture, axis=1)).sum(axis=2)
        for mask in masks:
            edge = np.diff(mask, axis=1)
            if edge.any():
                across.append(steps[edge].mean())
                elsewhere.append(steps[np.roll(edge, SIZE // 3, axis=0)].mean())
    assert np.mean(across) > 2 * np.mean(elsewhere)


def test_an_object_is_of_another_colour_than_what_it_lies_on(tmp_path: Path) -> None:
    compose_scenes(str(tmp_path), 60, 64, seed=5, max_objects=1)
    for image_id, (mask,) in masks_by_image(document(tmp_path)).items():
        picture = pixels(tmp_path, image_id).astype(float)
        # 55 where it is laid; shadows and the rest of the background take a little of it.
        assert np.linalg.norm(picture[mask].mean(axis=0) - picture[~mask].mean(axis=0)) > 40


def test_the_same_seed_gives_the_same_bytes(scenes: Path, tmp_path: Path) -> None:
    compose_scenes(str(tmp_path / "again"), 30, SIZE, seed=3)
    for name in files.list_files(str(scenes)):
        assert (tmp_path / "again" / name).read_bytes() == (scenes / name).read_bytes()


def test_a_smaller_set_is_the_start_of_a_larger_one(scenes: Path, tmp_path: Path) -> None:
    compose_scenes(str(tmp_path), 2, SIZE, seed=3)
    for number in (1, 2):
        name = f"images/{number:06d}.jpg"
        assert (tmp_path / name).read_bytes() == (scenes / name).read_bytes()
    few = document(tmp_path)["annotations"]
    assert few == document(scenes)["annotations"][: len(few)]


def test_seeds_differ_and_so_do_scenes(scenes: Path, tmp_path: Path) -> None:
    compose_scenes(str(tmp_path), 2, SIZE, seed=4)
    pictures = [pixels(scenes, 1), pixels(scenes, 2), pixels(tmp_path, 1), pixels(tmp_path, 2)]
    for i, picture in enumerate(pictures):
        for other in pictures[:i]:
            assert (picture != other).any()


def test_numbers_of_objects_can_be_asked_for(tmp_path: Path) -> None:
    compose_scenes(str(tmp_path), 8, SIZE, min_objects=1, max_objects=1)
    assert {len(masks) for masks in masks_by_image(document(tmp_path)).values()} == {1}


def test_scenes_can_be_packed(scenes: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "dataset")
    manifest = pack(str(scenes / "annotations.json"), target, samples_per_shard=10)
    assert (manifest.samples, manifest.annotated, manifest.skipped) == (30, True, ())
    assert ground_truth(target)["annotations"] == document(scenes)["annotations"]


def test_no_scenes_at_all(tmp_path: Path) -> None:
    compose_scenes(str(tmp_path), 0)
    assert document(tmp_path)["images"] == []


def test_demo_photos_are_photographs() -> None:
    photos = demo_photos()
    assert len(photos) >= 6
    assert [name for name, _ in photos] == sorted(name for name, _ in photos)
    for name, data in photos:
        assert name.endswith(file_extension(data))
        assert min(decode_photo(data).shape[:2]) >= 250


def test_outlines_enclose_something() -> None:
    for outline in (*OBJECTS.values(), HORSE):
        corners = np.array(outline.corners)
        assert len(corners) >= 10
        x, y = corners.T
        assert abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 > 700  # the shoelace formula


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install freesolo\[demo\]"):
        compose_scenes(str(tmp_path), 1)
    with pytest.raises(UsageError, match=r"pip install freesolo\[demo\]"):
        demo_photos()
