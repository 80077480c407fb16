"""A training step of SOLOv2 with an R50 at 640 px: forward, losses, backward, optimiser.

The peer is torchvision's Mask R-CNN with the same backbone on the same photos, objects and precision: another network,
and the yardstick that people know. What limits either is arithmetic: ours is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from freesolo.ops.masks import boxes_xyxy
from freesolo.settings import (
    LoopSettings,
    LossSettings,
    OptimizerSettings,
    SegmentationViewSettings,
    SoloModelSettings,
    SupervisionKind,
)
from freesolo.solo.task import SoloTask
from freesolo.train.learner import Learner
from freesolo.train.tasks import SoloTraining
from freesolo.types import SegmentationBatch
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.synthetic import segmentation_batch

STEP = 1000
"""Optimiser steps taken: the pairwise term is past its warm-up."""


def cases(device: torch.device, images: int = 4, model: SoloModelSettings | None = None) -> tuple[Case[Any, Any], ...]:
    """A step on masks, and one on free masks."""
    model = model or SoloModelSettings()
    batch = photos_with_objects(images, model).to(device)
    peer = mask_rcnn_step(batch, device)
    steps = {supervision: solo_step(batch, device, supervision, model) for supervision in ("masks", "free_masks")}
    return tuple(
        Case(
            name=f"supervision: {supervision}",
            peer_name="torchvision's Mask R-CNN R50-FPN",
            ours=step,
            peer=peer,
            assert_equal=assert_trained,
            repeats=5,
            flops=flops_of(step),
        )
        for supervision, step in steps.items()
    )


def photos_with_objects(images: int, model: SoloModelSettings) -> SegmentationBatch:
    """Photos of 640 x 853 px with 20 objects in each."""
    return segmentation_batch(
        images,
        20,
        (640, 853),
        torch.Generator().manual_seed(0),
        padded_width=864,
        smallest=16,
        largest=320,
        embedding_channels=model.embedding_channels,
    )


def solo_step(
    batch: SegmentationBatch, device: torch.device, supervision: SupervisionKind, model: SoloModelSettings
) -> Callable[[], Tensor]:
    """What the training loop does with a batch that is on the device; gives the loss."""
    task = SoloTask(model, supervision, LossSettings())
    task.initialise(torch.Generator().manual_seed(0))
    training = SoloTraining(task, SegmentationViewSettings(strong=False))
    learner = Learner(training, LoopSettings(steps=1, batch_size=1), OptimizerSettings(learning_rate=1e-4), device)

    def step() -> Tensor:
        with learner.autocast():
            losses = task((batch,), STEP)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        learner.clip_gradients(35.0)
        learner.step()
        return loss.detach()

    return step


def mask_rcnn_step(batch: SegmentationBatch, device: torch.device) -> Callable[[], Tensor]:
    """A step of torchvision's Mask R-CNN on the same batch, its own resizing left out."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    height, width = batch.images.pixels.shape[-2:]
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=height, max_size=width, trainable_backbone_layers=5
    )
    model.to(device).train()
    images = list(batch.images.pixels.float() / 255)
    wanted = []
    for image in range(len(batch)):
        own = batch.instances.of_image(image)
        labels = torch.ones(len(own), dtype=torch.int64, device=device)
        wanted.append({"boxes": boxes_xyxy(own.masks), "labels": labels, "masks": own.masks.byte()})

    return peers_step(model, lambda: model(images, wanted).values(), device)


def peers_step(
    model: nn.Module, losses_of_batch: Callable[[], Iterable[Tensor]], device: torch.device
) -> Callable[[], Tensor]:
    """A step of a network that is not ours; gives the sum of its losses, which is minimised."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = losses_of_batch()
        loss = torch.stack([one.sum() for one in losses]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 35.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def flops_of(step: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and convolutions in a call, counted while it is made once."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def assert_trained(ours: Tensor, peer: Tensor) -> None:
    """Other networks have other losses; both must have something to learn."""
    assert 0 < float(ours) < float("inf")
    assert 0 < float(peer) < float("inf")


BENCHMARK = Benchmark(
    name="solo_train_step",
    inputs="4 photos of 640 x 853 px, 20 instances in each, R50; bfloat16 autocast on a GPU",
    cases=cases,
    needs=("torchvision",),
)
