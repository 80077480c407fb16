"""How good frozen features are, in numbers that need no training: arithmetic alone, as `train.probe` calls it.

B  images    N  vectors    C  channels    S  cells on a side of a square map    S2  its cells, row by row
Every vector that comes in is L2-normalised over its channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from freesolo.densecl.loss import match_cells


def retrieval_hits(query: Float[Tensor, "N C"], key: Float[Tensor, "N C"]) -> Bool[Tensor, " N"]:
    """Which images are found again: of all key views, the nearest to the query view is of the same image.

    Instance discrimination (arXiv:1805.01978) as a search. Guesses, and features that are all the same, find 1 in N.

    Args:
        query: A view of each image; N may be 0.
        key: Row i is another view of the image of `query`'s row i.
    """
    if not len(query):
        return torch.zeros(0, dtype=torch.bool, device=query.device)
    return (query @ key.T).argmax(dim=1) == torch.arange(len(query), device=query.device)


def true_cells(
    query_boxes_xywh: Float[Tensor, "B 4"], key_boxes_xywh: Float[Tensor, "B 4"], side: int
) -> Int64[Tensor, "B S2"]:
    """Which cell of the key crop has each cell of the query crop's middle in it.

    Args:
        query_boxes_xywh: Where in its photo each query crop lies, in px; none is empty. B may be 0.
        key_boxes_xywh: Where in the same photo the key crop lies.
        side: Cells on a side of both crops' maps.

    Returns:
        Cells of the key crop; -1 for a cell whose middle is not in it.
    """
    middles = (torch.arange(side, device=query_boxes_xywh.device) + 0.5) / side
    places = []
    for axis in (0, 1):  # columns, then rows
        start, length = query_boxes_xywh[:, axis, None], query_boxes_xywh[:, axis + 2, None]
        key_start, key_length = key_boxes_xywh[:, axis, None], key_boxes_xywh[:, axis + 2, None]
        places.append(((start + middles * length - key_start) / key_length * side).floor().long())
    column, row = places[0][:, None, :], places[1][:, :, None]
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    return torch.where(inside, row * side + column, -1).flatten(1)


def cell_hits(
    query_features: Float[Tensor, "B C S2"], key_features: Float[Tensor, "B C S2"], truth: Int64[Tensor, "B S2"]
) -> Bool[Tensor, "B S2"]:
    """Which cells are matched with the true cell of the other view, by DenseCL's own rule (arXiv:2011.09157 sec. 3.3).

    Guesses find 1 in S2.

    Args:
        query_features: Of a view of each image; B may be 0.
        key_features: Of another view of it.
        truth: As `true_cells` gives it; a cell of which it is -1 is no hit.
    """
    return match_cells(query_features, key_features) == truth


def knn_hits(
    features: Float[Tensor, "N C"],
    categories: Int64[Tensor, " N"],
    photos: Int64[Tensor, " N"],
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> Bool[Tensor, " N"]:
    """Which objects a vote of their nearest neighbours puts into their own category.

    Source: Wu et al. (arXiv:1805.01978) sec. 3.4: each of the k nearest votes for its category with the weight
    `exp(cosine / temperature)`. Each object is classified by all others but those of its own photo, whose features
    know of it. Of categories with equal votes the first wins.

    Args:
        features: One an object; N may be 0.
        categories: 0..K-1.
        photos: Which photo each object is in.
        neighbours: That vote; fewer where there are fewer.
        temperature: Divides the similarities.

    Returns:
        False too where all objects are in one photo, and nobody votes.
    """
    if not len(features):
        return torch.zeros(0, dtype=torch.bool, device=features.device)
    same_photo = photos[:, None] == photos[None, :]
    similarity = (features @ features.T).masked_fill(same_photo, -torch.inf)
    nearest, voters = similarity.topk(min(neighbours, len(features)), dim=1)
    votes = torch.zeros(len(features), int(categories.max()) + 1, device=features.device)
    # One is taken off each cosine: the order of the votes is the same, and no weight is above 1.
    votes.scatter_add_(1, categories[voters], ((nearest - 1) / temperature).exp())
    most, winners = votes.max(dim=1)
    return (winners == categories) & (most > 0)


def similarity_map(features: Float[Tensor, "C H W"], x: float, y: float) -> Float[Tensor, "H W"]:
    """The cosine of each cell's feature with that of the cell at a point.

    Args:
        features: Of one photo.
        x: Of the point, as a share of the width, in [0, 1).
        y: As a share of the height, in [0, 1).
    """
    height, width = features.shape[1:]
    point = features[:, int(y * height), int(x * width)]
    return torch.einsum("chw,c->hw", features, point)
