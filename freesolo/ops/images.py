"""Image arithmetic: padding, and the normalisation that backbones expect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(pixels: Shaped[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 H W"]:
    """RGB in 0..255, of any type, with ImageNet's mean and standard deviation taken out; float32.

    The constants are numbers of Python, not tensors: sending a tensor to the device would wait for it.
    """
    channels = zip(pixels.unbind(dim=-3), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel.float() - 255.0 * mean) / (255.0 * std) for channel, mean, std in channels], dim=-3)


def pad_to_batch(
    images: Sequence[Shaped[Tensor, "3 _ _"]], divisor: int
) -> tuple[Shaped[Tensor, "B 3 H W"], Int64[Tensor, "B 2"]]:
    """Stack images of several sizes, padded with 0 at the right and bottom to one extent.

    `ImageBatch(*pad_to_batch(images, 32), image_ids)` makes the record.

    Args:
        images: At least one, all of one type and device.
        divisor: The extent's height and width become multiples of it.

    Returns:
        Pixels of the images' type, and the height and width of each image before padding.

    Raises:
        ValueError: If there are no images, or they differ in type.
    """
    if not images:
        raise ValueError("a batch needs at least one image")
    if len({image.dtype for image in images}) > 1:
        raise ValueError(f"images of several types: {sorted({str(image.dtype) for image in images})}")
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    pixels = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(pixels, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return pixels, torch.tensor(sizes, dtype=torch.int64, device=pixels.device)
