"""What the kinds of head share: five levels, a grid on each, and what every cell says of its category.

    pyramid     P2..P6 of the FPN
    level maps  P2 halved, P3, P4, P5, P6 enlarged to P5's size: the five levels' inputs
    grids       each level map resized to S x S; cells of all levels concatenated: L
    towers      convolutions 3x3, GroupNorm, ReLU; the same weights on every level
    h, w        H / 4 and W / 4: the extent of every mask

How a cell gets its mask is what tells the kinds of head apart: `solo`, `decoupled` and `solov2`, each a `Head` in a
module of its own. Masks are never made for all L cells: `mask_logits` makes those that are asked for, at stride 4.
# Deviation: SOLO's and decoupled SOLO's masks too are trained and found at stride 4; the paper's are at half a level's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from freesolo.models.fpn import Pyramid
from freesolo.settings import SoloModelSettings

MASK_STRIDE = 4
"""Pixels of the input per pixel of a mask, each way."""

GROUPS = 32
"""Of every GroupNorm (arXiv:1803.08494)."""

COORDINATES = 2
"""Channels that `append_coordinates` appends."""

PRIOR_PROBABILITY = 0.01
"""Before training, of an object in a cell, and of each pixel of a mask that has a bias (arXiv:1708.02002 sec. 4.1)."""

WEIGHT_DEVIATION = 0.01
"""Standard deviation of the weights before training (arXiv:1708.02002 sec. 4.1)."""


@runtime_checkable
class Predictions(Protocol):
    """What a head says of a batch. Cells are all levels', concatenated level by level, row by row.

    Attributes:
        category_logits: Before the sigmoid, `(B, C, L)`.
        embeddings: Semantic embedding of each cell, not normalised, `(B, E, L)`.
    """

    @property
    def category_logits(self) -> Float[Tensor, "B C L"]: ...

    @property
    def embeddings(self) -> Float[Tensor, "B E L"]: ...

    def __len__(self) -> int: ...

    def each_image(self) -> tuple[Predictions, ...]:
        """One record of batch size 1 for each image, all of them views of this one."""

    def zero(self) -> Float[Tensor, ""]:
        """A float32 zero that depends on every prediction and on every parameter, with a gradient of zeros.

        Distributed training needs each parameter in each step's graph, also where a batch has no positives.
        """


Said = TypeVar("Said", bound=Predictions)


class Head(nn.Module, ABC, Generic[Said]):
    """The category and embedding branches; the kinds of head add their masks.

    Source: SOLO (arXiv:1912.04488) sec. 3; the embedding branch is FreeSOLO's (arXiv:2202.12181) sec. 3.2.
    """

    def __init__(self, settings: SoloModelSettings) -> None:
        """Build the branches; values are undefined until `initialise` or a checkpoint sets them."""
        super().__init__()
        head = settings.head
        self.grid_sizes = settings.grid_sizes
        self.category_tower = tower(settings.fpn_channels, head.tower_channels, head.tower_convs)
        self.category_output = nn.Conv2d(head.tower_channels, settings.num_categories, 3, padding=1)
        self.embedding_output = nn.Conv2d(head.tower_channels, settings.embedding_channels, 3, padding=1)

    @abstractmethod
    def forward(self, pyramid: Pyramid) -> Said:
        """Predict every cell of every grid.

        Args:
            pyramid: Of an input whose height and width are divisible by 32.
        """

    @abstractmethod
    def mask_logits(self, predictions: Said, cell: Int64[Tensor, " P"]) -> Float[Tensor, "P h w"]:
        """The masks of chosen cells of one image, before the sigmoid; `(0, h, w)` where none are chosen.

        Args:
            predictions: Of one image: one of `each_image`.
            cell: Index among all levels' cells of each mask.
        """

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Head[Said]:
        """Set every parameter: normal weights, zero biases, and a category bias that says 1% (arXiv:1708.02002)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=WEIGHT_DEVIATION, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        begin_at(PRIOR_PROBABILITY, self.category_output)
        return self

    def _cells(self, grids: Sequence[Tensor]) -> tuple[Float[Tensor, "B C L"], Float[Tensor, "B E L"]]:
        """Category logits and embeddings of each level's grid, concatenated."""
        semantic = [self.category_tower(grid) for grid in grids]
        categories = torch.cat([self.category_output(grid).flatten(2) for grid in semantic], dim=2)
        return categories, torch.cat([self.embedding_output(grid).flatten(2) for grid in semantic], dim=2)


