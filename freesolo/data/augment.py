"""Random colours of images, in batches on the training device; crops are made before, on the host (`data.crops`).

Every image has its own random parameters. They are drawn on the host and sent along, so nothing waits for the device
and only the images that an operation falls to are worked on. With a CPU generator they are the same on every device.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from freesolo.data.colour import blend, gaussian_blur, grayscale, shift_hue
from freesolo.ops.images import normalize
from freesolo.settings import ColourSettings, SegmentationViewSettings, ViewSettings
from freesolo.types import ImageBatch

_ATTEMPTS = 10  # to fit a random rectangle into an image
# Share of the image and height over width of each erasing in turn, those of the strong augmentation that FreeSOLO
# takes over from Unbiased Teacher (arXiv:2102.09480).
_ERASINGS = (((0.05, 0.2), (0.3, 3.3)), ((0.02, 0.2), (0.1, 6.0)), ((0.02, 0.2), (0.05, 8.0)))
_HUE = 3  # of the four operations of colour jitter: brightness, contrast, saturation, hue


def host_generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator that goes on from `generator`: itself if it is one.

    The state of another device's generator is kept on the host, so taking a seed from it waits for nothing.
    """
    if generator.device.type == "cpu":
        return generator
    state = generator.get_state().numpy().tobytes()
    torch.rand(1, generator=generator, device=generator.device)  # moves it on: the next seed will be another
    seed = int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "big")
    return torch.Generator().manual_seed(seed)


def contrastive_view(
    pixels: UInt8[Tensor, "B 3 S S"], settings: ViewSettings, generator: torch.Generator
) -> Float[Tensor, "B 3 S S"]:
    """Jitter, gray, blur and flip crops, each image by itself, and normalise them.

    Source: MoCo v2 (arXiv:2003.04297) sec. 3, in its order.

    Args:
        pixels: Crops, `data.crops.cut`'s; B may be 0.
        settings: Strengths and probabilities.
        generator: Best on the CPU: then the view is the same whatever device the pixels are on.
    """
    host = host_generator(generator)
    inside = torch.ones(len(pixels), 1, *pixels.shape[-2:], dtype=torch.bool, device=pixels.device)
    colours = _augment_colours(pixels.float(), inside, settings, host)
    flipped = _chosen(len(pixels), settings.flip_probability, host, pixels.device)
    colours[flipped] = colours[flipped].flip(3)
    return normalize(colours)


def strong_view(images: ImageBatch, settings: SegmentationViewSettings, generator: torch.Generator) -> ImageBatch:
    """Jitter, gray and blur images, each by itself, and replace rectangles of them by noise; nothing moves.

    Source: FreeSOLO (arXiv:2202.12181) sec. 3.2, after Unbiased Teacher (arXiv:2102.09480).

    Args:
        images: B may be 0. Padding stays 0 and has no part in the result.
        settings: Strengths and probabilities.
        generator: Best on the CPU: then the view is the same whatever device the images are on, up to the noise.

    Returns:
        Images of the type that they came in.
    """
    host = host_generator(generator)
    inside = images.valid_pixels()[:, None]
    colours = _augment_colours(images.pixels.to(torch.float32, copy=True), inside, settings, host)
    colours = _erase(colours, images.sizes, settings.erasing_probabilities, host)
    if not images.pixels.is_floating_point():
        colours = colours.round()
    return replace(images, pixels=colours.to(images.pixels.dtype))


def _augment_colours(
    pixels: Float[Tensor, "B 3 H W"],
    inside: Bool[Tensor, "B 1 H W"],
    settings: ColourSettings,
    host: torch.Generator,
) -> Float[Tensor, "B 3 H W"]:
    """Colour jitter, grayscale and blur, each on a random part of the batch, in place where it can."""
    batch, device = len(pixels), pixels.device
    jittered = _chosen(batch, settings.jitter_probability, host, device)
    if len(jittered):
        pixels[jittered] = _jitter(pixels[jittered], inside[jittered], settings, host)
    grayed = _chosen(batch, settings.grayscale_probability, host, device)
    if len(grayed):
        pixels[grayed] = grayscale(pixels[grayed]).expand(-1, 3, -1, -1)
    blurred = _chosen(batch, settings.blur_probability, host, device)
    if len(blurred):
        low, high = settings.blur_sigma
        sigma = _uniform(len(blurred), low, high, host).clamp(min=1e-3).to(device, non_blocking=True)
        pixels[blurred] = gaussian_blur(pixels[blurred], inside[blurred], sigma, radius=math.ceil(3 * high))
    return pixels


