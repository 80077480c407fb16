"""DenseCL's losses (arXiv:2011.09157) sec. 3.2 and 3.3; every vector that comes in is L2-normalised.

B  images    S2  cells of a map, row by row    D  channels of a projection    K  vectors in a queue
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def info_nce(
    query: Float[Tensor, "N D"],
    positive: Float[Tensor, "N D"],
    queue: Float[Tensor, "K D"],
    temperature: float,
) -> Float[Tensor, ""]:
    """How badly each query tells its positive from the negatives of the queue.

    The cross-entropy of `softmax([q . k+, q . k_1, ..., q . k_K] / temperature)` with its first entry as the truth.
    Source: arXiv:1807.03748 eq. 4, as in MoCo (arXiv:1911.05722) eq. 1.

    Args:
        query: At least one.
        positive: Row i is the positive of `query`'s row i.
        queue: Negatives of all of them.
        temperature: Divides the similarities.

    Returns:
        The mean over the queries, float32; under autocast the similarities are rounded as its products are.
    """
    # Positives and negatives stay apart: joined, the (N, K) similarities would be copied once more.
    attraction = (query * positive).sum(dim=1).float() / temperature
    repulsion = (query @ queue.T).float() / temperature
    return (torch.logaddexp(attraction, repulsion.logsumexp(dim=1)) - attraction).mean()


@torch.no_grad()
def match_cells(
    query_features: Float[Tensor, "B C S2"], key_features: Float[Tensor, "B C S2"]
) -> Int64[Tensor, "B S2"]:
    """The cell of the key view that looks most like each cell of the query view, by the backbones' features.

    Source: arXiv:2011.09157 sec. 3.3. No gradient flows through the choice. In float32 under autocast too: in bfloat16
    the cosines of like features would often be equal, and the choice the first of them.
    """
    with torch.autocast(query_features.device.type, enabled=False):
        return torch.bmm(query_features.float().transpose(1, 2), key_features.float()).argmax(dim=2)


def dense_loss(
    query: Float[Tensor, "B D S2"],
    key: Float[Tensor, "B D S2"],
    matches: Int64[Tensor, "B S2"],
    queue: Float[Tensor, "K D"],
    temperature: float,
) -> Float[Tensor, ""]:
    """InfoNCE of every cell of the query view against its matched cell of the key view.

    Source: arXiv:2011.09157 eq. 2.

    Args:
        query: Dense projections of the query view.
        key: Dense projections of the key view.
        matches: For each cell of `query`, the cell of `key` that is its positive, as `match_cells` finds it.
        queue: Negatives: other images' dense keys, averaged over space.
        temperature: Divides the similarities.

    Returns:
        The mean over all images' cells.
    """
    positives = key.gather(2, matches[:, None, :].expand(-1, key.shape[1], -1))
    return info_nce(query.mT.flatten(0, 1), positives.mT.flatten(0, 1), queue, temperature)
