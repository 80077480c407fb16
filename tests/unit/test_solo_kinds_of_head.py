"""SOLO's and decoupled SOLO's heads: masks of chosen cells are those of the maps that are never formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from freesolo.models.fpn import Pyramid
from freesolo.settings import HeadSettings, SoloModelSettings
from freesolo.solo.heads.base import Head
from freesolo.solo.heads.decoupled import DecoupledHead, logit_of_product
from freesolo.solo.heads.solo import SoloHead
from freesolo.solo.model import HEADS, Segmenter

GRIDS = (6, 5, 4, 3, 2)
CELLS = sum(size * size for size in GRIDS)
HEIGHT, WIDTH = 64, 96
KINDS = sorted(HEADS)


def model(kind: str) -> SoloModelSettings:
    head = HeadSettings(kind=kind, tower_channels=32, tower_convs=2, mask_tower_channels=32, kernel_channels=32)
    return SoloModelSettings(
        backbone="resnet18", num_categories=3, fpn_channels=8, head=head, embedding_channels=5, grid_sizes=GRIDS
    )


def head(kind: str) -> Head[Any]:
    return HEADS[kind](model(kind)).initialise(torch.Generator().manual_seed(0))


def pyramid(batch_size: int = 2) -> Pyramid:
    random = torch.Generator().manual_seed(1)
    sizes = [(-(-HEIGHT // stride), -(-WIDTH // stride)) for stride in (4, 8, 16, 32, 64)]
    return Pyramid(*(torch.randn(batch_size, 8, *size, generator=random) for size in sizes))


def place(cell: int) -> tuple[int, int, int]:
    """Level, row and column of a cell."""
    for level, size in enumerate(GRIDS):
        if cell < size * size:
            return level, cell // size, cell % size
        cell -= size * size
    raise AssertionError(cell)


def enlarged(maps: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(maps[None, None], (HEIGHT // 4, WIDTH // 4), mode="bilinear", align_corners=False)[
        0, 0
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_made_outside_of_autocast(kind: str) -> None:
    """As losses and pictures of a training in bfloat16 do."""
    network = head(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = network(pyramid())
    cell = torch.tensor([0, 30, CELLS - 1])
    masks = network.mask_logits(predictions.each_image()[1], cell)
    exact = network.mask_logits(network(pyramid()).each_image()[1], cell)
    torch.testing.assert_close(masks.float(), exact, rtol=0.1, atol=0.1)
    masks.float().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_one_photo_of_maps_of_one_cell(kind: str) -> None:
    network = Segmenter(model(kind)).initialise(torch.Generator().manual_seed(0)).eval()
    photos = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both, alone = network(photos), network(photos[:1])
    torch.testing.assert_close(alone.category_logits, both.category_logits[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_the_same_of_cells_and_gives_masks_at_stride_4(kind: str) -> None:
    network = head(kind)
    predictions = network(pyramid())
    assert len(predictions) == 2
    assert predictions.category_logits.shape == (2, 3, CELLS)
    assert predictions.embeddings.shape == (2, 5, CELLS)
    images = predictions.each_image()
    assert [len(one) for one in images] == [1, 1]
    for index, one in enumerate(images):
        assert torch.equal(one.category_logits[0], predictions.category_logits[index])
        assert torch.equal(one.embeddings[0], predictions.embeddings[index])
        assert network.mask_logits(one, torch.arange(CELLS)).shape == (CELLS, HEIGHT // 4, WIDTH // 4)
        assert network.mask_logits(one, torch.zeros(0, dtype=torch.int64)).shape == (0, HEIGHT // 4, WIDTH // 4)


def test_solo_has_a_map_for_every_cell() -> None:
    """All S * S maps of each level, formed by the last convolution itself, and the cell's channel of them."""
    network = head("solo")
    assert isinstance(network, SoloHead)
    one = network(pyramid()).each_image()[1]
    cells = torch.tensor([89, 0, 7, 40, 7, 61, 78])
    masks = network.mask_logits(one, cells)
    for mask, cell in zip(masks, cells.tolist(), strict=True):
        level, row, column = place(cell)
        every = network.mask_outputs[level](one.mask_features[level])[0]
        assert every.shape[0] == GRIDS[level] ** 2
        torch.testing.assert_close(mask, enlarged(every[row * GRIDS[level] + column]))


