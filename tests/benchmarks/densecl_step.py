"""A step of DenseCL with an R50 on two 224 px views of each photo: both encoders, losses, backward, momentum, queues.

The peer is lightly's DenseCL example with the same backbone, batch and precision, its key views encoded by its momentum
encoder as the paper has it (the example encodes them by the query encoder); it keeps 4,096 keys in its queues.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from freesolo.densecl.model import DenseCL
from freesolo.settings import DenseCLModelSettings, LoopSettings, OptimizerSettings, ViewSettings
from freesolo.train.learner import Learner
from freesolo.train.tasks import DenseCLTraining
from freesolo.types import ViewPair
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.solo_train_step import assert_trained, flops_of

LIGHTLYS_QUEUE = 4096


def cases(device: torch.device) -> tuple[Case[Any, Any], ...]:
    """A step of a batch that fits the device: 128 photos on a GPU, 16 else."""
    photos = 128 if device.type == "cuda" else 16
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, photos, 3, 224, 224, generator=generator).to(device)
    views = ViewPair(query, key, tuple(range(photos)))
    peer = lightly_step(views, device)
    cases = []
    for queue in (LIGHTLYS_QUEUE, DenseCLModelSettings().queue_length):
        step = densecl_step(views, device, queue)
        case: Case[Any, Any] = Case(
            name=f"{photos} photos, queues of {queue:,}",
            peer_name=f"lightly's example, queues of {LIGHTLYS_QUEUE:,}",
            ours=step,
            peer=peer,
            assert_equal=assert_trained,
            repeats=5,
            flops=flops_of(step),
        )
        cases.append(case)
    return tuple(cases)


def densecl_step(views: ViewPair, device: torch.device, queue_length: int) -> Callable[[], Tensor]:
    """What the training loop does with a batch of views that is on the device; gives the loss."""
    model = DenseCL(DenseCLModelSettings(queue_length=queue_length))
    model.initialise(torch.Generator().manual_seed(0))
    training = DenseCLTraining(model, ViewSettings())
    learner = Learner(training, LoopSettings(steps=1, batch_size=1), OptimizerSettings(learning_rate=0.03), device)

    def step() -> Tensor:
        with learner.autocast():
            losses = model(views, 0)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        learner.clip_gradients(None)
        learner.step()
        training.after_step(0)
        return loss.detach()

    return step


def lightly_step(views: ViewPair, device: torch.device) -> Callable[[], Tensor]:
    """The body of the example's loop, on views that are on the device."""
    from lightly.loss import NTXentLoss
    from lightly.models import utils
    from lightly.models.modules import DenseCLProjectionHead
    from torchvision.models import resnet50

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(resnet50(weights=None).children())[:-2])
            self.global_head = DenseCLProjectionHead(2048, 2048, 128)
            self.local_head = DenseCLProjectionHead(2048, 2048, 128)
            self.pool = nn.AdaptiveAvgPool2d((1, 1))

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            features = self.backbone(images)
            pooled = self.global_head(self.pool(features).flatten(start_dim=1))
            cells = features.flatten(start_dim=2).permute(0, 2, 1)
            return cells, pooled, self.local_head(cells)

    encoder = Encoder().to(device)
    momentum_encoder = copy.deepcopy(encoder)
    utils.deactivate_requires_grad(momentum_encoder)
    global_loss = NTXentLoss(temperature=0.2, memory_bank_size=(LIGHTLYS_QUEUE, 128)).to(device)
    local_loss = NTXentLoss(temperature=0.2, memory_bank_size=(LIGHTLYS_QUEUE, 128)).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)

    def step() -> Tensor:
        utils.update_momentum(encoder, momentum_encoder, m=0.999)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            query_cells, query_global, query_local = encoder(views.query)
            with torch.no_grad():
                key_cells, key_global, key_local = momentum_encoder(views.key)
            key_local = utils.select_most_similar(query_cells, key_cells, key_local)
            one = global_loss(query_global, key_global)
            other = local_loss(query_local.flatten(end_dim=1), key_local.flatten(end_dim=1))
            loss = 0.5 * one + 0.5 * other
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


BENCHMARK = Benchmark(
    name="densecl_step",
    inputs="two views of 224 px of each photo, R50; bfloat16 autocast on a GPU",
    cases=cases,
    needs=("lightly", "torchvision"),
)
