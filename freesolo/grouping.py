"""Objects that look alike to a model, told by their semantic embeddings: groups of them, and each one's nearest.

Legend of shapes: N objects, E channels of an embedding. Only an embedding's direction counts: how alike two objects are
is the cosine of the angle between theirs, in [-1, 1]. An embedding of zeros is like nothing, itself included.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int64

STARTS = 4
"""Of k-means, of which the tightest result counts."""

_DECIMALS = 4
"""Of a normalised embedding; float16, in which they are stored, holds hardly more."""

_COSINE_DECIMALS = 9
"""Of a cosine: sums in another order differ beyond, and equal embeddings are to be equally alike."""


def group_embeddings(
    embeddings: Float[np.ndarray, "N E"], groups: int, *, seed: int = 0
) -> tuple[Int64[np.ndarray, " members"], ...]:
    """Gather objects in groups by k-means over their directions (scikit-learn's, Lloyd's algorithm from k-means++).

    Args:
        embeddings: N or E may be 0.
        groups: How many, at least 1; there are fewer where there are fewer different embeddings, so that objects of
            equal embeddings are one group.
        seed: Of the starts. The same embeddings, number and seed give the same groups.

    Returns:
        Indices of the objects, each in one group: the largest group first, of equal ones the one with the lowest
        index; in a group the most central first, by the cosine to the mean of the group's directions, of equal ones the
        lowest index. No group where N is 0.

    Raises:
        ValueError: If `groups` is below 1.
    """
    if groups < 1:
        raise ValueError(f"{groups} groups: ask for at least one")
    if len(embeddings) == 0:
        return ()
    # Rounded, embeddings are either equal or far enough apart for k-means to find as many groups as it is asked for.
    directions = np.round(_directions(embeddings), _DECIMALS)
    groups = min(groups, len(np.unique(directions, axis=0)))
    assigned = np.zeros(len(directions), np.int64) if groups == 1 else _k_means(directions, groups, seed)
    found = [_by_centrality(directions, np.flatnonzero(assigned == group)) for group in np.unique(assigned)]
    return tuple(sorted(found, key=lambda members: (-len(members), int(members.min()))))


def nearest_objects(
    embeddings: Float[np.ndarray, "N E"], of: Int64[np.ndarray, " M"], count: int
) -> tuple[Int64[np.ndarray, "M K"], Float64[np.ndarray, "M K"]]:
    """The other objects whose embeddings are most like those of some.

    Args:
        embeddings: N or E may be 0.
        of: Indices of those whose nearest are asked for; M may be 0.
        count: How many for each; K is that, or N - 1 where there are fewer others.

    Returns:
        Indices, the most alike first, of equally alike ones the lowest index; and the cosines.
    """
    directions = _directions(embeddings)
    kept = max(0, min(count, len(directions) - 1))
    cosines = np.round(directions[of] @ directions.T, _COSINE_DECIMALS)
    cosines[np.arange(len(of)), of] = -np.inf
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :kept].astype(np.int64)
    return nearest, np.take_along_axis(cosines, nearest, axis=1)


def _directions(embeddings: Float[np.ndarray, "N E"]) -> Float64[np.ndarray, "N E"]:
    """Embeddings of length 1; zeros stay zeros."""
    values = embeddings.astype(np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    directions: Float64[np.ndarray, "N E"] = np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
    return directions


def _k_means(directions: Float64[np.ndarray, "N E"], groups: int, seed: int) -> Int64[np.ndarray, " N"]:
    # Slow to import, which a process that groups nothing need not wait for.
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # Of several threads the sums come in no fixed order, and a pod has fewer cores than its node shows.
    with threadpool_limits(1):
        assigned: np.ndarray = KMeans(groups, n_init=STARTS, random_state=seed).fit_predict(directions)
    return assigned.astype(np.int64)


def _by_centrality(
    directions: Float64[np.ndarray, "N E"], members: Int64[np.ndarray, " members"]
) -> Int64[np.ndarray, " members"]:
    likeness = np.round(directions[members] @ directions[members].mean(axis=0), _COSINE_DECIMALS)
    order: Int64[np.ndarray, " members"] = members[np.argsort(-likeness, kind="stable")]
    return order
