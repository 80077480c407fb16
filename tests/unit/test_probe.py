"""A look at a pre-training: which photos it is taken of, and that it leaves no trace."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freesolo.data.crops import cut
from freesolo.data.pack import pack
from freesolo.data.probe_photos import ProbePhotos, read_probe_photos
from freesolo.data.shards import read_dataset_manifest
from freesolo.densecl.model import DenseCL
from freesolo.settings import (
    BoundsSettings,
    DenseCLModelSettings,
    LoopSettings,
    OptimizerSettings,
    ProbeSettings,
    ViewSettings,
)
from freesolo.train.learner import Learner
from freesolo.train.probe import Probe
from freesolo.train.tasks import DenseCLTraining

VIEWS = ViewSettings(size=32)
PHOTOS = 9


def photo(number: int) -> Image.Image:
    """Noise of a colour of its own, 60 x 48 px."""
    random = np.random.default_rng(number)
    colour, noise = random.integers(40, 216, size=3), random.integers(-40, 41, size=(48, 60, 3))
    return Image.fromarray((colour + noise).astype(np.uint8))


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Nine photos in shards of four; each has three objects of categories 5 and 9, of 30, 20 and 10 px."""
    folder = tmp_path_factory.mktemp("annotated")
    images, annotations = [], []
    for number in range(PHOTOS):
        photo(number).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 60, "height": 48})
        for side, category in ((10, 5), (30, 9), (20, 5)):
            box = [60 - side, 48 - side, side, side // 2]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box, "iscrowd": 0}
            )
    document = {"images": images, "annotations": annotations, "categories": [{"id": 9}, {"id": 5}]}
    (folder / "instances.json").write_text(json.dumps(document))
    pack(str(folder / "instances.json"), str(folder / "data"), images=str(folder), samples_per_shard=4)
    return str(folder / "data")