def append_coordinates(features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C+2 H W"]:
    """Append x, then y, each from -1 at the first pixel's centre to 1 at the last one's (arXiv:1807.03247)."""
    batch, _, height, width = features.shape
    y, x = _from_minus_one_to_one(height, features), _from_minus_one_to_one(width, features)
    x_channel = x[None, None, None, :].expand(batch, 1, height, width)
    y_channel = y[None, None, :, None].expand(batch, 1, height, width)
    return torch.cat([features, x_channel, y_channel], dim=1)


def _from_minus_one_to_one(count: int, like: Tensor) -> Float[Tensor, " count"]:
    """So many numbers at equal distances; -1 alone where it is one."""
    if torch.compiler.is_exporting():  # linspace would fix the count; to within 2e-7 this is the same
        ends = torch.linspace(-1, 1, 2, device=like.device, dtype=like.dtype)
        return functional.interpolate(ends[None, None], size=count, mode="linear", align_corners=True)[0, 0]
    return torch.linspace(-1, 1, count, device=like.device, dtype=like.dtype)


def level_maps(pyramid: Pyramid) -> tuple[Tensor, ...]:
    """The five levels' inputs, at strides 8, 8, 16, 32, 32."""
    p2_halved = resize(pyramid.p2, pyramid.p3.shape[-2:])
    p6_enlarged = resize(pyramid.p6, pyramid.p5.shape[-2:])
    return (p2_halved, pyramid.p3, pyramid.p4, pyramid.p5, p6_enlarged)


def resize(features: Float[Tensor, "B C _ _"], size: Sequence[int]) -> Float[Tensor, "B C _ _"]:
    """Bilinear, pixel centres, no antialiasing.

    To a size, never by a factor: an exported program fixes what a factor came to for the sizes that it was traced with.
    """
    return functional.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A convolution that keeps the extent, GroupNorm, ReLU.

    Raises:
        ValueError: If the channels are not divisible by the 32 groups.
    """
    if out_channels % GROUPS:
        raise ValueError(f"{out_channels} channels are not divisible by the {GROUPS} groups of GroupNorm")
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        _GroupNorm(GROUPS, out_channels),
        nn.ReLU(inplace=True),
    )


class _GroupNorm(nn.GroupNorm):
    """Takes one image's map of one cell too, which PyTorch's refuses where a group is one channel: what is left of a
    number without others is the bias."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def tower(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    """`depth` convolutions 3x3 with GroupNorm and ReLU."""
    incoming = [in_channels] + [channels] * (depth - 1)
    return nn.Sequential(*(conv_norm_relu(one, channels, 3) for one in incoming))


def masks_by_level(
    cell: Int64[Tensor, " P"],
    grid_sizes: Sequence[int],
    extent: tuple[int, int],
    masks_of: Callable[[int, Int64[Tensor, " p"]], Float[Tensor, "p _ _"]],
) -> Float[Tensor, "P h w"]:
    """The masks of cells of any levels, each made at its level's own resolution and enlarged to one extent.

    Waits for the device, to learn how many of the cells are of each level.

    Args:
        cell: Index among all levels' cells of each mask.
        grid_sizes: Of the levels.
        extent: Height and width of the masks.
        masks_of: Of a level and some of its cells, at least one.
    """
    sizes = torch.tensor([size * size for size in grid_sizes], device=cell.device)
    first = sizes.cumsum(0) - sizes
    level = torch.bucketize(cell, first, right=True) - 1
    order = level.argsort(stable=True)
    counts: list[int] = torch.bincount(level, minlength=len(grid_sizes)).tolist()
    parts = []
    for number, cells in enumerate(cell[order].split_with_sizes(counts)):
        if len(cells):
            parts.append(resize(masks_of(number, cells)[:, None], extent)[:, 0])
    if not parts:
        return torch.zeros(0, *extent, device=cell.device)
    return torch.cat(parts)[order.argsort()]


def convolutions(modules: nn.ModuleList) -> list[nn.Conv2d]:
    """Those of a list that are, each with its type."""
    return [module for module in modules if isinstance(module, nn.Conv2d)]


@torch.no_grad()
def begin_at(probability: float, output: nn.Conv2d) -> None:
    """Set an output's bias so that its sigmoid begins at `probability`."""
    assert output.bias is not None
    nn.init.constant_(output.bias, -math.log((1 - probability) / probability))


def enlarged(features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C _ _"]:
    """Twice as high and wide: at half a level's stride."""
    height, width = features.shape[-2:]
    return resize(features, (2 * height, 2 * width))


class Enlarge(nn.Module):
    """`enlarged`, as a layer."""

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C _ _"]:
        """As `enlarged`."""
        return enlarged(features)


def sum_of_nothing(*columns: Tensor) -> Float[Tensor, ""]:
    """A float32 zero that depends on all of some tensors: sums of nothing, because 0 * x is NaN where x is infinite."""
    return torch.stack([column[..., :0].float().sum() for column in columns]).sum()
