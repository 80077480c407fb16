"""Colour operations on batches of images, each image with its own strength. Pure; on any device.

Pixels are RGB in 0..255, float, `(B, 3, H, W)`. Definitions are torchvision's, computed without rounding in between.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

_LUMA = (0.2989, 0.587, 0.114)


def grayscale(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    """The images' brightness (ITU-R 601 weights)."""
    red, green, blue = pixels.unbind(dim=1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def blend(
    pixels: Float[Tensor, "B 3 H W"],
    inside: Bool[Tensor, "B 1 H W"],
    own: Float[Tensor, " B"],
    gray: Float[Tensor, " B"],
    mean_gray: Float[Tensor, " B"],
) -> Float[Tensor, "B 3 H W"]:
    """A weighted sum of each image, its grayscale and its mean gray, cut to 0..255.

    Brightness by f is (f, 0, 0), saturation (f, 1 - f, 0), contrast (f, 0, 1 - f), nothing (1, 0, 0): one pass makes
    any of them on each image of a batch.

    Args:
        pixels: In 0..255.
        inside: False in the padding, which does not count in the mean.
        own: Weights of the images.
        gray: Weights of their grayscales.
        mean_gray: Weights of the means of their grayscales.
    """
    luma = grayscale(pixels)
    mean = (luma * inside).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3)).clamp(min=1)
    mixed = _by_image(own) * pixels + _by_image(gray) * luma + _by_image(mean_gray * mean)
    return mixed.clamp(0.0, 255.0)


def shift_hue(pixels: Float[Tensor, "B 3 H W"], turns: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """Turn the hue (of HSV) of each image; saturation and value stay.

    Args:
        pixels: In 0..255.
        turns: In whole turns of the colour circle: 1/3 makes red green.
    """
    red, green, blue = pixels.unbind(dim=1)
    value, chroma = pixels.amax(dim=1), pixels.amax(dim=1) - pixels.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1.0)  # a gray pixel has no hue, and no chroma to show any
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    turned = sector + 6.0 * turns[:, None, None]
    channels = []
    for offset in (5.0, 3.0, 1.0):
        distance = (turned + offset).remainder(6.0)
        channels.append(value - chroma * torch.minimum(distance, 4.0 - distance).clamp(0.0, 1.0))
    return torch.stack(channels, dim=1)


def gaussian_blur(
    pixels: Float[Tensor, "B 3 H W"], inside: Bool[Tensor, "B 1 H W"], sigma: Float[Tensor, " B"], radius: int
) -> Float[Tensor, "B 3 H W"]:
    """Blur each image by its own Gaussian.

    At its border an image is averaged over the pixels that it has, so that padding does not darken it.

    Args:
        pixels: 0 in the padding.
        inside: False in the padding; each image is a rectangle at the upper left.
        sigma: Standard deviations in px, above 0.
        radius: Pixels that a kernel reaches to each side; three times the largest sigma is plenty.

    Returns:
        Blurred images; 0 in the padding.
    """
    offsets = torch.arange(-radius, radius + 1, device=pixels.device)
    kernels = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    # The mask of a rectangle is the product of its first row and column, and so is its blur.
    rows = _convolve(inside[:, :, :, :1].float(), kernels, radius, vertical=True)
    columns = _convolve(inside[:, :, :1, :].float(), kernels, radius, vertical=False)
    vertical = _convolve(pixels, kernels, radius, vertical=True)
    blurred = _convolve(vertical, kernels, radius, vertical=False) / (rows * columns)
    return torch.where(inside, blurred, 0.0)


def _convolve(
    images: Float[Tensor, "B C H W"], kernels: Float[Tensor, "B K"], radius: int, *, vertical: bool
) -> Float[Tensor, "B C H W"]:
    batch, channels, height, width = images.shape
    weight = kernels.repeat_interleave(channels, dim=0)[:, None, :]
    weight = weight[..., None] if vertical else weight[..., None, :]
    padding = (radius, 0) if vertical else (0, radius)
    # Images in the place of channels: a grouped convolution gives each its own kernel.
    with torch.autocast(device_type=images.device.type, enabled=False):
        convolved = functional.conv2d(
            images.reshape(1, batch * channels, height, width), weight, padding=padding, groups=batch * channels
        )
    return convolved.reshape(batch, channels, height, width)


def _by_image(values: Float[Tensor, " B"]) -> Float[Tensor, "B 1 1 1"]:
    return values[:, None, None, None]
