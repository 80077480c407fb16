"""Residual networks under torchvision's parameter names, so that published checkpoints load and ours load elsewhere.

    input   (B, 3, H, W)            normalised RGB
    C2      (B, channels[0], H/4, W/4)      after layer1
    C3      (B, channels[1], H/8, W/8)      after layer2
    C4      (B, channels[2], H/16, W/16)    after layer3
    C5      (B, channels[3], H/32, W/32)    after layer4; the dense methods' "stage 5"

Sizes are rounded up where the stride does not divide. Source: He et al., arXiv:1512.03385, table 1; the stride of a
bottleneck sits in its 3x3 convolution, as in torchvision and every published self-supervised checkpoint, or in its
first 1x1, as in MSRA's original weights (`resnet50_caffe`): no tensor tells, only the network's name does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from freesolo.settings import Backbone

Depth = Literal[18, 34, 50, 101]

_BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
_NETWORKS: dict[Backbone, tuple[Depth, bool]] = {  # depth, and whether the stride is in the 1x1 convolutions
    "resnet18": (18, False),
    "resnet34": (34, False),
    "resnet50": (50, False),
    "resnet101": (101, False),
    "resnet50_caffe": (50, True),
    "resnet101_caffe": (101, True),
}
_STAGE_WIDTHS = (64, 128, 256, 512)


class FeatureMaps(NamedTuple):
    """The last map of each stage of a backbone, strides 4, 8, 16 and 32."""

    c2: Float[Tensor, "B C2 H2 W2"]
    c3: Float[Tensor, "B C3 H3 W3"]
    c4: Float[Tensor, "B C4 H4 W4"]
    c5: Float[Tensor, "B C5 H5 W5"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18, -34)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width * self.expansion, stride)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Apply the block; `h` and `w` are `H` and `W` over the stride, rounded up."""
        shortcut = features if self.downsample is None else self.downsample(features)
        features = self.relu(self.bn1(self.conv1(features)))
        features = self.bn2(self.conv2(features))
        output: Tensor = self.relu(features + shortcut)
        return output


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (ResNet-50, -101); the 3x3 carries the stride, or the first 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, *, stride_in_1x1: bool = False) -> None:
        super().__init__()
        out_channels = width * self.expansion
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride_1x1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride_3x3, padding=1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3: nn.Module = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Apply the block; `h` and `w` are `H` and `W` over the stride, rounded up."""
        shortcut = features if self.downsample is None else self.downsample(features)
        features = self.relu(self.bn1(self.conv1(features)))
        features = self.relu(self.bn2(self.conv2(features)))
        features = self.bn3(self.conv3(features))
        output: Tensor = self.relu(features + shortcut)
        return output


class ResNet(nn.Module):
    """A residual network without its classifier.

    Attributes:
        depth: 18, 34, 50 or 101.
        channels: Channels of C2, C3, C4 and C5.
    """

    def __init__(self, depth: Depth, *, stride_in_1x1: bool = False) -> None:
        """Build the network; its values are undefined until `initialise` or a checkpoint sets them.

        Args:
            depth: 18, 34, 50 or 101.
            stride_in_1x1: Whether bottlenecks have their stride in the first 1x1 convolution, not in the 3x3.

        Raises:
            ValueError: If the depth is none of these, or has no bottlenecks to have a stride in.
        """
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"depth={depth}: there are ResNets of depth {', '.join(map(str, _BLOCKS))}")
        if stride_in_1x1 and depth in (18, 34):
            raise ValueError(f"depth={depth}: only blocks of ResNet-50 and -101 have a 1x1 convolution to stride in")
        block: _Block = BasicBlock if depth in (18, 34) else partial(Bottleneck, stride_in_1x1=stride_in_1x1)
        expansion = BasicBlock.expansion if depth in (18, 34) else Bottleneck.expansion
        self.depth = depth
        first, second, third, fourth = (width * expansion for width in _STAGE_WIDTHS)
        self.channels: tuple[int, int, int, int] = (first, second, third, fourth)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks = _BLOCKS[depth]
        self.layer1 = _stage(block, 64, _STAGE_WIDTHS[0], blocks[0], stride=1)
        self.layer2 = _stage(block, first, _STAGE_WIDTHS[1], blocks[1], stride=2)
        self.layer3 = _stage(block, second, _STAGE_WIDTHS[2], blocks[2], stride=2)
        self.layer4 = _stage(block, third, _STAGE_WIDTHS[3], blocks[3], stride=2)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> FeatureMaps:
        """The last map of each stage, of normalised RGB images."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c2 = self.layer1(features)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return FeatureMaps(c2, c3, c4, self.layer4(c4))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> ResNet:
        """Set every parameter and buffer: kaiming normal (fan out) convolutions, batch norms that do nothing yet.

        Source: arXiv:1502.01852 sec. 2.2, the initialisation of torchvision's networks.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.reset_parameters()
        return self


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its running statistics and never learns, whatever `.train()` is told.

    It has the names of `nn.BatchNorm2d`, so checkpoints are exchanged with networks that are not frozen.
    """

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stay in evaluation mode."""
        del mode
        return super().train(False)


def build_resnet(name: Backbone) -> ResNet:
    """The network that a configuration names. Call `initialise` on it or load a checkpoint."""
    depth, stride_in_1x1 = _NETWORKS[name]
    return ResNet(depth, stride_in_1x1=stride_in_1x1)


def backbone_name(depth: int, *, stride_in_1x1: bool) -> Backbone | None:
    """What configurations call a network; None where there is none of this kind."""
    return next((name for name, network in _NETWORKS.items() if network == (depth, stride_in_1x1)), None)


def differ_in_stride_alone(first: str, second: str) -> bool:
    """Whether two networks' tensors have the same names and shapes, and yet are not for one another."""
    depths: dict[str, int] = {name: depth for name, (depth, _) in _NETWORKS.items()}
    return first != second and first in depths and depths.get(first) == depths.get(second)


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every `nn.BatchNorm2d` inside `module`, in place, by a frozen one of the same name and values."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, FrozenBatchNorm2d):
            setattr(module, name, _frozen(child))
        else:
            freeze_batch_norm(child)


def _frozen(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    frozen.load_state_dict(norm.state_dict())
    if norm.running_mean is not None:
        frozen.to(norm.running_mean)
    return frozen.train(False).requires_grad_(False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The projection of a block that changes shape; None where the identity does."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


_Block = Callable[[int, int, int], BasicBlock | Bottleneck]  # of channels in, width and stride


def _stage(block: _Block, in_channels: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = block(in_channels, width, stride)
    rest = [block(width * first.expansion, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