def test_solo_forms_no_map_of_a_cell_that_is_not_asked_for() -> None:
    """Neither of its last convolutions is called, nor does any tensor have a channel for every cell of a level."""
    network = head("solo")
    assert isinstance(network, SoloHead)
    for output in network.mask_outputs:
        output.register_forward_pre_hook(lambda module, arguments: pytest.fail("all maps of a level are formed"))

    class Shapes(TorchDispatchMode):
        """Notes what every operation returns."""

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
                    maps.append((function, tuple(tensor.shape)))
            return result

    maps: list[tuple[object, tuple[int, ...]]] = []
    with Shapes():
        one = network(pyramid()).each_image()[1]
        network.mask_logits(one, torch.tensor([89, 0, 7]))
    extents = {features.shape[-2] * features.shape[-1] for features in one.mask_features}
    for function, shape in maps:
        channels, pixels = (shape[-3], shape[-2] * shape[-1]) if len(shape) >= 3 else shape
        assert not (pixels in extents and channels in {CELLS, *(size * size for size in GRIDS)}), (function, shape)


def test_decoupled_maps_are_products_of_a_columns_and_a_rows() -> None:
    network = head("decoupled")
    assert isinstance(network, DecoupledHead)
    one = network(pyramid()).each_image()[0]
    cells = torch.tensor([3, 36, 88, 60, 3])
    masks = network.mask_logits(one, cells)
    for mask, cell in zip(masks, cells.tolist(), strict=True):
        level, row, column = place(cell)
        probability = one.columns[level][0, column].double().sigmoid() * one.rows[level][0, row].double().sigmoid()
        torch.testing.assert_close(mask, enlarged(probability.logit().float()), rtol=1e-4, atol=1e-4)


def test_columns_see_x_and_rows_see_y() -> None:
    """On a flat pyramid the columns' maps change along x alone, and the rows' along y alone, far from the borders."""
    flat = Pyramid(*(torch.ones(1, 8, 512 // stride, 512 // stride) for stride in (4, 8, 16, 32, 64)))
    predictions = head("decoupled")(flat)
    for maps, along, across in ((predictions.columns[0], 3, 2), (predictions.rows[0], 2, 3)):
        middle = maps[:, :, 32:-32, 32:-32]
        assert middle.diff(dim=along).abs().max() > 1e-6
        assert middle.diff(dim=across).abs().max() < 1e-6


def test_the_logit_of_a_product_is_exact_where_sigmoids_are_not() -> None:
    first, second = torch.tensor([0.0, 40.0, -200.0, 200.0, -50.0]), torch.tensor([0.0, 40.0, 3.0, 200.0, -60.0])
    # 1 / (pq) - 1 by hand: (1 + 1)(1 + 1) - 1 = 3; about 2 exp(-40); exp(200) (1 + exp(-3)); 2 exp(-200); exp(110).
    expected = [-torch.tensor(3.0).log().item(), 40 - torch.tensor(2.0).log().item()]
    expected += [-200 - (1 + torch.tensor(-3.0).exp()).log().item(), 200 - torch.tensor(2.0).log().item(), -110.0]
    torch.testing.assert_close(logit_of_product(first, second), torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_the_graph_of_zero(kind: str) -> None:
    network = head(kind)
    network(pyramid()).zero().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    assert not any(parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_masks_begin_where_the_head_says(kind: str) -> None:
    network = head(kind)
    for name, parameter in network.named_parameters():
        assert parameter.isfinite().all(), name
    flat = Pyramid(*(torch.zeros_like(level) for level in pyramid()))
    masks = network.mask_logits(network(flat).each_image()[0], torch.arange(CELLS)).sigmoid()
    if kind == "solov2":  # whose kernels have no bias
        assert abs(masks.mean() - 0.5) < 0.1
    else:
        assert ((masks - 0.01).abs() < 0.005).all(), (masks.min(), masks.max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_segmenter_has_any_of_them(kind: str) -> None:
    network = Segmenter(model(kind)).initialise(torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        predictions = network(torch.randn(1, 3, 64, 64))
    masks = network.head.mask_logits(predictions, torch.tensor([0, CELLS - 1]))
    assert masks.isfinite().all()
