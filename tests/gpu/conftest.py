"""What only a GPU can show. Needs torch, numpy, pydantic, jaxtyping, pycocotools and Pillow: no cluster, no tracker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """TF32 off, so that what is compared with the CPU's is of the same precision."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def gpu() -> torch.device:
    """The GPU; a test that was asked for and has none fails."""
    assert torch.cuda.is_available(), "this machine has no CUDA device that torch can use: run these tests on one"
    return torch.device("cuda")
