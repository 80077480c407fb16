"""Decoupled SOLO (arXiv:1912.04488 sec. 5): a cell's map is the product of its column's and its row's.

Each level has S maps for the columns and S for the rows, where `heads.solo` has S * S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from freesolo.models.fpn import Pyramid
from freesolo.settings import SoloModelSettings
from freesolo.solo.heads.base import (
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
class DecoupledPredictions:
    """`Predictions` with the maps of columns and rows.

    Attributes:
        category_logits: Before the sigmoid, `(B, C, L)`.
        embeddings: Not normalised, `(B, E, L)`.
        columns: Maps of each level's columns, before the sigmoid, at half its stride, `(B, S, 2h', 2w')`.
        rows: Likewise of its rows.
    """

    category_logits: Float[Tensor, "B C L"]
    embeddings: Float[Tensor, "B E L"]
    columns: tuple[Float[Tensor, "B _ _ _"], ...]
    rows: tuple[Float[Tensor, "B _ _ _"], ...]

    def __len__(self) -> int:
        return self.category_logits.shape[0]

    def each_image(self) -> tuple[DecoupledPredictions, ...]:
        """As `Predictions.each_image`."""
        fields = (self.category_logits, self.embeddings, *self.columns, *self.rows)
        levels = len(self.columns)
        images = zip(*(field.unbind(0) for field in fields), strict=True)
        singles = ([field[None] for field in image] for image in images)
        return tuple(
            DecoupledPredictions(category, embedding, tuple(maps[:levels]), tuple(maps[levels:]))
            for category, embedding, *maps in singles
        )

    def zero(self) -> Float[Tensor, ""]:
        """As `Predictions.zero`."""
        return sum_of_nothing(self.category_logits, self.embeddings, *self.columns, *self.rows)


class DecoupledHead(Head[DecoupledPredictions]):
    """A tower that sees x for the columns and one that sees y for the rows, and S outputs of each on every level."""

    def __init__(self, settings: SoloModelSettings) -> None:
        """Build the head; its values are undefined until `initialise` or a checkpoint sets them.

        Raises:
            ValueError: If the towers' channels are not divisible by 32.
        """
        super().__init__(settings)
        head = settings.head
        self.column_tower = tower(settings.fpn_channels + 1, head.tower_channels, head.tower_convs)
        self.column_outputs = nn.ModuleList(nn.Conv2d(head.tower_channels, size, 1) for size in self.grid_sizes)
        self.row_tower = tower(settings.fpn_channels + 1, head.tower_channels, head.tower_convs)
        self.row_outputs = nn.ModuleList(nn.Conv2d(head.tower_channels, size, 1) for size in self.grid_sizes)

    def forward(self, pyramid: Pyramid) -> DecoupledPredictions:
        """As `Head.forward`."""
        levels = level_maps(pyramid)
        category_logits, embeddings = self._cells(
            [resize(level, (size, size)) for level, size in zip(levels, self.grid_sizes, strict=True)]
        )
        with_places = [append_coordinates(level) for level in levels]
        columns, rows = [], []
        for level, column_output, row_output in zip(with_places, self.column_outputs, self.row_outputs, strict=True):
            columns.append(column_output(enlarged(self.column_tower(level[:, :-1]))))
            rows.append(row_output(enlarged(self.row_tower(torch.cat([level[:, :-2], level[:, -1:]], dim=1)))))
        return DecoupledPredictions(category_logits, embeddings, tuple(columns), tuple(rows))

    def mask_logits(self, predictions: DecoupledPredictions, cell: Int64[Tensor, " P"]) -> Float[Tensor, "P h w"]:
        """As `Head.mask_logits`. Waits for the device."""

        def masks_of(level: int, cells: Tensor) -> Tensor:
            size = self.grid_sizes[level]
            place = cells - sum(earlier * earlier for earlier in self.grid_sizes[:level])
            return logit_of_product(
                predictions.columns[level][0, place % size], predictions.rows[level][0, place // size]
            )

        height, width = predictions.columns[0].shape[-2:]
        return masks_by_level(cell, self.grid_sizes, (height, width), masks_of)

    def initialise(self, generator: torch.Generator) -> DecoupledHead:
        """As `Head.initialise`; masks begin as the categories do, at 1%, hence columns and rows at 10%.

        # Deviation: the released code begins columns and rows at 1% each, masks at 0.01%. There Dice has a hundredth of
        the slope that it has for SOLO's masks, and eight photos are not learned in the steps that suffice for those.
        """
        super().initialise(generator)
        for output in (*convolutions(self.column_outputs), *convolutions(self.row_outputs)):
            begin_at(PRIOR_PROBABILITY**0.5, output)
        return self


def logit_of_product(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`logit(sigmoid(first) * sigmoid(second))`, without computing either sigmoid.

    From `1 / (pq) = (1 + exp(-first)) (1 + exp(-second))`: the odds against are
    `exp(-first) + exp(-second) + exp(-first - second)`.
    """
    return -torch.stack([-first, -second, -first - second]).float().logsumexp(dim=0)
