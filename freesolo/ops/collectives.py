"""What crosses between workers. Every function does nothing, correctly, where there is only one.

None of these carries a gradient: losses that normalise by global counts sum counts, and DDP averages the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """How many workers train together; 1 without a process group."""
    return distributed.get_world_size() if _has_group() else 1


def rank() -> int:
    """Which of the workers this is, from 0; 0 without a process group."""
    return distributed.get_rank() if _has_group() else 0


@torch.no_grad()
def gather_from_all_workers(tensor: Tensor) -> Tensor:
    """All workers' tensors concatenated along the first dimension, in order of rank, without gradient.

    Args:
        tensor: Of at least one dimension, and of the same shape and type on every worker.
    """
    if world_size() == 1:
        return tensor.detach()
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    distributed.all_gather(gathered, tensor.detach().contiguous())
    return torch.cat(gathered)


@torch.no_grad()
def sum_over_workers(tensor: Tensor) -> Tensor:
    """The elementwise sum of all workers' tensors, a new tensor, without gradient.

    Args:
        tensor: Of the same shape and type on every worker.
    """
    total = tensor.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def from_all_workers(items: list[Any]) -> list[Any]:
    """All workers' items in one list, worker 0's first; every worker gets it. Called on all of them together.

    Args:
        items: This worker's; picklable.
    """
    if world_size() == 1:
        return items
    gathered: list[list[Any]] = [[] for _ in range(world_size())]
    distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def _has_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
