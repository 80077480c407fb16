"""DenseCL (arXiv:2011.09157) sec. 3: a query encoder, a momentum key encoder, two queues.

    view (B, 3, H, W) -> ResNet -> C5 (B, C, H/32, W/32) -> neck:
        global  average pool -> Linear -> ReLU -> Linear                     (B, D)
        dense   [adaptive pool to S x S] -> 1x1 conv -> ReLU -> 1x1 conv     (B, D, S, S)
        pooled  mean of the dense map over space                             (B, D)

State: `query.*`, `key.*` (no gradient), `global_queue`, `dense_queue`, `queue_pointer`; all of it is in the
state dict. Under DDP pass `broadcast_buffers=False`: every worker computes the same queues, and batch norm's running
statistics are each worker's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from freesolo.densecl.loss import dense_loss, info_nce, match_cells
from freesolo.errors import UsageError
from freesolo.models.resnet import ResNet, build_resnet
from freesolo.ops.collectives import gather_from_all_workers, rank, world_size
from freesolo.settings import DenseCLModelSettings
from freesolo.types import ViewPair


class Encoding(NamedTuple):
    """What an encoder makes of a batch of views; every vector L2-normalised over its channels."""

    features: Float[Tensor, "B C S2"]  # of the backbone: what correspondence is found by
    image: Float[Tensor, "B D"]  # the global head's
    dense: Float[Tensor, "B D S2"]  # the dense head's, a cell a column, row by row
    pooled: Float[Tensor, "B D"]  # the dense head's mean over space


class Neck(nn.Module):
    """The global and the dense projection head (arXiv:2011.09157 sec. 3.2)."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__()
        self.global_head = nn.Sequential(
            nn.Linear(in_channels, hidden_channels), nn.ReLU(inplace=True), nn.Linear(hidden_channels, out_channels)
        )
        self.dense_head = nn.Sequential(
            nn.Conv2d(in_channels, hidden_channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_channels, out_channels, 1),
        )

    def forward(
        self, features: Float[Tensor, "B C H W"], grid: Float[Tensor, "B C S S"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D S S"]]:
        """The global projection of `features` and the dense one of `grid`, neither normalised."""
        return self.global_head(features.mean(dim=(2, 3))), self.dense_head(grid)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every parameter: uniform within one over the root of the fan in, as in MoCo v2's heads."""
        for layer in (*self.global_head, *self.dense_head):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                assert layer.bias is not None
                bound = layer.weight[0].numel() ** -0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


class Encoder(nn.Module):
    """A backbone and its neck."""

    def __init__(self, settings: DenseCLModelSettings) -> None:
        super().__init__()
        self.grid_size = settings.grid_size
        self.backbone = build_resnet(settings.backbone)
        self.neck = Neck(self.backbone.channels[-1], settings.hidden_channels, settings.projection_channels)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Encoding:
        """Encode normalised RGB views."""
        features = self.backbone(images).c5
        grid = features if self.grid_size is None else functional.adaptive_avg_pool2d(features, self.grid_size)
        image, dense = self.neck(features, grid)
        return Encoding(
            features=functional.normalize(grid.flatten(2), dim=1),
            image=functional.normalize(image, dim=1),
            dense=functional.normalize(dense.flatten(2), dim=1),
            pooled=functional.normalize(dense.mean(dim=(2, 3)), dim=1),
        )


class DenseCL(nn.Module):
    """Dense contrastive pre-training; with `dense_loss_weight` 0 it is MoCo v2 (arXiv:2003.04297).

    Attributes:
        settings: What it was built from.
    """

    global_queue: Float[Tensor, "K D"]
    dense_queue: Float[Tensor, "K D"]
    queue_pointer: Tensor

    def __init__(self, settings: DenseCLModelSettings) -> None:
        """Build the networks; their values are undefined until `initialise` or a checkpoint sets them.

        In a process group of several workers `batch_norm: sync` makes every batch norm a synchronised one.
        """
        super().__init__()
        self.settings = settings
        self.query = Encoder(settings)
        self.key = Encoder(settings)
        self.synchronised = settings.batch_norm == "sync" and world_size() > 1
        if self.synchronised:
            self.query = nn.SyncBatchNorm.convert_sync_batchnorm(self.query)
            self.key = nn.SyncBatchNorm.convert_sync_batchnorm(self.key)
        self.key.requires_grad_(False)
        shape = (settings.queue_length, settings.projection_channels)
        self.register_buffer("global_queue", torch.zeros(shape))
        self.register_buffer("dense_queue", torch.zeros(shape))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    @property
    def backbone(self) -> ResNet:
        """The query encoder's backbone: what pre-training is for."""
        return self.query.backbone

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> DenseCL:
        """Set every parameter and buffer: a random query encoder, an equal key encoder, queues of random directions."""
        self.query.backbone.initialise(generator)
        self.query.neck.initialise(generator)
        self.copy_query_to_key()
        for queue in (self.global_queue, self.dense_queue):
            queue.normal_(generator=generator)
            queue.copy_(functional.normalize(queue, dim=1))
        self.queue_pointer.zero_()
        return self

    def copy_query_to_key(self) -> None:
        """Make the key encoder equal to the query encoder: after pre-trained weights are loaded into `backbone`."""
        self.key.load_state_dict(self.query.state_dict())

    def forward(self, views: ViewPair, step: int) -> dict[str, Float[Tensor, ""]]:
        """The weighted losses of a batch; then the batch's keys take the place of the queues' oldest.

        Args:
            views: This worker's share of the batch; every worker has as many.
            step: Optimiser steps made so far; the dense loss begins at `dense_loss_warmup_steps`.

        Returns:
            `global`: (1 - lambda) L_global. `dense`: lambda L_dense. Their sum is the loss (arXiv:2011.09157 eq. 3).

        Raises:
            UsageError: The queue's length is not divisible by all workers' batch together; or batch norm is to be
                synchronised on a CPU.
        """
        self._check(views)
        query = self.query(views.query)
        key = self._encode_keys(views.key, step)
        weight = self.settings.dense_loss_weight if step >= self.settings.dense_loss_warmup_steps else 0.0
        losses = {
            "global": (1 - weight) * self._global_loss(query, key),
            # Without it a zero that depends on the dense head: DDP waits for the gradient of every parameter.
            "dense": weight * self._dense_loss(query, key) if weight else query.dense[..., :0].float().sum(),
        }
        self._enqueue(key)
        return losses

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the key encoder towards the query encoder: `theta_k <- m theta_k + (1 - m) theta_q`.

        To be called once after each optimiser step. The paper does it before the next key forward, which is the same:
        nothing reads the key encoder in between, and before the first step the two encoders are equal.

        Args:
            step: The optimiser step just made; the momentum is the same at each.
        """
        del step
        # Batch norm's running statistics are not averaged: the key encoder gathers its own.
        update = get_ema_multi_avg_fn(self.settings.momentum)
        update(list(self.key.parameters()), list(self.query.parameters()), 0)

    def _check(self, views: ViewPair) -> None:
        batch, length = len(views) * world_size(), self.settings.queue_length
        if length % batch:
            raise UsageError(
                f"model.queue_length={length} is not divisible by loop.batch_size={batch}: the queue is replaced a "
                "whole batch at a time; set one to a multiple of the other"
            )
        if self.synchronised and self.training and views.query.device.type == "cpu":
            raise UsageError("model.batch_norm=sync needs GPUs; on CPU set model.batch_norm=shuffle")

    def _global_loss(self, query: Encoding, key: Encoding) -> Float[Tensor, ""]:
        # The clone, here and below: backward needs the queue as it is now, and it is about to be written to.
        return info_nce(query.image, key.image, self.global_queue.clone(), self.settings.temperature)

    def _dense_loss(self, query: Encoding, key: Encoding) -> Float[Tensor, ""]:
        matches = match_cells(query.features, key.features)
        return dense_loss(query.dense, key.dense, matches, self.dense_queue.clone(), self.settings.temperature)

    @torch.no_grad()
    def _encode_keys(self, images: Float[Tensor, "B 3 H W"], step: int) -> Encoding:
        """Encode the key views; among several workers in an order that batch norm's statistics cannot give away.

        Source: MoCo (arXiv:1911.05722) sec. 3.3. Every worker draws the same permutation of all workers' images, as
        its generator is seeded by the step alone, encodes its part of it, and takes its own images' encodings back.
        """
        if self.settings.batch_norm != "shuffle" or world_size() == 1 or not self.training:
            return Encoding(*self.key(images))
        everyones = gather_from_all_workers(images)
        permutation = torch.randperm(len(everyones), generator=torch.Generator().manual_seed(step))
        parts = permutation.to(images.device).reshape(world_size(), -1)
        encoding = self.key(everyones[parts[rank()]])
        mine = permutation.argsort().to(images.device).reshape(world_size(), -1)[rank()]
        return Encoding(*(gather_from_all_workers(vectors)[mine] for vectors in encoding))

    @torch.no_grad()
    def _enqueue(self, key: Encoding) -> None:
        image, pooled = gather_from_all_workers(key.image), gather_from_all_workers(key.pooled)
        # Indices are made on the device: reading the pointer would wait for it.
        rows = (self.queue_pointer + torch.arange(len(image), device=image.device)) % self.settings.queue_length
        self.global_queue.index_copy_(0, rows, image.to(self.global_queue.dtype))
        self.dense_queue.index_copy_(0, rows, pooled.to(self.dense_queue.dtype))
        self.queue_pointer.add_(len(image)).remainder_(self.settings.queue_length)
