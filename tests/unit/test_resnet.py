"""The residual networks: torchvision's names and sizes, strides, complete initialisation, frozen batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from freesolo.models.resnet import FrozenBatchNorm2d, ResNet, build_resnet, freeze_batch_norm


def fill_with_nan(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))


def tensors_with_nan(module: nn.Module) -> list[str]:
    return [name for name, value in module.state_dict().items() if value.isnan().any()]


def seeded(depth: int = 18) -> ResNet:
    return ResNet(depth).initialise(torch.Generator().manual_seed(0))


# torchvision's published totals less its classifier: 512 * 1000 + 1000, or 2048 * 1000 + 1000.
@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [
        ("resnet18", 11_689_512 - 513_000, 122 - 2),
        ("resnet34", 21_797_672 - 513_000, 218 - 2),
        ("resnet50", 25_557_032 - 2_049_000, 320 - 2),
        ("resnet101", 44_549_160 - 2_049_000, 626 - 2),
    ],
)
def test_sizes_are_torchvisions(name, parameters, keys):
    with torch.device("meta"):
        network = build_resnet(name)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == keys


def test_names_are_torchvisions():
    with torch.device("meta"):
        names = set(build_resnet("resnet50").state_dict())
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "bn1.num_batches_tracked",
        "layer1.0.conv1.weight",
        "layer1.0.bn3.bias",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.running_var",
        "layer4.2.conv3.weight",
    } <= names
    assert not any(name.startswith("fc") for name in names)


@pytest.mark.parametrize(("depth", "channels"), [(18, (64, 128, 256, 512)), (50, (256, 512, 1024, 2048))])
def test_strides_round_up(depth, channels):
    network = seeded(depth).eval()
    with torch.no_grad():
        maps = network(torch.randn(2, 3, 64, 97))
    assert network.channels == channels
    # 97 -> 49 -> 25 (stride 4) -> 13 -> 7 -> 4
    expected = [(16, 25), (8, 13), (4, 7), (2, 4)]
    assert [tuple(level.shape) for level in maps] == [(2, c, *size) for c, size in zip(channels, expected, strict=True)]
    assert all(level.isfinite().all() for level in maps)


def test_bottleneck_strides_in_its_3x3():
    with torch.device("meta"):
        block = build_resnet("resnet50").layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="depth=19"):
        ResNet.__init__.__wrapped__(ResNet.__new__(ResNet), 19)


def test_initialise_sets_everything():
    network = ResNet(18)
    fill_with_nan(network)
    assert len(tensors_with_nan(network)) == 100  # 20 convolutions, 20 norms of 4 floating tensors
    network.initialise(torch.Generator().manual_seed(0))
    assert tensors_with_nan(network) == []


def test_initialise_is_its_generators():
    first, second = seeded(), seeded()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    other = ResNet(18).initialise(torch.Generator().manual_seed(1))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_initialise_has_kaimings_deviation():
    weight = seeded().layer3[0].conv1.weight  # 128 channels in, 256 out: fan out 256 * 9
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_frozen_batch_norm_stays_frozen():
    network = seeded().train()
    network(torch.randn(2, 3, 32, 32))  # running statistics other than the initial ones
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = network.eval()(torch.ones(1, 3, 32, 32)).c5

    freeze_batch_norm(network)
    network.train()
    network(torch.randn(2, 3, 32, 32))

    assert torch.equal(network(torch.ones(1, 3, 32, 32)).c5, expected)
    assert network.state_dict().keys() == before.keys()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning == {name for name in before if "conv" in name or "downsample.0" in name}
    assert len(learning) == 20


def test_freezing_twice_is_freezing_once():
    network = seeded()
    freeze_batch_norm(network)
    norm = network.bn1
    freeze_batch_norm(network)
    assert network.bn1 is norm
