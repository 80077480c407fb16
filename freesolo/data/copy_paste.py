"""Copy-paste augmentation: instances of one image of a batch pasted onto another (FreeSOLO, arXiv:2202.12181)."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from freesolo.data.augment import host_generator
from freesolo.ops.masks import areas, resize_masks_soft
from freesolo.types import Instances, SegmentationBatch

_SHARE = 0.5  # of the other image's instances, on average, that are pasted: a random subset, as in arXiv:2012.07177
_MAX_COVER = 0.5  # a pasted instance must cover less than this of every instance that is there


def copy_paste(batch: SegmentationBatch, generator: torch.Generator) -> SegmentationBatch:
    """Paste a random subset of each image's instances onto the image that mirrors it in the batch.

    Image i receives from image B - 1 - i, resized to its size; the middle one of an odd number receives nothing. An
    instance that would cover half or more of one that is there is not pasted. Instances below are cut, and those of
    which nothing is left removed. Pasted instances keep their category, score and embedding.

    Waits for the device to learn the images' sizes and whose the instances are, and at the end which of them remain.

    Args:
        batch: On any device; B and N may be 0. It is not changed.
        generator: Chooses the subset.

    Returns:
        Images and instances; the instances of an image are its own, then the pasted ones.
    """
    pixels = batch.images.pixels.clone()
    instances = batch.instances
    wanted = torch.rand(len(instances), generator=host_generator(generator)) < _SHARE
    owners, sizes = instances.image_index.cpu(), [tuple(size) for size in batch.images.sizes.tolist()]
    parts = []
    for target in range(len(batch)):
        source = len(batch) - 1 - target
        own = instances[_rows(owners == target, instances)]
        offered = instances[_rows((owners == source) & wanted & (source != target), instances)]
        pasted = _resize(offered, sizes[source], sizes[target], target)
        # One that is not pasted is emptied, and leaves with the other empty ones: to drop it here would mean to wait.
        accepted = _acceptable(pasted.masks, own.masks)
        pasted = replace(pasted, masks=pasted.masks & accepted[:, None, None])
        area = pasted.masks.any(dim=0)
        resized = _resize_pixels(batch.images.pixels[source], sizes[source], sizes[target])
        pixels[target] = torch.where(area, resized, pixels[target])
        parts += [replace(own, masks=own.masks & ~area), pasted]
    merged = _concatenate(instances, parts)
    return SegmentationBatch(replace(batch.images, pixels=pixels), merged[areas(merged.masks) > 0])


def _rows(chosen: Bool[Tensor, " N"], instances: Instances) -> Int64[Tensor, " K"]:
    """Indices of the chosen rows, found on the host, on the instances' device."""
    return chosen.nonzero()[:, 0].to(instances.masks.device, non_blocking=True)


def _resize(offered: Instances, source: tuple[int, int], target: tuple[int, int], image: int) -> Instances:
    """Instances of an image of size `source` as they lie in image `image` of size `target`."""
    masks = torch.zeros_like(offered.masks)
    if len(offered):
        soft = resize_masks_soft(offered.masks[:, : source[0], : source[1]].float(), *target)
        masks[:, : target[0], : target[1]] = soft > 0.5
    return replace(offered, masks=masks, image_index=torch.full_like(offered.image_index, image))


def _resize_pixels(
    pixels: Shaped[Tensor, "3 H W"], source: tuple[int, int], target: tuple[int, int]
) -> Shaped[Tensor, "3 H W"]:
    """An image of size `source` resized to `target`, both at the upper left of the same extent."""
    image = pixels[:, : source[0], : source[1]].float()
    resized = functional.interpolate(image[None], size=target, mode="bilinear", align_corners=False)[0]
    if not pixels.is_floating_point():
        resized = resized.round()
    canvas = torch.zeros_like(pixels)
    canvas[:, : target[0], : target[1]] = resized.to(pixels.dtype)
    return canvas


def _acceptable(pasted: Bool[Tensor, "P H W"], own: Bool[Tensor, "E H W"]) -> Bool[Tensor, " P"]:
    """Which masks cover less than half of every one that is there; an empty one that is there does not count."""
    with torch.autocast(device_type=own.device.type, enabled=False):  # bfloat16 cannot hold the counts
        covered = pasted.flatten(1).float() @ own.flatten(1).float().T
    own_areas = areas(own)
    hidden = (covered >= _MAX_COVER * own_areas) & (own_areas > 0)
    return ~hidden.any(dim=1)


def _concatenate(like: Instances, parts: list[Instances]) -> Instances:
    """The parts one after the other; with no parts, what `like` is when it is empty."""
    parts = [like[:0], *parts]
    return Instances(
        image_index=torch.cat([part.image_index for part in parts]),
        masks=torch.cat([part.masks for part in parts]),
        category_ids=torch.cat([part.category_ids for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        embeddings=torch.cat([part.embeddings for part in parts]),
    )
