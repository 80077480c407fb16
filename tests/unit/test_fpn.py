"""The feature pyramid: shapes at even and odd sizes, names, the top-down sum by hand, complete initialisation."""

from __future__ import annotations

import pytest
import torch

from freesolo.models.fpn import FPN
from freesolo.models.resnet import FeatureMaps


def maps(sizes: list[tuple[int, int]], channels: tuple[int, int, int, int] = (1, 1, 1, 1)) -> FeatureMaps:
    return FeatureMaps(*(torch.zeros(1, c, *size) for c, size in zip(channels, sizes, strict=True)))


def identity_fpn() -> FPN:
    """One channel, laterals that pass on, outputs that pass on the centre."""
    network = FPN((1, 1, 1, 1), channels=1)
    with torch.no_grad():
        for lateral, output in zip(network.lateral, network.output, strict=True):
            lateral.weight.fill_(1.0)
            lateral.bias.zero_()
            output.weight.zero_()
            output.weight[0, 0, 1, 1] = 1.0
            output.bias.zero_()
    return network


@pytest.mark.parametrize(
    ("sizes", "p6"),
    [
        ([(16, 24), (8, 12), (4, 6), (2, 3)], (1, 2)),
        ([(25, 13), (13, 7), (7, 4), (4, 2)], (2, 1)),
        ([(1, 1), (1, 1), (1, 1), (1, 1)], (1, 1)),
    ],
)
def test_every_level_keeps_its_size(sizes, p6):
    network = FPN((8, 16, 32, 64), channels=4).initialise(torch.Generator().manual_seed(0))
    pyramid = network(maps(sizes, (8, 16, 32, 64)))
    assert [tuple(level.shape) for level in pyramid] == [(1, 4, *size) for size in (*sizes, p6)]


def test_top_down_sum_by_hand():
    features = maps([(5, 5), (3, 3), (2, 2), (1, 1)])
    features.c5[0, 0, 0, 0] = 1000.0
    features.c4[0, 0, 1, 0] = 100.0
    features.c3[0, 0] = torch.tensor([[0, 0, 30.0], [0, 0, 0], [0, 0, 0]])
    features.c2[0, 0, 4, 4] = 2.0
    pyramid = identity_fpn()(features)
    # C5 reaches every cell. C4's lower left cell becomes rows 2.. of C3's three (0, 0, 1), columns 0 and 1.
    assert pyramid.p5[0, 0].tolist() == [[1000.0]]
    assert pyramid.p4[0, 0].tolist() == [[1000.0, 1000.0], [1100.0, 1000.0]]
    assert pyramid.p3[0, 0].tolist() == [[1000, 1000, 1030], [1000, 1000, 1000], [1100, 1100, 1000]]
    # Row i of five is row i // 2 of three.
    assert pyramid.p2[0, 0].tolist() == [
        [1000, 1000, 1000, 1000, 1030],
        [1000, 1000, 1000, 1000, 1030],
        [1000, 1000, 1000, 1000, 1000],
        [1000, 1000, 1000, 1000, 1000],
        [1100, 1100, 1100, 1100, 1002],
    ]


def test_p6_is_every_second_cell_of_p5():
    features = maps([(40, 40), (20, 20), (10, 10), (5, 5)])
    features.c5[0, 0] = torch.arange(25.0).reshape(5, 5)
    pyramid = identity_fpn()(features)
    assert pyramid.p6[0, 0].tolist() == [[0, 2, 4], [10, 12, 14], [20, 22, 24]]


def test_names():
    names = set(FPN((8, 16, 32, 64), channels=4).state_dict())
    assert names == {
        f"{part}.{level}.{kind}" for part in ("lateral", "output") for level in range(4) for kind in ("weight", "bias")
    }


def test_initialise_sets_everything_from_its_generator():
    first, second = FPN((8, 16, 32, 64), channels=4), FPN((8, 16, 32, 64), channels=4)
    for network in (first, second):
        for parameter in network.parameters():
            parameter.data.fill_(float("nan"))
        network.initialise(torch.Generator().manual_seed(3))
    for name, value in first.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second.state_dict()[name])
    # Uniform within sqrt(3 / fan in), fan in = 8.
    assert 0.5 < first.lateral[0].weight.abs().max().item() <= (3 / 8) ** 0.5
