"""SOLOv2's head (arXiv:2003.10152): what every cell of five grids says, and how a cell's words become a mask.

    pyramid     P2..P6 of the FPN
    level maps  P2 halved, P3, P4, P5, P6 enlarged to P5's size: the five levels' inputs
    grids       each level map resized to S x S; cells of all levels concatenated: L
    towers      convolutions 3x3, GroupNorm, ReLU; the same weights on every level
    D           channels of a kernel, and of the mask features that it is applied to
    h, w        H / 4 and W / 4: the extent of the mask features and of every mask

Masks are not made here for all L cells: `SoloV2Head.mask_logits` makes those that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from freesolo.models.fpn import Pyramid
from freesolo.settings import SoloModelSettings

MASK_STRIDE = 4
"""Pixels of the input per pixel of the mask features, each way."""

GROUPS = 32
"""Of every GroupNorm (arXiv:1803.08494)."""

COORDINATES = 2
"""Channels that `append_coordinates` appends."""

PRIOR_PROBABILITY = 0.01
"""Of an object in a cell before training (arXiv:1708.02002 sec. 4.1); also the standard deviation of the weights."""


@dataclass(frozen=True, slots=True)
class SoloPredictions:
    """What a SOLOv2 head says of a batch. Cells are all levels', concatenated level by level, row by row.

    Attributes:
        category_logits: Before the sigmoid, `(B, C, L)`.
        kernels: Weights of each cell's 1x1 dynamic convolution, `(B, D, L)`.
        embeddings: Semantic embedding of each cell, not normalised, `(B, E, L)`.
        mask_features: The unified features that kernels are applied to, at stride 4, `(B, D, h, w)`.
    """

    category_logits: Float[Tensor, "B C L"]
    kernels: Float[Tensor, "B D L"]
    embeddings: Float[Tensor, "B E L"]
    mask_features: Float[Tensor, "B D h w"]

    def __len__(self) -> int:
        return self.category_logits.shape[0]

    def each_image(self) -> tuple[SoloPredictions, ...]:
        """One record of batch size 1 for each image, all of them views of this one."""
        # unbind, because its gradient is one stack; the gradient of indexing is a batch of zeros for each image.
        columns = (self.category_logits, self.kernels, self.embeddings, self.mask_features)
        rows = zip(*(column.unbind(0) for column in columns), strict=True)
        return tuple(SoloPredictions(*(column[None] for column in row)) for row in rows)

    def zero(self) -> Float[Tensor, ""]:
        """A float32 zero that depends on every prediction, with a gradient of zeros.

        Distributed training needs each parameter in each step's graph, also where a batch has no positives.
        """
        columns = (self.category_logits, self.kernels, self.embeddings, self.mask_features)
        # Sums of nothing, because 0 * x would be NaN where x is infinite.
        return torch.stack([column[..., :0].float().sum() for column in columns]).sum()


class SoloV2Head(nn.Module):
    """Category, kernel and embedding branches on five grids, and unified mask features.

    Source: SOLOv2 (arXiv:2003.10152) sec. 3.2; the embedding branch is FreeSOLO's (arXiv:2202.12181) sec. 3.2.
    """

    def __init__(self, settings: SoloModelSettings) -> None:
        """Build the head; its values are undefined until `initialise` or a checkpoint sets them.

        Raises:
            ValueError: If a number of channels that is normalised in groups is not divisible by 32.
        """
        super().__init__()
        for name in ("tower_channels", "mask_tower_channels", "kernel_channels"):
            channels = getattr(settings, name)
            if channels % GROUPS:
                raise ValueError(f"model.{name}={channels} is not divisible by the {GROUPS} groups of GroupNorm")
        self.grid_sizes = settings.grid_sizes
        self.category_tower = _tower(settings.fpn_channels, settings.tower_channels, settings.tower_convs)
        self.kernel_tower = _tower(settings.fpn_channels + COORDINATES, settings.tower_channels, settings.tower_convs)
        self.category_output = nn.Conv2d(settings.tower_channels, settings.num_categories, 3, padding=1)
        self.embedding_output = nn.Conv2d(settings.tower_channels, settings.embedding_channels, 3, padding=1)
        self.kernel_output = nn.Conv2d(settings.tower_channels, settings.kernel_channels, 3, padding=1)
        self.mask_towers = _mask_towers(settings.fpn_channels, settings.mask_tower_channels)
        self.mask_output = _conv_norm_relu(settings.mask_tower_channels, settings.kernel_channels, 1)

    def forward(self, pyramid: Pyramid) -> SoloPredictions:
        """Predict every cell of every grid.

        Args:
            pyramid: Of an input whose height and width are divisible by 32.
        """
        categories, kernels, embeddings = [], [], []
        for level, size in zip(_level_maps(pyramid), self.grid_sizes, strict=True):
            grid = _resize(append_coordinates(level), (size, size))
            semantic = self.category_tower(grid[:, :-COORDINATES])
            categories.append(self.category_output(semantic).flatten(2))
            embeddings.append(self.embedding_output(semantic).flatten(2))
            kernels.append(self.kernel_output(self.kernel_tower(grid)).flatten(2))
        kernel = torch.cat(kernels, dim=2)
        return SoloPredictions(
            category_logits=torch.cat(categories, dim=2),
            kernels=kernel,
            embeddings=torch.cat(embeddings, dim=2),
            # Autocast computes group norms in float32 and convolutions not; they are multiplied with one another.
            mask_features=self._mask_features(pyramid).to(kernel.dtype),
        )

    def mask_logits(
        self, predictions: SoloPredictions, image: Int64[Tensor, " P"], cell: Int64[Tensor, " P"]
    ) -> Float[Tensor, "P h w"]:
        """The masks of chosen cells, before the sigmoid; `(0, h, w)` where none are chosen.

        One matrix product per image, so that no slot has a copy of its image's features. Of a batch of one image this
        needs nothing from the device; of a larger one it waits for the number of slots of each image: take
        `SoloPredictions.each_image` where that matters.

        Args:
            predictions: Of a batch.
            image: Image of the batch of each slot, in any order.
            cell: Index among all levels' cells of each slot.
        """
        kernels = predictions.kernels[image, :, cell]
        features = predictions.mask_features.unbind(0)
        if len(features) == 1:
            return _apply_kernels(kernels, features[0])
        order = image.argsort(stable=True)
        counts: list[int] = torch.bincount(image, minlength=len(features)).tolist()
        by_image = kernels[order].split_with_sizes(counts)
        masks = torch.cat([_apply_kernels(*pair) for pair in zip(by_image, features, strict=True)])
        return masks[order.argsort()]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> SoloV2Head:
        """Set every parameter: normal weights, zero biases, and a category bias that says 1% (arXiv:1708.02002)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=PRIOR_PROBABILITY, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        assert self.category_output.bias is not None
        nn.init.constant_(self.category_output.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        return self

    def _mask_features(self, pyramid: Pyramid) -> Float[Tensor, "B D h w"]:
        levels = (pyramid.p2, pyramid.p3, pyramid.p4, append_coordinates(pyramid.p5))
        raised = [tower(level) for tower, level in zip(self.mask_towers, levels, strict=True)]
        features: Tensor = self.mask_output(torch.stack(raised).sum(dim=0))
        return features


def append_coordinates(features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C+2 H W"]:
    """Append x, then y, each from -1 at the first pixel's centre to 1 at the last one's (arXiv:1807.03247)."""
    batch, _, height, width = features.shape
    y = torch.linspace(-1, 1, height, device=features.device, dtype=features.dtype)
    x = torch.linspace(-1, 1, width, device=features.device, dtype=features.dtype)
    x_channel = x[None, None, None, :].expand(batch, 1, height, width)
    y_channel = y[None, None, :, None].expand(batch, 1, height, width)
    return torch.cat([features, x_channel, y_channel], dim=1)


def _level_maps(pyramid: Pyramid) -> tuple[Tensor, ...]:
    p2_halved = functional.interpolate(pyramid.p2, scale_factor=0.5, mode="bilinear", align_corners=False)
    p6_enlarged = _resize(pyramid.p6, pyramid.p5.shape[-2:])
    return (p2_halved, pyramid.p3, pyramid.p4, pyramid.p5, p6_enlarged)


def _resize(features: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def _apply_kernels(kernels: Float[Tensor, "P D"], features: Float[Tensor, "D h w"]) -> Float[Tensor, "P h w"]:
    height, width = features.shape[1:]
    return (kernels @ features.flatten(1)).view(-1, height, width)


def _conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.GroupNorm(GROUPS, out_channels),
        nn.ReLU(inplace=True),
    )


def _tower(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    incoming = [in_channels] + [channels] * (depth - 1)
    return nn.Sequential(*(_conv_norm_relu(one, channels, 3) for one in incoming))


def _mask_towers(in_channels: int, channels: int) -> nn.ModuleList:
    """A tower for each of P2..P5 that raises it to stride 4: P2 stays, P5 is doubled three times."""
    towers = [_conv_norm_relu(in_channels, channels, 3)]
    for doublings in (1, 2, 3):
        first = in_channels + (COORDINATES if doublings == 3 else 0)
        blocks: list[nn.Module] = []
        for incoming in [first] + [channels] * (doublings - 1):
            blocks.append(_conv_norm_relu(incoming, channels, 3))
            blocks.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        towers.append(nn.Sequential(*blocks))
    return nn.ModuleList(towers)
