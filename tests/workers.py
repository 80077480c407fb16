"""Functions run on several workers at once, as processes joined by gloo."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

PATIENCE = timedelta(seconds=120)  # of a worker that was left alone


def on_workers(count: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call `function(worker, folder, *arguments)` on every one of `count` workers, and wait for all.

    Args:
        count: How many workers.
        function: Of a module, so that a new process finds it by its name.
        folder: Where they leave their results.
        arguments: Picklable.

    Raises:
        ProcessRaisedException: A worker raised an error; the others are stopped.
        ProcessExitedException: A worker died.
    """
    multiprocessing.spawn(_work, (count, function, folder, arguments), nprocs=count)


def _work(worker: int, count: int, function: Callable[..., None], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'workers'}"
    distributed.init_process_group("gloo", meeting, rank=worker, world_size=count, timeout=PATIENCE)
    function(worker, folder, *arguments)
    distributed.destroy_process_group()
    # A DDP module that is still alive (in a traceback, say) keeps the group's threads, and a thread that frees a tensor
    # while the interpreter goes down aborts the process: https://github.com/pytorch/pytorch/pull/179291
    gc.collect()
