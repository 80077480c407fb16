"""A mask's border as the path of an SVG, exact to the pixel, so that a browser can tint, outline and hide it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64


def outline_path(mask: Bool[np.ndarray, "H W"]) -> str:
    """The mask's border along pixel edges, to be filled by the even-odd rule.

    The border turns where two by two pixels hold an odd number of the mask's. Walked along a row of pixel corners,
    every other turn starts a horizontal run that ends at the next one; the same holds down a column. Following runs
    from turn to turn, now across, now down, gives the closed polygons. Where two pixels touch across a diagonal, two
    runs cross, which the even-odd rule fills alike.

    Args:
        mask: Of any shape; parts and holes as many as there are.

    Returns:
        Path data in pixels, x to the right and y down, such as "M3 1h2v1h-2z"; empty for an empty mask.
    """
    rows, columns = _turns(mask)
    across = _partners(np.arange(len(rows)))
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
    """Row and column of every pixel corner at which the border turns, row by row."""
    padded = np.pad(mask, 1)
    rows, columns = np.nonzero(padded[:-1, :-1] ^ padded[:-1, 1:] ^ padded[1:, :-1] ^ padded[1:, 1:])
    return rows, columns


def _partners(order: Int64[np.ndarray, " turns"]) -> Int64[np.ndarray, " turns"]:
    """Of each turn, the other end of its run, where `order` lists the two ends of each run side by side."""
    partners = np.empty_like(order)
    partners[order[0::2]] = order[1::2]
    partners[order[1::2]] = order[0::2]
    return partners
