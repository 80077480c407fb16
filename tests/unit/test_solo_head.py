"""The SOLOv2 head and the segmenter: shapes, coordinates, masks of cells by hand, initialisation, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from freesolo.models.fpn import Pyramid
from freesolo.settings import HeadSettings, SoloModelSettings
from freesolo.solo.heads.base import append_coordinates
from freesolo.solo.heads.solov2 import SoloV2Head, SoloV2Predictions
from freesolo.solo.model import Segmenter

MODEL = SoloModelSettings(
    backbone="resnet18",
    num_categories=3,
    fpn_channels=8,
    head=HeadSettings(tower_channels=64, tower_convs=2, mask_tower_channels=32, kernel_channels=96),
    embedding_channels=5,
    grid_sizes=(6, 5, 4, 3, 2),
)
CELLS = 36 + 25 + 16 + 9 + 4


def fill_with_nan(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pyramid(batch_size: int = 2, height: int = 64, width: int = 96, channels: int = 8, seed: int = 0) -> Pyramid:
    random = generator(seed)
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]
    return Pyramid(*(torch.randn(batch_size, channels, *size, generator=random) for size in sizes))


def head(model: SoloModelSettings = MODEL) -> SoloV2Head:
    return SoloV2Head(model).initialise(generator())


def with_head(**changes: object) -> SoloModelSettings:
    return MODEL.model_copy(update={"head": MODEL.head.model_copy(update=changes)})


def columns(record: SoloV2Predictions) -> tuple[torch.Tensor, ...]:
    return (record.category_logits, record.kernels, record.embeddings, record.mask_features)


def test_shapes():
    predictions = head()(pyramid())
    assert len(predictions) == 2
    assert [tuple(column.shape) for column in columns(predictions)] == [
        (2, 3, CELLS),
        (2, 96, CELLS),
        (2, 5, CELLS),
        (2, 96, 16, 24),
    ]


def test_default_sizes_are_the_papers():
    # A kernel of 256, 512 channels in towers of 4.
    with torch.device("meta"):
        network = SoloV2Head(SoloModelSettings())
    assert sum(size * size for size in network.grid_sizes) == 40**2 + 36**2 + 24**2 + 16**2 + 12**2 == 3872
    outputs = (network.category_output, network.kernel_output, network.embedding_output, network.mask_output[0])
    assert [output.out_channels for output in outputs] == [1, 256, 128, 256]
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    assert [tuple(module.weight.shape) for name, module in convolutions.items() if name.startswith("kernel_tower")] == [
        (512, 258, 3, 3),
        *[(512, 512, 3, 3)] * 3,
    ]
    assert sum(name.startswith("category_tower") for name in convolutions) == 4
    # One convolution from P2, one from P3, two from P4, three from P5, the first of which sees the coordinates.
    assert [module.weight.shape[1] for name, module in convolutions.items() if name.startswith("mask_towers")] == [
        256, 256, 256, 128, 258, 128, 128,
    ]  # fmt: skip
    assert {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)} == {32}


def test_coordinates_are_x_then_y_from_minus_one_to_one():
    appended = append_coordinates(torch.zeros(2, 1, 2, 3))
    assert appended.shape == (2, 3, 2, 3)
    assert appended[1, 1].tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert appended[1, 2].tolist() == [[-1, -1, -1], [1, 1, 1]]
    assert append_coordinates(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_categories_do_not_see_where_they_are_but_kernels_do():
    # On a flat pyramid only coordinates tell one inner cell from another (those at the border see the padding).
    flat = Pyramid(*(torch.ones_like(level) for level in pyramid()))
    model = with_head(tower_convs=1).model_copy(update={"grid_sizes": (9, 5, 4, 3, 2)})
    predictions = head(model)(flat)

    def inner_spread(column: torch.Tensor) -> float:
        grid = column[0, :, :81].unflatten(1, (9, 9))[:, 2:-2, 2:-2]
        return (grid - grid[:, :1, :1]).abs().max().item()

    assert inner_spread(predictions.category_logits) < 1e-5
    assert inner_spread(predictions.embeddings) < 1e-5
    assert inner_spread(predictions.kernels) > 1e-4


def test_mask_features_see_where_they_are():
    # P5's coordinates alone tell one place in the middle of a flat pyramid from another: x, and y.
    flat = Pyramid(*(torch.ones_like(level) for level in pyramid(1, 512, 512)))
    features = head()(flat).mask_features[0, :, 48:80, 48:80]
    assert (features[:, 0] - features[:, -1]).abs().max() > 1e-2
    assert (features[:, :, 0] - features[:, :, -1]).abs().max() > 1e-2


def test_cells_are_concatenated_level_by_level_and_row_by_row():
    # With towers that pass on one channel, what a cell says is the level map resized to its grid.
    network = head(with_head(tower_convs=1))
    network.category_tower = nn.Identity()
    network.category_output = nn.Identity()
    network.embedding_output = nn.Identity()
    levels = pyramid()
    predictions = network(levels)
    maps = (
        functional.interpolate(levels.p2, scale_factor=0.5, mode="bilinear", align_corners=False),
        levels.p3,
        levels.p4,
        levels.p5,
        functional.interpolate(levels.p6, size=levels.p5.shape[-2:], mode="bilinear", align_corners=False),
    )
    expected = [
        functional.interpolate(level, (size, size), mode="bilinear", align_corners=False).flatten(2)
        for level, size in zip(maps, MODEL.grid_sizes, strict=True)
    ]
    torch.testing.assert_close(predictions.category_logits, torch.cat(expected, dim=2))


def test_masks_of_cells_are_products_with_their_kernels():
    predictions = head()(pyramid(batch_size=3)).each_image()[2]
    cell = torch.tensor([5, 89, 0, 5, 17, 40])
    masks = head().mask_logits(predictions, cell)
    for mask, one in zip(masks, cell.tolist(), strict=True):
        expected = torch.einsum("d,dhw->hw", predictions.kernels[0, :, one], predictions.mask_features[0])
        torch.testing.assert_close(mask, expected)


def test_masks_of_no_cells():
    none = torch.zeros(0, dtype=torch.int64)
    assert head().mask_logits(head()(pyramid(1)), none).shape == (0, 16, 24)


def test_each_image_is_a_batch_of_one():
    predictions = head()(pyramid(batch_size=3))
    images = predictions.each_image()
    assert [len(one) for one in images] == [1, 1, 1]
    for index, one in enumerate(images):
        for own, whole in zip(columns(one), columns(predictions), strict=True):
            assert torch.equal(own[0], whole[index])
            assert own.data_ptr() == whole[index].data_ptr()


@pytest.mark.parametrize("name", ["tower_channels", "mask_tower_channels", "kernel_channels"])
def test_channels_that_groups_do_not_divide_are_refused(name):
    with pytest.raises(ValueError, match="48 channels are not divisible by the 32 groups"):
        SoloV2Head(with_head(**{name: 48}))


def test_initialisation_is_complete_and_follows_the_generator():
    networks = [Segmenter(MODEL) for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        fill_with_nan(network)
        assert network.initialise(generator(seed)) is network
    first, same, other = (network.state_dict() for network in networks)
    assert not [name for name, value in first.items() if value.isnan().any()]
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.kernel_output.weight"], other["head.kernel_output.weight"])


def test_initial_values_are_the_papers():
    network = head(with_head(tower_channels=256))
    weight = network.category_tower[1][0].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(weight.mean().item()) < 1e-4
    torch.testing.assert_close(network.category_output.bias.sigmoid(), torch.full((3,), 0.01))
    assert network.category_output.bias[0].item() == pytest.approx(-math.log(0.99 / 0.01))
    assert not network.kernel_output.bias.any()
    assert not network.embedding_output.bias.any()


def test_initialisation_leaves_the_global_generator_alone():
    network = Segmenter(MODEL)
    state = torch.get_rng_state()
    network.initialise(generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_segmenter_predicts():
    network = Segmenter(MODEL).initialise(generator()).eval()
    with torch.no_grad():
        predictions = network(torch.randn(2, 3, 64, 32, generator=generator()))
    assert predictions.category_logits.shape == (2, 3, CELLS)
    assert predictions.mask_features.shape == (2, 96, 16, 8)
    assert all(column.isfinite().all() for column in columns(predictions))


@pytest.mark.parametrize(("height", "width"), [(64, 48), (33, 64)])
def test_sizes_that_32_does_not_divide_are_refused(height, width):
    with pytest.raises(ValueError, match=f"images are {height} x {width} px: pad height and width to multiples of 32"):
        Segmenter(MODEL)(torch.zeros(1, 3, height, width))


def test_kernels_and_features_are_of_one_type_under_autocast():
    network = Segmenter(MODEL).initialise(generator()).eval()
    # CUDA's autocast computes group norms in float32; the CPU's does not, and is made to.
    network.head.mask_output.register_forward_hook(lambda module, arguments, output: output.float())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = network(torch.randn(2, 3, 64, 64, generator=generator()))
    assert predictions.kernels.dtype == predictions.mask_features.dtype == torch.bfloat16
    # As the losses call it: with autocast off.
    cell = torch.tensor([0, 30])
    assert network.head.mask_logits(predictions.each_image()[1], cell).dtype == torch.bfloat16
