"""Inputs that resemble photos and the objects in them, made from a seed."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

from freesolo.types import ImageBatch, Instances, SegmentationBatch


def smooth_noise(
    channels: int, height: int, width: int, generator: torch.Generator, *, cells: int, roughness: float
) -> Float[Tensor, "C H W"]:
    """Normal noise of `cells` x `cells` patches that melt into one another, with pixelwise noise of `roughness`."""
    coarse = torch.randn(1, channels, cells, cells, generator=generator)
    smooth = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
    return smooth + roughness * torch.randn(channels, height, width, generator=generator)


def photo(height: int, width: int, generator: torch.Generator) -> UInt8[Tensor, "3 H W"]:
    """Areas of colour with a little grain: some neighbours are alike, some are not."""
    noise = smooth_noise(3, height, width, generator, cells=12, roughness=0.05)
    return (128 + 50 * noise).clamp(0, 255).byte()


def ellipses(
    count: int, height: int, width: int, generator: torch.Generator, *, smallest: float, largest: float
) -> Bool[Tensor, "N H W"]:
    """Objects whose sides are spread evenly in their logarithm from `smallest` to `largest` px, wholly inside.

    Raises:
        ValueError: If the largest does not fit.
    """
    if largest > min(height, width):
        raise ValueError(f"an object of {largest} px does not fit into {height} x {width}")
    sides = smallest * (largest / smallest) ** torch.rand(count, 2, generator=generator)
    extent = torch.tensor([height, width])
    centres = sides / 2 + torch.rand(count, 2, generator=generator) * (extent - sides)
    return _draw(sides, centres, height, width)


def segmentation_batch(
    images: int,
    instances: int,
    photo_size: tuple[int, int],
    generator: torch.Generator,
    *,
    padded_width: int,
    smallest: float,
    largest: float,
    embedding_channels: int,
) -> SegmentationBatch:
    """Photos of one size with as many objects in each, as the training stream gives them, on the CPU.

    Args:
        images: Of the batch.
        instances: In each image.
        photo_size: Height and width in px.
        generator: Of everything random in it.
        padded_width: Of the batch's extent, in px.
        smallest: Least side of an object, in px.
        largest: Greatest side of an object, in px.
        embedding_channels: Of the objects' embeddings.
    """
    height, width = photo_size
    count = images * instances
    pixels = torch.zeros(images, 3, height, padded_width, dtype=torch.uint8)
    masks = torch.zeros(count, height, padded_width, dtype=torch.bool)
    for image in range(images):
        pixels[image, :, :, :width] = photo(height, width, generator)
    masks[:, :, :width] = ellipses(count, height, width, generator, smallest=smallest, largest=largest)
    return SegmentationBatch(
        images=ImageBatch(pixels, torch.tensor([[height, width]] * images), tuple(range(images))),
        instances=Instances(
            image_index=torch.arange(images).repeat_interleave(instances),
            masks=masks,
            category_ids=torch.zeros(count, dtype=torch.int64),
            scores=torch.ones(count),
            embeddings=functional.normalize(torch.randn(count, embedding_channels, generator=generator), dim=1),
        ),
    )


def crowded_ellipses(
    objects: int, masks_per_object: int, height: int, width: int, generator: torch.Generator
) -> Bool[Tensor, "N H W"]:
    """What a detector says of a few objects: many masks of each that nearly agree, in no order."""
    count = objects * masks_per_object
    extent = torch.tensor([height, width])
    sides = (extent * (0.1 + 0.4 * torch.rand(objects, 2, generator=generator))).repeat(masks_per_object, 1)
    centres = (extent * torch.rand(objects, 2, generator=generator)).repeat(masks_per_object, 1)
    centres = centres + 0.1 * sides * torch.randn(count, 2, generator=generator)
    sides = sides * torch.exp(0.1 * torch.randn(count, 2, generator=generator))
    return _draw(sides, centres, height, width)[torch.randperm(count, generator=generator)]


def _draw(sides: Float[Tensor, "N 2"], centres: Float[Tensor, "N 2"], height: int, width: int) -> Tensor:
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    down = (rows - centres[:, :1]) / (sides[:, :1] / 2)
    across = (columns - centres[:, 1:]) / (sides[:, 1:] / 2)
    return torch.stack([d.square()[:, None] + a.square() <= 1 for d, a in zip(down, across, strict=True)])
