"""SOLO's training targets and losses, from a batch's masks and a head's predictions to the head's gradients.

The peer is what research code usually does: for each image and level a loop over the instances that fit it, on the CPU
in numpy; then, on the device, level by level, all positives' masks and losses at once, with eight unfolded neighbours
of each pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from skimage.color import rgb2lab
from torch import Tensor
from torch.nn import functional

from freesolo.settings import HeadSettings, LossSettings, SoloModelSettings
from freesolo.solo.heads.base import MASK_STRIDE
from freesolo.solo.heads.solov2 import SoloV2Head, SoloV2Predictions
from freesolo.solo.supervisions.base import LossInputs, Positives, Supervision
from freesolo.solo.supervisions.free_masks import FreeMasks
from freesolo.solo.supervisions.masks import Masks
from freesolo.solo.targets import assign_targets, mask_targets
from freesolo.types import GridTargets, Instances, SegmentationBatch
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.synthetic import segmentation_batch

STEP = 1000
"""Optimiser steps taken: the pairwise term is past its warm-up."""

BOTTOM_ROWS_IGNORED = 10


@dataclass(frozen=True, slots=True)
class Size:
    """How large the inputs are.

    Attributes:
        images: Of the batch.
        instances: In each image.
        height: Of the photos and of the padded extent, in px.
        width: Of the padded extent, in px.
        photo_width: In px.
        model: Grids, scale ranges and channels.
    """

    images: int
    instances: int
    height: int
    width: int
    photo_width: int
    model: SoloModelSettings


FULL = Size(images=4, instances=20, height=640, width=864, photo_width=853, model=SoloModelSettings())

TINY = Size(
    images=2,
    instances=15,
    height=64,
    width=96,
    photo_width=90,
    model=SoloModelSettings(
        head=HeadSettings(kernel_channels=32),
        embedding_channels=8,
        grid_sizes=(10, 9, 6, 4, 3),
        scale_ranges=((1, 12), (6, 24), (12, 48), (24, 96), (48, 256)),
    ),
)


@dataclass(frozen=True, slots=True)
class LevelTargets:
    """What one level of one image is trained towards, as the peer has it.

    Attributes:
        categories: Of each cell, `(S, S)`.
        instances: Row of `Instances` of each positive.
        cells: Cell of the grid of each positive, row by row.
        masks: At stride 4, of each positive, `(P, h, w)`.
    """

    categories: Int64[Tensor, "S S"]
    instances: list[int]
    cells: list[int]
    masks: Float[Tensor, "P h w"]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training step takes from its losses.

    Attributes:
        losses: Weighted, by name.
        gradients: Of their sum, for each column of `SoloV2Predictions` that it depends on.
    """

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def cases(device: torch.device, size: Size = FULL) -> tuple[Case[Any, Any], ...]:
    """Targets alone, and with the losses and gradients of free masks, and of masks."""
    generator = torch.Generator().manual_seed(0)
    on_host = _batch(size, generator)
    batch, predictions = on_host.to(device), _predictions(size, generator, device)
    with torch.device("meta"):
        head = SoloV2Head(size.model)  # multiplies kernels and mask features; its own parameters are not used
    settings = LossSettings()

    def targets() -> GridTargets:
        return assign_targets(batch.instances, len(batch), size.height, size.width, size.model)

    # Each positive's mask is a product of its kernel and the features, and so are the gradients of both.
    flops = 3 * 2.0 * int(targets().valid.sum()) * predictions.mask_features[0].numel()

    def peer() -> list[list[LevelTargets]]:
        return peer_targets(on_host.instances, len(batch), size.height, size.width, size.model, device)

    def ours(supervision: Supervision) -> dict[str, Tensor]:
        assigned = targets()
        positives = Positives.of(assigned)
        return supervision.losses(
            LossInputs(
                head, predictions, assigned.categories, positives, batch.images, batch.instances, settings, step=STEP
            )
        )

    return (
        Case(
            name="targets",
            peer_name="numpy, loops over levels, instances and cells",
            ours=lambda: (targets(), mask_targets(batch.instances, MASK_STRIDE)),
            peer=peer,
            assert_equal=_assert_same_targets,
        ),
        Case(
            name="targets, free-mask losses, gradients",
            peer_name="the same targets, losses level by level, scikit-image's Lab",
            ours=lambda: _train(predictions, lambda: ours(FreeMasks())),
            peer=lambda: _train(
                predictions, lambda: peer_free_mask_losses(predictions, peer(), batch, settings, size.model)
            ),
            assert_equal=_assert_same_training,
            repeats=3,
            flops=flops,
        ),
        Case(
            name="targets, mask losses, gradients",
            peer_name="the same targets, losses level by level",
            ours=lambda: _train(predictions, lambda: ours(Masks())),
            peer=lambda: _train(predictions, lambda: peer_mask_losses(predictions, peer(), settings, size.model)),
            assert_equal=_assert_same_training,
            repeats=5,
            flops=flops,
        ),
    )


