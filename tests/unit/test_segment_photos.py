from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from freesolo.errors import UsageError
from freesolo.inference.segment import SegmentPhotos
from freesolo.models.model_file import save_model
from freesolo.ops.images import pad_to_batch
from freesolo.settings import InferenceSettings, PredictSettings
from freesolo.solo.model import Segmenter
from freesolo.types import ImageBatch, Instances
from tests.small import small_solo

TINY = small_solo(num_categories=2, fpn_channels=32, embedding_channels=8, grid_sizes=(5, 4, 3, 2, 2))
# An untrained network says about 0.01 of every cell: all of them are taken.
EVERYTHING = InferenceSettings(min_category_score=0.0, min_score=0.0, max_instances=12)


def predict_settings(*, max_width: float = 1.0, inference: InferenceSettings = EVERYTHING) -> PredictSettings:
    return PredictSettings(short_side=64, long_side_max=100, batch_size=2, max_width=max_width, inference=inference)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(TINY).initialise(torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = [(70, 90), (40, 120), (71, 91), (1, 1), (130, 60), (70, 90)]
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def assert_equal(first: Instances, second: Instances) -> None:
    for field in fields(Instances):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert one.shape == other.shape, field.name
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        else:
            # Pixels at the threshold may fall on either side, as sums are ordered by batch size.
            assert (one == other).float().mean() > 0.999 or one.numel() == 0


def test_each_photo_gets_its_own_instances_at_its_own_size(segmenter: Segmenter, photos: list[np.ndarray]) -> None:
    found = SegmentPhotos(segmenter, predict_settings())(photos)
    assert [tuple(one.masks.shape[1:]) for one in found] == [photo.shape[:2] for photo in photos]
    assert all(len(one) > 0 for one in found)
    for one in found:
        assert one.scores.tolist() == sorted(one.scores.tolist(), reverse=True)
        assert one.masks.flatten(1).any(dim=1).all()


def test_a_photo_is_segmented_alike_whatever_it_comes_with(segmenter: Segmenter, photos: list[np.ndarray]) -> None:
    segment = SegmentPhotos(segmenter, predict_settings())
    together = segment(photos)
    alone = [segment([photo])[0] for photo in photos]
    for one, other in zip(together, alone, strict=True):
        assert_equal(one, other)
    # Were the order lost, photos of one size would have each other's instances.
    assert not torch.equal(together[0].masks, together[5].masks)


def test_a_photo_of_the_input_size_goes_in_as_it_is(segmenter: Segmenter) -> None:
    photo = np.random.default_rng(1).integers(0, 256, (64, 80, 3), np.uint8)
    segment = SegmentPhotos(segmenter, predict_settings())
    pixels, sizes = pad_to_batch([torch.from_numpy(photo).permute(2, 0, 1)], 32)
    assert tuple(pixels.shape) == (1, 3, 64, 96)
    (by_batch,) = segment.segment(ImageBatch(pixels, sizes, (7,)), [(64, 80)])
    assert_equal(segment([photo])[0], by_batch)


def test_no_photos_and_nothing_found_are_empty(segmenter: Segmenter, photos: list[np.ndarray]) -> None:
    assert SegmentPhotos(segmenter, predict_settings())([]) == []
    nothing = InferenceSettings(min_category_score=1.0)
    found = SegmentPhotos(segmenter, predict_settings(inference=nothing))(photos[:2])
    assert [len(one) for one in found] == [0, 0]
    assert [tuple(one.masks.shape) for one in found] == [(0, 70, 90), (0, 40, 120)]


def test_wide_masks_are_dropped(segmenter: Segmenter, photos: list[np.ndarray]) -> None:
    (everything,) = SegmentPhotos(segmenter, predict_settings())(photos[:1])
    columns = everything.masks.any(dim=1).sum(dim=1)
    limit = float((columns.float().median() - 0.5) / 90)  # below 1 where the median is the whole width
    (some,) = SegmentPhotos(segmenter, predict_settings(max_width=limit))(photos[:1])
    expected = everything[columns < limit * 90]
    assert 0 < len(expected) < len(everything)
    assert_equal(some, expected)


def test_the_network_is_put_in_evaluation_mode(segmenter: Segmenter, photos: list[np.ndarray]) -> None:
    segment = SegmentPhotos(segmenter, predict_settings())
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    segment(photos[:1])
    assert not segmenter.training
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


def test_a_model_file_gives_the_same_instances(segmenter: Segmenter, photos: list[np.ndarray], tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", "segmenter", TINY.model_dump(), segmenter.state_dict(), {})
    from_file = SegmentPhotos.from_file(tmp_path / "model.pt", predict_settings())(photos[:1])
    assert_equal(from_file[0], SegmentPhotos(segmenter, predict_settings())(photos[:1])[0])


def test_a_backbone_is_no_segmenter(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", "backbone", {"backbone": "resnet18"}, {}, {})
    with pytest.raises(UsageError, match="holds a backbone, and a segmenter is needed"):
        SegmentPhotos.from_file(tmp_path / "model.pt", predict_settings())
