"""A mask's border as the path of an SVG, exact to the pixel, so that a browser can tint, outline and hide it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64


def outline_path(mask: Bool[np.ndarray, "H W"]) -> str:
    """The mask's border along pixel edges, to be filled by the even-odd rule.

    The border turns only where two by two pixels hold an odd number of the mask's, or two across a diagonal. Walked
    along a row of pixel corners, each turn at an even place starts a horizontal run that ends at the next one; the
    same holds down a column. Following runs from turn to turn, now across, now down, gives the closed polygons.

    Args:
        mask: Of any shape; parts and holes as many as there are.

    Returns:
        Path data in pixels, x to the right and y down, such as "M3 1h2v1h-2z"; empty for an empty mask.
    """
    rows, columns = _turns(mask)
    across = _partners(np.arange(len(rows)))
    # Stable, so that of two turns at one point the first goes left and up, the second right and down.
    down = _partners(np.lexsort((rows, columns)))
    x, y, next_across, next_down = columns.tolist(), rows.tolist(), across.tolist(), down.tolist()
    visited = [False] * len(x)
    path: list[str] = []
    for start in range(len(x)):
        if visited[start]:
            continue
        path.append(f"M{x[start]} {y[start]}")
        here = start
        while not visited[here]:
            corner = next_across[here]
            after = next_down[corner]
            visited[here] = visited[corner] = True
            path.append(f"h{x[corner] - x[here]}")
            if after != start:  # closing the path draws the last edge
                path.append(f"v{y[after] - y[corner]}")
            here = after
        path.append("z")
    return "".join(path)


def _turns(mask: Bool[np.ndarray, "H W"]) -> tuple[Int64[np.ndarray, " turns"], Int64[np.ndarray, " turns"]]:
    """Row and column of every pixel corner at which the border turns, row by row; points where it does twice, twice."""
    padded = np.pad(mask, 1)
    top_left, top_right = padded[:-1, :-1], padded[:-1, 1:]
    bottom_left, bottom_right = padded[1:, :-1], padded[1:, 1:]
    odd = top_left ^ top_right ^ bottom_left ^ bottom_right
    diagonal = (top_left == bottom_right) & (top_right == bottom_left) & (top_left != top_right)
    times = odd.astype(np.int64) + 2 * diagonal
    rows, columns = np.nonzero(times)
    repeats = times[rows, columns]
    return np.repeat(rows, repeats), np.repeat(columns, repeats)


def _partners(order: Int64[np.ndarray, " turns"]) -> Int64[np.ndarray, " turns"]:
    """Of each turn, the other end of its run, where `order` lists the two ends of each run side by side."""
    partners = np.empty_like(order)
    partners[order[0::2]] = order[1::2]
    partners[order[1::2]] = order[0::2]
    return partners