def _jitter(
    pixels: Float[Tensor, "B 3 H W"],
    inside: Bool[Tensor, "B 1 H W"],
    settings: ColourSettings,
    host: torch.Generator,
) -> Float[Tensor, "B 3 H W"]:
    """Change brightness, contrast, saturation and hue of each image in a random order of its own."""
    batch, device = len(pixels), pixels.device
    factors = torch.stack(
        [
            _uniform(batch, max(0.0, 1.0 - strength), 1.0 + strength, host)
            for strength in (settings.brightness, settings.contrast, settings.saturation)
        ],
        dim=1,
    )
    turns = _uniform(batch, -settings.hue, settings.hue, host)
    order = torch.rand(batch, _HUE + 1, generator=host).argsort(dim=1)
    for operation in order.unbind(dim=1):
        pixels = blend(pixels, inside, *_blend_weights(operation, factors).to(device, non_blocking=True))
        turned = (operation == _HUE).nonzero()[:, 0]
        if len(turned):
            rows = turned.to(device, non_blocking=True)
            pixels[rows] = shift_hue(pixels[rows], turns[turned].to(device, non_blocking=True))
    return torch.where(inside, pixels, 0.0)


def _blend_weights(operation: Int64[Tensor, " B"], factors: Float[Tensor, "B 3"]) -> Float[Tensor, "3 B"]:
    """Weights of an image, its grayscale and its mean gray that amount to its operation; hue is not among them."""
    brightness, contrast, saturation = factors.unbind(dim=1)
    one, zero = torch.ones_like(brightness), torch.zeros_like(brightness)
    own = torch.stack([brightness, contrast, saturation, one])
    gray = torch.stack([zero, zero, 1 - saturation, zero])
    mean_gray = torch.stack([zero, 1 - contrast, zero, zero])
    return torch.stack([own, gray, mean_gray]).gather(1, operation.expand(3, 1, -1))[:, 0]


def _erase(
    pixels: Float[Tensor, "B 3 H W"],
    sizes: Int64[Tensor, "B 2"],
    probabilities: tuple[float, ...],
    host: torch.Generator,
) -> Float[Tensor, "B 3 H W"]:
    """Replace up to one rectangle a probability in each image by noise.

    Deviation: noise is uniform in 0..255; the ancestors' is normal, wrapped round into that range.
    """
    erased = torch.zeros_like(pixels[:, 0], dtype=torch.bool)
    for index, probability in enumerate(probabilities):
        scale, ratio = _ERASINGS[min(index, len(_ERASINGS) - 1)]
        rectangles = _random_rectangles(sizes, scale, ratio, host)
        wanted = (torch.rand(len(pixels), generator=host) < probability).to(pixels.device, non_blocking=True)
        erased |= _fill(rectangles * wanted[:, None], pixels.shape[-2], pixels.shape[-1])
    seed = int(torch.randint(2**62, (), generator=host))
    noise = torch.randint(
        256,
        pixels.shape,
        dtype=torch.uint8,
        device=pixels.device,
        generator=torch.Generator(pixels.device).manual_seed(seed),
    )
    return torch.where(erased[:, None], noise, pixels)


def _random_rectangles(
    sizes: Int64[Tensor, "B 2"], scale: tuple[float, float], ratio: tuple[float, float], host: torch.Generator
) -> Float[Tensor, "B 4"]:
    """Edges `(x1, y1, x2, y2)` of a random rectangle in each image; all 0 where none of ten tries fits.

    Args:
        sizes: Heights and widths of the images.
        scale: Least and greatest share of the image's area.
        ratio: Least and greatest height over width.
        host: Source of randomness.
    """
    shape = (len(sizes), _ATTEMPTS)
    share = _uniform(shape, *scale, host)
    aspect = _uniform(shape, math.log(ratio[0]), math.log(ratio[1]), host).exp()
    drawn = torch.stack([share, aspect, *torch.rand(2, *shape, generator=host)])
    share, aspect, down, right = drawn.to(sizes.device, non_blocking=True)
    image_height, image_width = sizes[:, :1].float(), sizes[:, 1:].float()
    height = (share * image_height * image_width * aspect).sqrt().round()
    width = (share * image_height * image_width / aspect).sqrt().round()
    fits = (height > 0) & (width > 0) & (height < image_height) & (width < image_width)
    top = (down * (image_height - height + 1)).floor()
    left = (right * (image_width - width + 1)).floor()
    edges: Tensor = torch.stack([left, top, left + width, top + height], dim=2) * fits[..., None]
    first = fits.int().argmax(dim=1)
    return edges.gather(1, first[:, None, None].expand(-1, 1, 4))[:, 0]


def _fill(boxes_xyxy: Float[Tensor, "B 4"], height: int, width: int) -> Bool[Tensor, "B H W"]:
    """True inside the boxes; nowhere in an empty one."""
    x1, y1, x2, y2 = (edge[:, None] for edge in boxes_xyxy.unbind(dim=1))
    rows, columns = (torch.arange(side, device=boxes_xyxy.device) for side in (height, width))
    return ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]


def _chosen(batch: int, probability: float, host: torch.Generator, device: torch.device) -> Int64[Tensor, " K"]:
    """Which images of a batch something falls to; how many is known on the host."""
    rows = (torch.rand(batch, generator=host) < probability).nonzero()[:, 0]
    return rows.to(device, non_blocking=True)


def _uniform(shape: int | tuple[int, ...], low: float, high: float, host: torch.Generator) -> Float[Tensor, "*shape"]:
    uniform: Tensor = torch.rand(shape, generator=host)
    return low + (high - low) * uniform
