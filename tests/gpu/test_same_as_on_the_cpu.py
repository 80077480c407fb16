"""Losses, gradients, masks and suppression on a GPU are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from freesolo.data.augment import contrastive_view, strong_view
from freesolo.data.copy_paste import copy_paste
from freesolo.densecl.model import DenseCL
from freesolo.freemask.algorithm import free_masks
from freesolo.inference.segment import SegmentPhotos
from freesolo.ops.affinity import colour_similarity
from freesolo.ops.masks import Projections, boxes_xywh, encode_rle, mask_iou, resize_masks_soft
from freesolo.ops.nms import matrix_nms, point_nms
from freesolo.settings import (
    DenseCLModelSettings,
    FreeMaskSettings,
    InferenceSettings,
    LossSettings,
    PredictSettings,
    SegmentationViewSettings,
    SupervisionKind,
    ViewSettings,
)
from freesolo.solo.model import Segmenter
from freesolo.solo.targets import assign_targets
from freesolo.solo.task import SoloTask
from freesolo.types import SegmentationBatch, ViewPair
from tests.benchmarks.synthetic import crowded_ellipses, photo, segmentation_batch, smooth_noise
from tests.small import small_solo

pytestmark = pytest.mark.gpu

MODEL = small_solo(embedding_channels=8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(images: int = 2, instances: int = 5) -> SegmentationBatch:
    return segmentation_batch(
        images, instances, (128, 150), generator(), padded_width=160, smallest=8, largest=90, embedding_channels=8
    )


def losses_and_gradients(
    module: nn.Module, inputs: Any, step: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In float32, of a network whose batch norms use their own statistics."""
    module = module.to(device).train()
    losses = module(inputs, step)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: one.grad.cpu() for name, one in module.named_parameters() if one.grad is not None}
    return {name: loss.detach().cpu() for name, loss in losses.items()}, gradients


