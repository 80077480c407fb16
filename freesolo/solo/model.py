"""The network that segments: ResNet, FPN, and a head of the SOLO family."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from freesolo.models.fpn import FPN
from freesolo.models.resnet import build_resnet
from freesolo.settings import SoloModelSettings
from freesolo.solo.heads.base import Head, Predictions
from freesolo.solo.heads.decoupled import DecoupledHead
from freesolo.solo.heads.solo import SoloHead
from freesolo.solo.heads.solov2 import SoloV2Head

HEADS: dict[str, type[Head[Any]]] = {"solo": SoloHead, "decoupled": DecoupledHead, "solov2": SoloV2Head}
"""By `HeadSettings.kind`."""

INPUT_DIVISOR = 32
"""Heights and widths of inputs are multiples of this, the stride of C5, so that maps double exactly on the way up."""


class Segmenter(nn.Module):
    """A ResNet-FPN with a head of the SOLO family (arXiv:1912.04488, arXiv:2003.10152).

    Attributes:
        settings: What it was built from.
        backbone: The ResNet; published and DenseCL checkpoints load into it.
        fpn: The feature pyramid.
        head: Of the kind that the settings say.
    """

    def __init__(self, settings: SoloModelSettings) -> None:
        """Build the network; its values are undefined until `initialise` or a checkpoint sets them.

        Raises:
            ValueError: If a number of channels that is normalised in groups is not divisible by 32.
        """
        super().__init__()
        self.settings = settings
        self.backbone = build_resnet(settings.backbone)
        self.fpn = FPN(self.backbone.channels, settings.fpn_channels)
        self.head = HEADS[settings.head.kind](settings)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """Predict every cell of every grid.

        Args:
            images: RGB, normalised by `freesolo.ops.images.normalize`.

        Raises:
            ValueError: If the height or the width is not divisible by 32.
        """
        height, width = images.shape[-2:]
        if height % INPUT_DIVISOR or width % INPUT_DIVISOR:
            raise ValueError(
                f"images are {height} x {width} px: pad height and width to multiples of {INPUT_DIVISOR} "
                "(views.size_divisor)"
            )
        predictions: Predictions = self.head(self.fpn(self.backbone(images)))
        return predictions

    def initialise(self, generator: torch.Generator) -> Segmenter:
        """Set every parameter and buffer from `generator`."""
        self.backbone.initialise(generator)
        self.fpn.initialise(generator)
        self.head.initialise(generator)
        return self