def _batch(size: Size, generator: torch.Generator) -> SegmentationBatch:
    return segmentation_batch(
        size.images,
        size.instances,
        (size.height, size.photo_width),
        generator,
        padded_width=size.width,
        # None so thin that it vanishes at the masks' stride, for which the peer has no rule.
        smallest=max(2.0 * MASK_STRIDE, size.height / 40),
        largest=size.height / 2,
        embedding_channels=size.model.embedding_channels,
    )


def _predictions(size: Size, generator: torch.Generator, device: torch.device) -> SoloV2Predictions:
    """What an untrained head might say of the batch; every prediction wants a gradient."""
    model = size.model
    cells = sum(side * side for side in model.grid_sizes)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size.images, *shape, generator=generator)).to(device).requires_grad_()

    return SoloV2Predictions(
        category_logits=normal(model.num_categories, cells),
        kernels=normal(model.head.kernel_channels, cells, scale=model.head.kernel_channels**-0.5),
        embeddings=normal(model.embedding_channels, cells),
        mask_features=normal(model.head.kernel_channels, size.height // MASK_STRIDE, size.width // MASK_STRIDE),
    )


def _train(predictions: SoloV2Predictions, losses_of: Callable[[], dict[str, Tensor]]) -> Trained:
    names = SoloV2Predictions.__dataclass_fields__
    losses = losses_of()
    columns = [getattr(predictions, name) for name in names]
    gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), columns, materialize_grads=True)
    return Trained({name: loss.detach() for name, loss in losses.items()}, dict(zip(names, gradients, strict=True)))


# --- The peer -----------------------------------------------------------------------------------------------------


