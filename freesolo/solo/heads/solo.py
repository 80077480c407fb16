"""SOLO's first head (arXiv:1912.04488 sec. 3.2): each level has a map for every cell of its grid, S * S of them.

Nobody needs them all: the last convolution is 1x1, so a cell's map is the product of the features with one row of its
weights, and only the maps of cells that are asked for are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from freesolo.models.fpn import Pyramid
from freesolo.settings import SoloModelSettings
from freesolo.solo.heads.base import (
    COORDINATES,
    PRIOR_PROBABILITY,
    Head,
    append_coordinates,
    begin_at,
    convolutions,
    enlarged,
    level_maps,
    masks_by_level,
    resize,
    sum_of_nothing,
    tower,
)


@dataclass(frozen=True, slots=True)
class SoloPredictions:
    """`Predictions` with what each level's maps are made from.

    Attributes:
        category_logits: Before the sigmoid, `(B, C, L)`.
        embeddings: Not normalised, `(B, E, L)`.
        mask_features: Of each level, at half its stride, `(B, D, 2h', 2w')`.
        weights: Of each cell's map, the same for all images, `(L, D)`.
        biases: Likewise, `(L,)`.
    """

    category_logits: Float[Tensor, "B C L"]
    embeddings: Float[Tensor, "B E L"]
    mask_features: tuple[Float[Tensor, "B D _ _"], ...]
    weights: Float[Tensor, "L D"]
    biases: Float[Tensor, " L"]

    def __len__(self) -> int:
        return self.category_logits.shape[0]

    def each_image(self) -> tuple[SoloPredictions, ...]:
        """As `Predictions.each_image`."""
        columns = (self.category_logits, self.embeddings, *self.mask_features)
        rows = zip(*(column.unbind(0) for column in columns), strict=True)
        return tuple(
            SoloPredictions(
                category[None], embedding[None], tuple(map_[None] for map_ in maps), self.weights, self.biases
            )
            for category, embedding, *maps in rows
        )

    def zero(self) -> Float[Tensor, ""]:
        """As `Predictions.zero`."""
        return sum_of_nothing(self.category_logits, self.embeddings, *self.mask_features, self.weights, self.biases)


class SoloHead(Head[SoloPredictions]):
    """A tower for masks, the same on every level, and S * S outputs on each."""

    def __init__(self, settings: SoloModelSettings) -> None:
        """Build the head; its values are undefined until `initialise` or a checkpoint sets them.

        Raises:
            ValueError: If the towers' channels are not divisible by 32.
        """
        super().__init__(settings)
        head = settings.head
        self.mask_tower = tower(settings.fpn_channels + COORDINATES, head.tower_channels, head.tower_convs)
        self.mask_outputs = nn.ModuleList(nn.Conv2d(head.tower_channels, size * size, 1) for size in self.grid_sizes)

    def forward(self, pyramid: Pyramid) -> SoloPredictions:
        """As `Head.forward`."""
        levels = level_maps(pyramid)
        category_logits, embeddings = self._cells(
            [resize(level, (size, size)) for level, size in zip(levels, self.grid_sizes, strict=True)]
        )
        features = tuple(enlarged(self.mask_tower(append_coordinates(level))) for level in levels)
        weights = torch.cat([output.weight.flatten(1) for output in convolutions(self.mask_outputs)])
        biases = torch.cat([output.bias for output in convolutions(self.mask_outputs) if output.bias is not None])
        # Of one type, so that masks may be made outside of autocast: group norms are of one that depends on the device.
        dtype = features[0].dtype
        return SoloPredictions(category_logits, embeddings, features, weights.to(dtype), biases.to(dtype))

    def mask_logits(self, predictions: SoloPredictions, cell: Int64[Tensor, " P"]) -> Float[Tensor, "P h w"]:
        """As `Head.mask_logits`. Waits for the device."""

        def masks_of(level: int, cells: Tensor) -> Tensor:
            features = predictions.mask_features[level].squeeze(0)
            maps = predictions.weights[cells] @ features.flatten(1) + predictions.biases[cells, None]
            return maps.view(-1, *features.shape[1:])

        height, width = predictions.mask_features[0].shape[-2:]
        return masks_by_level(cell, self.grid_sizes, (height, width), masks_of)

    def initialise(self, generator: torch.Generator) -> SoloHead:
        """As `Head.initialise`; masks begin as the categories do, at 1%."""
        super().initialise(generator)
        for output in convolutions(self.mask_outputs):
            begin_at(PRIOR_PROBABILITY, output)
        return self