def assert_same_training(make: Callable[[], nn.Module], inputs: Any, on_gpu: Any, step: int) -> None:
    losses, gradients = losses_and_gradients(make(), inputs, step, torch.device("cpu"))
    others, other_gradients = losses_and_gradients(make(), on_gpu, step, torch.device("cuda"))
    assert losses.keys() == others.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(others[name], loss, rtol=1e-3, atol=1e-5)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        # Of the whole, because rounding is relative to the terms of each sum, not to what is left where they cancel.
        assert (other_gradients[name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("supervision", ["masks", "free_masks"])
def test_solo_losses_and_gradients(gpu: torch.device, supervision: SupervisionKind) -> None:
    def make() -> SoloTask:
        return SoloTask(MODEL, supervision, LossSettings()).initialise(generator())

    one = batch()
    assert_same_training(make, (one,), (one.to(gpu),), step=500)


def test_densecl_losses_and_gradients(gpu: torch.device) -> None:
    settings = DenseCLModelSettings(backbone="resnet18", hidden_channels=32, projection_channels=16, queue_length=64)
    query, key = torch.randn(2, 8, 3, 96, 96, generator=generator())
    ids = tuple(range(8))
    assert_same_training(
        lambda: DenseCL(settings).initialise(generator()),
        ViewPair(query, key, ids),
        ViewPair(query.to(gpu), key.to(gpu), ids),
        step=0,
    )


def test_targets(gpu: torch.device) -> None:
    instances = batch(3, 12).instances
    here = assign_targets(instances, 3, 128, 160, MODEL)
    there = assign_targets(instances.to(gpu), 3, 128, 160, MODEL)
    assert torch.equal(there.categories.cpu(), here.categories)
    for name in ("instance", "image", "level", "cell"):
        assert torch.equal(getattr(there, name)[there.valid].cpu(), getattr(here, name)[here.valid])


def masks() -> Tensor:
    return crowded_ellipses(6, 10, 60, 80, generator())


def scores() -> Tensor:
    return torch.rand(60, generator=generator(1))


OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "matrix_nms": (matrix_nms, (masks(), scores(), torch.arange(60) % 3)),
    "point_nms": (point_nms, (torch.rand(2, 3, 12, 12, generator=generator()),)),
    "mask_iou": (lambda one: mask_iou(one, one), (masks(),)),
    "boxes_xywh": (boxes_xywh, (masks(),)),
    "centres_of_mass": (lambda masks: Projections.of(masks).centres_of_mass(), (masks(),)),
    "resize_masks_soft": (lambda one: resize_masks_soft(one, 37, 55), (torch.rand(4, 20, 30, generator=generator()),)),
    "colour_similarity": (
        lambda pixels, valid: colour_similarity(pixels, valid, stride=4),
        (photo(64, 96, generator())[None], torch.ones(1, 64, 96, dtype=torch.bool)),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(gpu: torch.device, name: str) -> None:
    operation, arguments = OPERATIONS[name]
    on_gpu = operation(*(argument.to(gpu) for argument in arguments))
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), operation(*arguments), rtol=1e-5, atol=1e-5)


def test_run_lengths(gpu: torch.device) -> None:
    assert encode_rle(masks().to(gpu)) == encode_rle(masks())


def test_free_masks(gpu: torch.device) -> None:
    features = torch.stack(
        [smooth_noise(64, 20, 27, generator(seed), cells=5, roughness=0.3) for seed in (0, 1)]
    ).relu()
    sizes = [(120, 160), (90, 121)]
    here = free_masks(features, sizes, FreeMaskSettings(top_border=0.0))
    there = free_masks(features.to(gpu), sizes, FreeMaskSettings(top_border=0.0))
    assert sum(len(one.scores) for one in here) > 0
    for one, other in zip(here, there, strict=True):
        assert torch.equal(other.query_index.cpu(), one.query_index)
        torch.testing.assert_close(other.scores.cpu(), one.scores, rtol=1e-4, atol=1e-5)
        assert (
            other.masks.pixels() != one.masks.pixels()
        ).float().mean() < 1e-3  # a soft value within rounding of the threshold


def test_views_with_the_same_random_numbers(gpu: torch.device) -> None:
    crops = torch.stack([photo(96, 96, generator(seed)) for seed in range(6)])
    here = contrastive_view(crops, ViewSettings(), generator())
    there = contrastive_view(crops.to(gpu), ViewSettings(), generator())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
    one = batch(4)
    colours = SegmentationViewSettings(erasing_probabilities=())
    strong = strong_view(one.images, colours, generator()).pixels.int()
    strong_there = strong_view(one.to(gpu).images, colours, generator()).pixels.int().cpu()
    assert (strong - strong_there).abs().max() <= 1  # rounded to whole colours
    pasted, pasted_there = copy_paste(one, generator()), copy_paste(one.to(gpu), generator())
    assert torch.equal(pasted_there.instances.image_index.cpu(), pasted.instances.image_index)
    assert torch.equal(pasted_there.instances.masks.cpu(), pasted.instances.masks)


def test_segmenting_in_bfloat16_finds_what_float32_finds(gpu: torch.device) -> None:
    settings = small_solo(embedding_channels=8)
    segmenter = Segmenter(settings).initialise(generator())
    nn.init.constant_(segmenter.head.category_output.bias, 0.0)  # an object everywhere, not in 1% of the cells
    post_processing = InferenceSettings(min_category_score=0.0, min_score=0.0, max_instances=20)
    predict = PredictSettings(short_side=128, long_side_max=192, inference=post_processing)
    photos = [photo(100, 140, generator(seed)).permute(1, 2, 0).numpy() for seed in (0, 1, 2)]
    here = SegmentPhotos(segmenter, predict)(photos)
    there = SegmentPhotos(segmenter, predict, gpu)(photos)
    for one, other in zip(here, there, strict=True):
        assert len(one) > 0
        assert other.masks.shape[1:] == (100, 140)
        # Untrained masks are noise about the threshold, and scores within rounding change places.
        assert mask_iou(one.masks[:5], other.masks.cpu()).amax(dim=1).mean() > 0.8


def test_embeddings_are_of_length_one(gpu: torch.device) -> None:
    features = functional.relu(torch.randn(1, 64, 12, 16, generator=generator())).to(gpu)
    (found,) = free_masks(features, [(48, 64)], FreeMaskSettings(min_maskness=0.0, top_border=0.0))
    torch.testing.assert_close(found.embeddings.norm(dim=1).cpu(), torch.ones(len(found.scores)))