def peer_targets(
    instances: Instances,
    batch_size: int,
    height: int,
    width: int,
    settings: SoloModelSettings,
    device: torch.device,
) -> list[list[LevelTargets]]:
    """The targets of each image and level (SOLO, arXiv:1912.04488, sec. 3.3.1), on the CPU, then sent."""
    batch = []
    for image in range(batch_size):
        rows = torch.nonzero(instances.image_index == image)[:, 0].tolist()
        shapes = {row: _shape(instances.masks[row].numpy()) for row in rows}
        reduced = {row: _reduce(instances.masks[row]) for row in rows}
        # Later ones overwrite earlier ones, so the smallest comes last.
        rows.sort(key=lambda row: -shapes[row].area)
        levels = []
        for side, (low, high) in zip(settings.grid_sizes, settings.scale_ranges, strict=True):
            categories = torch.full((side, side), settings.num_categories)
            owner = {}
            for row in rows:
                shape = shapes[row]
                if not low <= (shape.box_height * shape.box_width) ** 0.5 <= high:
                    continue
                top, bottom = _cell_range(shape.y, shape.box_height, height, side, settings.centre_sigma)
                left, right = _cell_range(shape.x, shape.box_width, width, side, settings.centre_sigma)
                categories[top : bottom + 1, left : right + 1] = instances.category_ids[row]
                for down in range(top, bottom + 1):
                    for across in range(left, right + 1):
                        owner[down * side + across] = row
            masks = [reduced[row] for row in owner.values()]
            stacked = torch.stack(masks) if masks else torch.zeros(0, height // MASK_STRIDE, width // MASK_STRIDE)
            levels.append(LevelTargets(categories.to(device), list(owner.values()), list(owner), stacked.to(device)))
        batch.append(levels)
    return batch


@dataclass(frozen=True, slots=True)
class _Shape:
    area: int
    y: float
    x: float
    box_height: int
    box_width: int


def _shape(mask: Bool[np.ndarray, "H W"]) -> _Shape:
    rows, columns = np.nonzero(mask)
    box_height, box_width = (int(along.max() - along.min()) + 1 for along in (rows, columns))
    return _Shape(len(rows), rows.mean() + 0.5, columns.mean() + 0.5, box_height, box_width)


def _cell_range(centre: float, box_side: int, extent: int, side: int, sigma: float) -> tuple[int, int]:
    """First and last row, or column, that the centre region covers in the 3 x 3 around the centre's cell."""
    cell, half = int(centre / extent * side), sigma / 2 * box_side
    first = max(0, int((centre - half) / extent * side), cell - 1)
    last = min(side - 1, int((centre + half) / extent * side), cell + 1)
    return first, last


def _reduce(mask: Bool[Tensor, "H W"]) -> Float[Tensor, "h w"]:
    resized = functional.interpolate(
        mask[None, None].float(), scale_factor=1 / MASK_STRIDE, mode="bilinear", align_corners=False
    )
    return (resized[0, 0] >= 0.5).float()


def peer_free_mask_losses(
    predictions: SoloV2Predictions,
    targets: list[list[LevelTargets]],
    batch: SegmentationBatch,
    settings: LossSettings,
    model: SoloModelSettings,
) -> dict[str, Tensor]:
    """FreeSOLO's losses (arXiv:2202.12181, sec. 3.2), with the means that ours takes."""
    similarities = [
        _similarity(pixels, int(height), int(width))
        for pixels, (height, width) in zip(batch.images.pixels, batch.images.sizes, strict=True)
    ]
    terms: dict[str, list[Tensor]] = {"max_projection": [], "mean_projection": [], "pairwise": [], "embedding": []}
    for level, first_cell in enumerate(_first_cells(model)):
        positives = [levels[level] for levels in targets]
        logits, coarse = _masks_of_level(predictions, positives, first_cell)
        if len(logits) == 0:
            continue
        probabilities = logits.sigmoid()
        similarity = torch.cat(
            [one.expand(len(found.cells), -1, -1, -1) for one, found in zip(similarities, positives, strict=True)]
        )
        embeddings = torch.cat(
            [
                predictions.embeddings[image, :, [first_cell + cell for cell in found.cells]].T
                for image, found in enumerate(positives)
            ]
        )
        wanted = batch.instances.embeddings[[row for found in positives for row in found.instances]]
        terms["max_projection"].append(
            _dice(probabilities.amax(dim=1), coarse.amax(dim=1)).mean()
            + _dice(probabilities.amax(dim=2), coarse.amax(dim=2)).mean()
        )
        terms["mean_projection"].append(
            _dice(probabilities.mean(dim=1), coarse.mean(dim=1)).mean()
            + _dice(probabilities.mean(dim=2), coarse.mean(dim=2)).mean()
        )
        terms["pairwise"].append(_pairwise(logits, coarse, similarity, settings.pairwise_min_similarity))
        terms["embedding"].append(-functional.cosine_similarity(embeddings, wanted).mean())
    weights = {name: getattr(settings, name) for name in terms}
    losses = {name: weights[name] * torch.stack(values).mean() for name, values in terms.items()}
    return {"category": _focal(predictions, targets, settings), **losses}


def peer_mask_losses(
    predictions: SoloV2Predictions, targets: list[list[LevelTargets]], settings: LossSettings, model: SoloModelSettings
) -> dict[str, Tensor]:
    """SOLOv2's losses: Dice over all positives alike (SOLO, arXiv:1912.04488, sec. 3.3.2)."""
    dice = []
    for level, first_cell in enumerate(_first_cells(model)):
        logits, masks = _masks_of_level(predictions, [levels[level] for levels in targets], first_cell)
        if len(logits) > 0:
            dice.append(_dice(logits.sigmoid().flatten(1), masks.flatten(1)))
    return {
        "category": _focal(predictions, targets, settings),
        "dice": settings.dice * torch.cat(dice).mean(),
    }


def _first_cells(model: SoloModelSettings) -> list[int]:
    """Each level's first cell among all levels' cells."""
    return [sum(side * side for side in model.grid_sizes[:level]) for level in range(len(model.grid_sizes))]


def _masks_of_level(
    predictions: SoloV2Predictions, positives: list[LevelTargets], first_cell: int
) -> tuple[Float[Tensor, "P h w"], Float[Tensor, "P h w"]]:
    """Masks before the sigmoid of all images' positives on a level, and what they should be."""
    logits = []
    for image, found in enumerate(positives):
        kernels = predictions.kernels[image, :, [first_cell + cell for cell in found.cells]].T
        if len(kernels) > 0:
            features = predictions.mask_features[image][None]
            logits.append(functional.conv2d(features, kernels[:, :, None, None])[0])
    targets = torch.cat([found.masks for found in positives])
    return torch.cat(logits) if logits else targets, targets


def _focal(
    predictions: SoloV2Predictions, targets: list[list[LevelTargets]], settings: LossSettings
) -> Float[Tensor, ""]:
    """Focal loss (arXiv:1708.02002, eq. 5) of all cells, over the positives and one."""
    positives = sum(len(level.cells) for levels in targets for level in levels)
    categories = torch.stack([torch.cat([level.categories.flatten() for level in levels]) for levels in targets])
    logits = predictions.category_logits.transpose(1, 2)
    wanted = functional.one_hot(categories, logits.shape[2] + 1)[:, :, :-1].float()
    probability = logits.sigmoid()
    right = probability * wanted + (1 - probability) * (1 - wanted)
    balance = settings.focal_alpha * wanted + (1 - settings.focal_alpha) * (1 - wanted)
    entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return settings.category * (balance * (1 - right) ** settings.focal_gamma * entropy).sum() / (positives + 1)


def _dice(p: Float[Tensor, "P n"], q: Float[Tensor, "P n"]) -> Float[Tensor, " P"]:
    return 1 - 2 * (p * q).sum(dim=1) / ((p * p).sum(dim=1) + (q * q).sum(dim=1))


def _neighbours(maps: Float[Tensor, "N C h w"]) -> Float[Tensor, "N C 8 h w"]:
    """The 3 x 3 window at dilation 2 around each pixel, without its centre; 0 outside the map."""
    count, channels, height, width = maps.shape
    window = functional.unfold(maps, kernel_size=3, padding=2, dilation=2).view(count, channels, 9, height, width)
    return torch.cat((window[:, :, :4], window[:, :, 5:]), dim=2)


def _similarity(pixels: Tensor, height: int, width: int) -> Float[Tensor, "1 8 h w"]:
    """BoxInst's colour similarity (arXiv:2012.02310, sec. 3.2) of one image, 0 where an end is in the padding."""
    pooled = functional.avg_pool2d(pixels[None].float(), MASK_STRIDE)
    lab = torch.from_numpy(rgb2lab(pooled[0].permute(1, 2, 0).cpu().numpy() / 255)).permute(2, 0, 1)[None]
    lab = lab.float().to(pixels.device)
    valid = torch.zeros(1, 1, *pixels.shape[1:], device=pixels.device)
    valid[:, :, : height - BOTTOM_ROWS_IGNORED, :width] = 1
    valid = (functional.avg_pool2d(valid, MASK_STRIDE) == 1).float()
    distance = (lab[:, :, None] - _neighbours(lab)).norm(dim=1)
    return torch.exp(-distance / 2) * _neighbours(valid)[:, 0] * valid


def _pairwise(
    logits: Float[Tensor, "P h w"], coarse: Float[Tensor, "P h w"], similarity: Tensor, min_similarity: float
) -> Float[Tensor, ""]:
    """The mean over positives of the mean of `-log P(same label)` over the alike pairs that begin in the box."""
    boxes = torch.zeros_like(coarse)
    for box, mask in zip(boxes, coarse, strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
    inside, outside = functional.logsigmoid(logits)[:, None], functional.logsigmoid(-logits)[:, None]
    same = torch.logaddexp(inside + _neighbours(inside)[:, 0], outside + _neighbours(outside)[:, 0])
    weight = (similarity >= min_similarity).float() * boxes[:, None]
    return (-(same * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=1)).mean()


# --- Are they the same? -------------------------------------------------------------------------------------------


def _assert_same_targets(ours: tuple[GridTargets, Bool[Tensor, "N h w"]], peer: list[list[LevelTargets]]) -> None:
    targets, masks = ours
    categories = torch.stack([torch.cat([level.categories.flatten() for level in levels]) for levels in peer])
    assert torch.equal(targets.categories, categories)
    columns = (targets.image, targets.level, targets.cell, targets.instance)
    slots = list(zip(*(column[targets.valid].tolist() for column in columns), strict=True))
    sides = [level.categories.shape[0] for level in peer[0]]
    found = {}
    for image, levels in enumerate(peer):
        for level, of_level in enumerate(levels):
            first_cell = sum(side * side for side in sides[:level])
            for cell, row, mask in zip(of_level.cells, of_level.instances, of_level.masks, strict=True):
                found[image, level, first_cell + cell, row] = mask
    assert set(slots) == found.keys()
    assert found, "there are no positives"
    for (_, _, _, row), mask in found.items():
        assert torch.equal(masks[row], mask.bool())


def _assert_same_training(ours: Trained, peer: Trained) -> None:
    assert ours.losses.keys() == peer.losses.keys()
    for name, loss in ours.losses.items():
        torch.testing.assert_close(loss, peer.losses[name], rtol=1e-4, atol=1e-6)
    for name, gradient in ours.gradients.items():
        # Sums of many terms that cancel: rounding is relative to the largest, not to each.
        largest = float(peer.gradients[name].abs().max())
        torch.testing.assert_close(gradient, peer.gradients[name], rtol=0, atol=1e-4 * largest)


BENCHMARK = Benchmark(
    name="solo_targets_and_losses",
    inputs="a SOLOv2 head on 4 photos of 640 x 853 px, padded to 640 x 864, 20 instances in each",
    cases=cases,
)
