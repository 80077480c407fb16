"""SOLOv2's head (arXiv:2003.10152 sec. 3.2): every cell says a kernel, and one map of features serves them all.

D       channels of a kernel, and of the mask features that it is applied to
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
    Enlarge,
    Head,
    append_coordinates,
    conv_norm_relu,
    level_maps,
    resize,
    sum_of_nothing,
    tower,
)


@dataclass(frozen=True, slots=True)
class SoloV2Predictions:
    """`Predictions` with the kernels and the features that they are applied to.

    Attributes:
        category_logits: Before the sigmoid, `(B, C, L)`.
        kernels: Weights of each cell's 1x1 dynamic convolution, `(B, D, L)`.
        embeddings: Not normalised, `(B, E, L)`.
        mask_features: The unified features, at stride 4, `(B, D, h, w)`.
    """

    category_logits: Float[Tensor, "B C L"]
    kernels: Float[Tensor, "B D L"]
    embeddings: Float[Tensor, "B E L"]
    mask_features: Float[Tensor, "B D h w"]

    def __len__(self) -> int:
        return self.category_logits.shape[0]

    def each_image(self) -> tuple[SoloV2Predictions, ...]:
        """As `Predictions.each_image`."""
        # unbind, because its gradient is one stack; the gradient of indexing is a batch of zeros for each image.
        columns = (self.category_logits, self.kernels, self.embeddings, self.mask_features)
        rows = zip(*(column.unbind(0) for column in columns), strict=True)
        return tuple(SoloV2Predictions(*(column[None] for column in row)) for row in rows)

    def zero(self) -> Float[Tensor, ""]:
        """As `Predictions.zero`."""
        return sum_of_nothing(self.category_logits, self.kernels, self.embeddings, self.mask_features)


class SoloV2Head(Head[SoloV2Predictions]):
    """Kernels on five grids, and unified mask features."""

    def __init__(self, settings: SoloModelSettings) -> None:
        """Build the head; its values are undefined until `initialise` or a checkpoint sets them.

        Raises:
            ValueError: If a number of channels that is normalised in groups is not divisible by 32.
        """
        super().__init__(settings)
        head = settings.head
        self.kernel_tower = tower(settings.fpn_channels + COORDINATES, head.tower_channels, head.tower_convs)
        self.kernel_output = nn.Conv2d(head.tower_channels, head.kernel_channels, 3, padding=1)
        self.mask_towers = _mask_towers(settings.fpn_channels, head.mask_tower_channels)
        self.mask_output = conv_norm_relu(head.mask_tower_channels, head.kernel_channels, 1)

    def forward(self, pyramid: Pyramid) -> SoloV2Predictions:
        """As `Head.forward`."""
        grids = [
            resize(append_coordinates(level), (size, size))
            for level, size in zip(level_maps(pyramid), self.grid_sizes, strict=True)
        ]
        category_logits, embeddings = self._cells([grid[:, :-COORDINATES] for grid in grids])
        kernels = torch.cat([self.kernel_output(self.kernel_tower(grid)).flatten(2) for grid in grids], dim=2)
        # Autocast computes group norms in float32 and convolutions not; they are multiplied with one another.
        return SoloV2Predictions(category_logits, kernels, embeddings, self._mask_features(pyramid).to(kernels.dtype))

    def mask_logits(self, predictions: SoloV2Predictions, cell: Int64[Tensor, " P"]) -> Float[Tensor, "P h w"]:
        """As `Head.mask_logits`: one matrix product, which needs nothing from the device."""
        # Not an index: its gradient is a batch of zeros to add to.
        kernels, features = predictions.kernels[0, :, cell].T, predictions.mask_features.squeeze(0)
        return (kernels @ features.flatten(1)).view(-1, *features.shape[1:])

    def _mask_features(self, pyramid: Pyramid) -> Float[Tensor, "B D h w"]:
        levels = (pyramid.p2, pyramid.p3, pyramid.p4, append_coordinates(pyramid.p5))
        p2, p3, p4, p5 = (tower(level) for tower, level in zip(self.mask_towers, levels, strict=True))
        # Not the sum of a stack, which takes a CPU ten times as long and is no longer channels-last.
        features: Tensor = self.mask_output(p2 + p3 + p4 + p5)
        return features


def _mask_towers(in_channels: int, channels: int) -> nn.ModuleList:
    """A tower for each of P2..P5 that raises it to stride 4: P2 stays, P5 is doubled three times."""
    towers = [conv_norm_relu(in_channels, channels, 3)]
    for doublings in (1, 2, 3):
        first = in_channels + (COORDINATES if doublings == 3 else 0)
        blocks: list[nn.Module] = []
        for incoming in [first] + [channels] * (doublings - 1):
            blocks.append(conv_norm_relu(incoming, channels, 3))
            blocks.append(Enlarge())
        towers.append(nn.Sequential(*blocks))
    return nn.ModuleList(towers)
