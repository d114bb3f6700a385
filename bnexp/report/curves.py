"""Curves of any length drawn with a bounded number of points and none of their extremes lost."""

from __future__ import annotations

import numpy as np


def _bins(n: int, count: int) -> np.ndarray:
    """Where `count` nearly equal, never empty bins of n values begin."""
    return np.unique(np.linspace(0, n, min(count, n), endpoint=False).astype(int))


def thin(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The first, least, greatest and last point of each bin (M4; Jugel et al. 2014).

    Drawn as a line it covers the same pixels as the full curve where a bin is a pixel wide. At
    most 4 * bins points, in order; short curves come back whole. Points that are not finite are
    left out.
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= 4 * bins:
        return x, y
    starts = _bins(len(y), bins)
    ends = np.append(starts[1:], len(y))
    keep = set(starts.tolist()) | set((ends - 1).tolist())
    for start, end in zip(starts, ends, strict=True):
        keep.add(int(start + y[start:end].argmin()))
        keep.add(int(start + y[start:end].argmax()))
    index = np.array(sorted(keep))
    return x[index], y[index]


def envelope(
    x: np.ndarray, y: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First x, last x, mean, least and greatest y of each bin. Points that are not finite are left
    out."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) == 0:
        return x, x, y, y, y
    starts = _bins(len(y), bins)
    sizes = np.diff(np.append(starts, len(y)))
    return (
        x[starts],
        x[starts + sizes - 1],
        np.add.reduceat(y, starts) / sizes,
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
    )
