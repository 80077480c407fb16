"""The colour operations and the erasing against slow twins: a pixel at a time, in Python's own arithmetic."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch

from freesolo.data.augment import contrastive_view, strong_view
from freesolo.data.colour import blend, gaussian_blur, shift_hue
from freesolo.ops.images import IMAGENET_MEAN, IMAGENET_STD
from freesolo.settings import SegmentationViewSettings, ViewSettings
from freesolo.types import ImageBatch

Image = list[list[list[float]]]  # rows of pixels of red, green, blue


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_lists(image: torch.Tensor) -> Image:
    return image.permute(1, 2, 0).tolist()


def luma(pixel: list[float]) -> float:
    return 0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def each(image: Image, function) -> Image:
    return [[[min(255.0, max(0.0, value)) for value in function(pixel)] for pixel in row] for row in image]


def brightness(image: Image, factor: float) -> Image:
    return each(image, lambda pixel: [factor * value for value in pixel])


def contrast(image: Image, factor: float) -> Image:
    grays = [luma(pixel) for row in image for pixel in row]
    mean = math.fsum(grays) / len(grays)
    return each(image, lambda pixel: [factor * value + (1 - factor) * mean for value in pixel])


def saturation(image: Image, factor: float) -> Image:
    return each(image, lambda pixel: [factor * value + (1 - factor) * luma(pixel) for value in pixel])


def hue(image: Image, turns: float) -> Image:
    def turn(pixel: list[float]) -> list[float]:
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
        return [255 * value for value in colorsys.hsv_to_rgb((h + turns) % 1.0, s, v)]

    return each(image, turn)


def gray(image: Image) -> Image:
    return each(image, lambda pixel: [luma(pixel)] * 3)


def blur(image: Image, sigma: float, radius: int) -> Image:
    """A mean over the pixels that the image has, weighted by their squared distance."""
    height, width = len(image), len(image[0])

    def at(row: int, column: int) -> list[float]:
        total, weights = [0.0, 0.0, 0.0], 0.0
        for i in range(max(0, row - radius), min(height, row + radius + 1)):
            for j in range(max(0, column - radius), min(width, column + radius + 1)):
                weight = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2))
                weights += weight
                total = [so_far + weight * value for so_far, value in zip(total, image[i][j], strict=True)]
        return [value / weights for value in total]

    return [[at(row, column) for column in range(width)] for row in range(height)]


def close(found: torch.Tensor, expected: Image, tolerance: float = 0.02) -> bool:
    return bool((found.permute(1, 2, 0) - torch.tensor(expected)).abs().max() < tolerance)


def noise_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (batch, 3, height, width), generator=seeded(seed), dtype=torch.uint8)


@pytest.mark.parametrize("factor", [0.2, 0.8, 1.0, 1.7])
def test_blends_equal_the_twins(factor):
    pixels = noise_images(1, 5, 7).float()
    inside = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    for twin, weights in (
        (brightness, (factor, 0.0, 0.0)),
        (contrast, (factor, 0.0, 1 - factor)),
        (saturation, (factor, 1 - factor, 0.0)),
    ):
        found = blend(pixels, inside, *torch.tensor(weights)[:, None])
        assert close(found[0], twin(as_lists(pixels[0]), factor))


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.07, 0.4])
def test_hue_equals_the_twin(turns):
    pixels = noise_images(2, 6, 6).float()
    found = shift_hue(pixels, torch.tensor([turns, -turns]))
    assert close(found[0], hue(as_lists(pixels[0]), turns))
    assert close(found[1], hue(as_lists(pixels[1]), -turns))


@pytest.mark.parametrize("radius", [1, 4])
def test_blur_equals_the_twin_in_images_of_several_sizes(radius):
    sizes, sigmas = [(9, 7), (4, 7), (1, 1), (9, 2)], [0.3, 1.0, 2.0, 1.3]
    pixels, inside = torch.zeros(4, 3, 9, 7), torch.zeros(4, 1, 9, 7, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes):
        pixels[image, :, :height, :width] = noise_images(1, height, width, seed=image)[0].float()
        inside[image, :, :height, :width] = True
    found = gaussian_blur(pixels, inside, torch.tensor(sigmas), radius)
    for image, (height, width) in enumerate(sizes):
        expected = blur(as_lists(pixels[image, :, :height, :width]), sigmas[image], radius)
        assert close(found[image, :, :height, :width], expected)
    assert (found * ~inside).abs().sum() == 0


def twin_of_a_view(pixels, settings: ViewSettings | SegmentationViewSettings, host: torch.Generator):
    """Every image by itself, from the same draws in the same order as the batched view makes them."""
    images = [as_lists(image.float()) for image in pixels]

    def fall_to(probability: float) -> list[int]:
        return [image for image, draw in enumerate(torch.rand(len(images), generator=host)) if draw < probability]

    jittered = fall_to(settings.jitter_probability)
    draws = {name: torch.rand(len(jittered), generator=host).tolist() for name in ("b", "c", "s", "h")}
    orders = torch.rand(len(jittered), 4, generator=host).argsort(dim=1).tolist()
    for place, image in enumerate(jittered):
        for operation in orders[place]:
            b, c, s, h = (draws[name][place] * 2 - 1 for name in ("b", "c", "s", "h"))
            step = [
                lambda x, b=b: brightness(x, 1 + settings.brightness * b),
                lambda x, c=c: contrast(x, 1 + settings.contrast * c),
                lambda x, s=s: saturation(x, 1 + settings.saturation * s),
                lambda x, h=h: hue(x, settings.hue * h),
            ][operation]
            images[image] = step(images[image])
    for image in fall_to(settings.grayscale_probability):
        images[image] = gray(images[image])
    blurred = fall_to(settings.blur_probability)
    low, high = settings.blur_sigma
    sigmas = (low + (high - low) * torch.rand(len(blurred), generator=host)).tolist()
    for image, sigma in zip(blurred, sigmas, strict=True):
        images[image] = blur(images[image], sigma, math.ceil(3 * high))
    return images, fall_to


@pytest.mark.parametrize("seed", [0, 1])
def test_contrastive_views_equal_the_twins(seed):
    pixels = noise_images(8, 6, 6, seed)
    settings = ViewSettings(grayscale_probability=0.4)
    found = contrastive_view(pixels, settings, seeded(seed))
    host = seeded(seed)
    images, fall_to = twin_of_a_view(pixels, settings, host)
    for image in fall_to(settings.flip_probability):
        images[image] = [row[::-1] for row in images[image]]
    for image, expected in zip(found, images, strict=True):
        normalised = [
            [[(v / 255 - m) / s for v, m, s in zip(pixel, IMAGENET_MEAN, IMAGENET_STD, strict=True)] for pixel in row]
            for row in expected
        ]
        assert close(image, normalised, 1e-3)


def test_strong_views_equal_the_twins_and_erase_the_twins_rectangles():
    sizes = [(9, 7), (6, 7), (8, 4), (1, 1), (9, 3)]
    pixels = torch.zeros(5, 3, 9, 7, dtype=torch.uint8)
    for image, (height, width) in enumerate(sizes):
        pixels[image, :, :height, :width] = noise_images(1, height, width, seed=image)[0]
    batch = ImageBatch(pixels, torch.tensor(sizes), tuple(range(5)))
    settings = SegmentationViewSettings(blur_probability=0.0, erasing_probabilities=(0.9, 0.9))
    found = strong_view(ImageBatch(pixels.float(), batch.sizes, batch.image_ids), settings, seeded(5)).pixels

    host = seeded(5)
    cropped = [pixels[image, :, :height, :width] for image, (height, width) in enumerate(sizes)]
    images, _ = twin_of_a_view(cropped, settings, host)
    rectangles = twin_rectangles(sizes, settings.erasing_probabilities, host)
    assert sum(len(of_image) for of_image in rectangles) >= 4
    for image, (height, width) in enumerate(sizes):
        for row in range(height):
            for column in range(width):
                erased = any(t <= row < b and lf <= column < r for t, lf, b, r in rectangles[image])
                pixel = found[image, :, row, column]
                if erased:
                    assert torch.equal(pixel, pixel.round())  # noise is whole
                else:
                    assert (pixel - torch.tensor(images[image][row][column])).abs().max() < 0.02


def twin_rectangles(sizes, probabilities, host):
    """Top, left, bottom and right of each image's rectangles: the first of ten tries that fits."""
    ranges = [((0.05, 0.2), (0.3, 3.3)), ((0.02, 0.2), (0.1, 6.0))]
    rectangles = [[] for _ in sizes]
    for probability, ((least, most), (flat, tall)) in zip(probabilities, ranges, strict=True):
        shares, aspects = torch.rand(len(sizes), 10, generator=host), torch.rand(len(sizes), 10, generator=host)
        downs, rights = torch.rand(2, len(sizes), 10, generator=host)
        wanted = torch.rand(len(sizes), generator=host) < probability
        for image, (height, width) in enumerate(sizes):
            for attempt in range(10):
                area = (least + (most - least) * shares[image, attempt].item()) * height * width
                aspect = math.exp(math.log(flat) + math.log(tall / flat) * aspects[image, attempt].item())
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if 0 < h < height and 0 < w < width:
                    top = math.floor(downs[image, attempt].item() * (height - h + 1))
                    left = math.floor(rights[image, attempt].item() * (width - w + 1))
                    if wanted[image]:
                        rectangles[image].append((top, left, top + h, left + w))
                    break
    return rectangles
