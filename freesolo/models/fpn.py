"""Feature pyramid network (arXiv:1612.03144).

C2..C5  a backbone's maps, strides 4, 8, 16, 32
P2..P5  `channels` channels at the same strides
P6      every second row and column of P5, stride 64
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from freesolo.models.resnet import FeatureMaps


class Pyramid(NamedTuple):
    """The maps of a feature pyramid, strides 4, 8, 16, 32 and 64, all of the same number of channels."""

    p2: Float[Tensor, "B C H2 W2"]
    p3: Float[Tensor, "B C H3 W3"]
    p4: Float[Tensor, "B C H4 W4"]
    p5: Float[Tensor, "B C H5 W5"]
    p6: Float[Tensor, "B C H6 W6"]


class FPN(nn.Module):
    """Top-down pathway with lateral connections (arXiv:1612.03144 sec. 3).

    Attributes:
        channels: Channels of every map that it gives.
    """

    def __init__(self, in_channels: tuple[int, int, int, int], channels: int = 256) -> None:
        """Build the network; its values are undefined until `initialise` or a checkpoint sets them.

        Args:
            in_channels: Channels of C2, C3, C4 and C5: `ResNet.channels`.
            channels: Channels of P2 to P6.
        """
        super().__init__()
        self.channels = channels
        self.lateral = nn.ModuleList(nn.Conv2d(incoming, channels, 1) for incoming in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)

    def forward(self, features: FeatureMaps) -> Pyramid:
        """The pyramid over a backbone's maps. Odd sizes are fine: a coarser map is enlarged to the finer one's size."""
        laterals = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        merged = [laterals[-1]]
        for finer in reversed(laterals[:-1]):
            merged.insert(0, finer + functional.interpolate(merged[0], size=finer.shape[-2:], mode="nearest"))
        p2, p3, p4, p5 = (output(feature) for output, feature in zip(self.output, merged, strict=True))
        return Pyramid(p2, p3, p4, p5, p5[..., ::2, ::2])

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> FPN:
        """Set every parameter: uniform weights of variance 1 / fan in, zero biases (the released code's choice)."""
        for convolution in (*self.lateral, *self.output):
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            nn.init.kaiming_uniform_(convolution.weight, a=1, generator=generator)
            nn.init.zeros_(convolution.bias)
        return self
