"""Sizes, padding and normalisation."""

import pytest
import torch

from freesolo.ops.images import IMAGENET_MEAN, IMAGENET_STD, normalize, pad_to_batch
from freesolo.ops.sizes import resized_size


def test_normalize_takes_the_mean_to_zero_and_one_deviation_to_one():
    mean, deviation = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    pixels = torch.stack((255 * mean, 255 * (mean + deviation)))[:, :, None, None]
    expected = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 1, 1)
    torch.testing.assert_close(normalize(pixels), expected)


def test_normalize_takes_bytes_and_single_images():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None].expand(3, 2, 4)
    normalized = normalize(pixels)
    assert normalized.shape == (3, 2, 4)
    assert normalized.dtype == torch.float32
    expected = [-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(normalized[:, 0, 0], torch.tensor(expected))
    assert normalize(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        (640, 480, (1067, 800)),
        (600, 600, (800, 800)),
        (427, 640, (800, 1199)),  # 1199.06
        (300, 600, (667, 1333)),  # the long side rules: 300 * 1333 / 600 = 666.5, rounded up
        (10, 1000, (13, 1333)),
        (1, 100_000, (1, 1333)),  # never below one pixel
        (800, 1333, (800, 1333)),
    ],
)
def test_resized_size(height: int, width: int, expected: tuple[int, int]):
    assert resized_size(height, width, 800, 1333) == expected


def test_resized_size_never_exceeds_the_long_side():
    for height in range(1, 60, 7):
        for width in range(1, 200, 3):
            new_height, new_width = resized_size(height, width, 64, 100)
            assert max(new_height, new_width) <= 100
            assert min(new_height, new_width) <= 64


def test_resized_size_refuses_nothing():
    with pytest.raises(ValueError, match="positive"):
        resized_size(0, 10, 800, 1333)


def test_pad_to_batch_pads_right_and_bottom():
    first, second = torch.full((3, 5, 9), 7, dtype=torch.uint8), torch.full((3, 8, 3), 9, dtype=torch.uint8)
    pixels, sizes = pad_to_batch([first, second], 4)
    assert pixels.shape == (2, 3, 8, 12)
    assert pixels.dtype == torch.uint8
    assert sizes.tolist() == [[5, 9], [8, 3]]
    assert torch.equal(pixels[0, :, :5, :9], first)
    assert torch.equal(pixels[1, :, :8, :3], second)
    assert pixels.sum() == first.sum() + second.sum()  # the rest is 0


def test_pad_to_batch_leaves_whole_multiples_alone():
    image = torch.rand(3, 32, 64)
    pixels, sizes = pad_to_batch([image], 32)
    assert torch.equal(pixels[0], image)
    assert sizes.tolist() == [[32, 64]]


def test_pad_to_batch_refuses_no_images_and_mixed_types():
    with pytest.raises(ValueError, match="at least one"):
        pad_to_batch([], 32)
    with pytest.raises(ValueError, match="several types"):
        pad_to_batch([torch.zeros(3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.uint8)], 32)