@pytest.fixture(scope="module")
def unannotated(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("unannotated")
    for number in range(3):
        photo(number).save(folder / f"{number}.png")
    pack(str(folder), str(folder / "data"))
    return str(folder / "data")


def read(url: str, *, seed: int = 0, bounds: BoundsSettings | None = None, **settings: int) -> ProbePhotos:
    return read_probe_photos(
        url,
        read_dataset_manifest(url),
        ProbeSettings(**{"picture_size": 64, **settings}),
        VIEWS,
        bounds=bounds or BoundsSettings(),
        seed=seed,
    )


def probe_learner(seed: int = 0) -> Learner:
    model = DenseCL(
        DenseCLModelSettings(backbone="resnet18", hidden_channels=16, projection_channels=8, queue_length=8)
    )
    model.initialise(torch.Generator().manual_seed(seed))
    task = DenseCLTraining(model, VIEWS)
    return Learner(task, LoopSettings(steps=1, batch_size=1), OptimizerSettings(learning_rate=0.1), torch.device("cpu"))


def test_the_same_photos_are_cut_the_same_way_each_time(annotated: str) -> None:
    first, second, other = read(annotated), read(annotated), read(annotated, seed=1)
    for field in fields(ProbePhotos):
        if field.name != "pictured":
            assert np.array_equal(getattr(first, field.name), getattr(second, field.name)), field.name
    for one, again in zip(first.pictured, second.pictured, strict=True):
        assert np.array_equal(one.pixels, again.pixels)
        assert one.points == again.points
    assert not np.array_equal(first.query_boxes_xywh, other.query_boxes_xywh)
    assert first.pictured[0].points != other.pictured[0].points


def test_fewer_photos_are_the_first_ones_and_more_are_all(annotated: str) -> None:
    few, all_of_them = read(annotated, photos=5), read(annotated, photos=100)
    assert len(few) == 5
    assert len(all_of_them) == PHOTOS
    assert np.array_equal(few.query, all_of_them.query[:5])


def test_crops_lie_where_their_boxes_say(annotated: str) -> None:
    photos = read(annotated)
    names = [each.file_name for each in photos.pictured]
    assert len(set(names)) == 4
    for number, name in enumerate(names):
        image = np.asarray(photo(int(name.removesuffix(".png"))))
        for crop, box in (
            (photos.query[number], photos.query_boxes_xywh[number]),
            (photos.key[number], photos.key_boxes_xywh[number]),
        ):
            x, y, width, height = (int(side) for side in box)
            assert np.array_equal(crop, cut(image, (x, y, width, height), 32))
        assert np.array_equal(photos.pictured[number].pixels, cut(image, (6, 0, 48, 48), 64))
        assert all(0 <= share < 1 for point in photos.pictured[number].points for share in point)


def test_the_largest_objects_are_cut_out_of_annotated_photos_only(annotated: str, unannotated: str) -> None:
    photos = read(annotated)
    assert photos.categories.tolist() == [1, 0] * PHOTOS  # COCO's 9 and 5
    assert photos.photos.tolist() == [number for number in range(PHOTOS) for _ in range(2)]
    image = np.asarray(photo(int(photos.pictured[0].file_name.removesuffix(".png"))))
    # 30 x 15 px at (30, 18): a square of 30 around its middle (45, 25.5), within the photo.
    assert np.array_equal(photos.objects[0], cut(image, (30, 10, 30, 30), 32))
    assert read(unannotated).objects.shape == (0, 32, 32, 3)


def test_what_cannot_be_read_is_told_and_left_out(
    annotated: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(read(annotated, bounds=BoundsSettings(max_pixels=100))) == 0
    assert "is left out: 60 x 48 pixels are more than bounds.max_pixels=100" in caplog.text
    shards = sorted(Path(annotated).iterdir())
    for file in shards:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damaged = tmp_path / "shard-000000.tar"
    damaged.write_bytes(damaged.read_bytes()[:700])
    assert len(read(str(tmp_path))) == PHOTOS - 4
    assert "shard-000000.tar: truncated" in caplog.text


def test_a_look_shows_numbers_and_a_picture(annotated: str, unannotated: str) -> None:
    look = Probe(read(annotated), VIEWS, seed=0).look(probe_learner(), None)
    assert set(look.metrics) == {
        "probe/retrieval_top1",
        "probe/cells_top1",
        "probe/knn_top1",
        "probe/knn_commonest",
    }
    assert all(0 <= value <= 1 for value in look.metrics.values())
    assert look.metrics["probe/knn_commonest"] == 0.5
    assert look.pictures["similarity"].shape[1] == 3 * (256 + 12) + 12
    unlabelled = Probe(read(unannotated), VIEWS, seed=0).look(probe_learner(), None)
    assert set(unlabelled.metrics) == {"probe/retrieval_top1", "probe/cells_top1"}


def test_views_that_are_equal_find_one_another(annotated: str) -> None:
    plain = ViewSettings(size=64, jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0)
    photos = read(annotated)
    equal = ProbePhotos(
        **{field.name: getattr(photos, field.name) for field in fields(ProbePhotos)}
        | {"key": photos.query, "key_boxes_xywh": photos.query_boxes_xywh}
    )
    metrics = Probe(equal, plain, seed=0).look(probe_learner(), None).metrics
    assert metrics["probe/retrieval_top1"] == metrics["probe/cells_top1"] == 1.0
    elsewhere = ProbePhotos(
        **{field.name: getattr(equal, field.name) for field in fields(ProbePhotos)}
        | {"key_boxes_xywh": equal.query_boxes_xywh + np.float32(1000)}
    )
    assert "probe/cells_top1" not in Probe(elsewhere, plain, seed=0).look(probe_learner(), None).metrics


@pytest.mark.parametrize("training", [True, False])
def test_a_look_is_repeatable_and_leaves_everything_as_it_was(unannotated: str, training: bool) -> None:
    learner = probe_learner()
    module = learner.task.module.train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    probe = Probe(read(unannotated), VIEWS, seed=0)
    first, second = probe.look(learner, None), probe.look(learner, None)
    assert first.metrics == second.metrics
    assert np.array_equal(first.pictures["similarity"], second.pictures["similarity"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(child.training == training for child in module.modules())
    assert torch.equal(torch.get_rng_state(), generator)
