"""Products of many vectors with one another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCKS = 4


def gram(vectors: Float[Tensor, "N D"]) -> Float[Tensor, "N N"]:
    """The dot product of every pair; N may be 0.

    On a CPU those above the diagonal are computed and the others are copies of them: of 4 x 4 blocks 10 products
    instead of 16. On a GPU the launches would cost more than that saves.
    """
    if vectors.device.type != "cpu":
        return vectors @ vectors.T
    count = vectors.shape[0]
    products = vectors.new_empty(count, count)
    step = max(1, -(-count // _BLOCKS))
    for start in range(0, count, step):
        stop = min(start + step, count)
        torch.mm(vectors[start:stop], vectors[start:].T, out=products[start:stop, start:])
        products[stop:, start:stop] = products[start:stop, stop:].T
    return products
