"""Intervals at 95 % and tests, each from its source. Pure functions of numbers and numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
BINS = 15

Interval = tuple[float, float]


def wilson_interval(successes: int, n: int) -> Interval:
    """95 % score interval of a proportion (Wilson 1927)."""
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def paired_counts(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """How many samples only `second` has right, and how many only `first` (bool arrays (N,))."""
    return int((second & ~first).sum()), int((first & ~second).sum())


def paired_interval(gained: int, lost: int, n: int) -> Interval:
    """95 % score interval of the difference (gained - lost) / n of paired proportions.

    All d where the score statistic is within the normal quantile z (Tango 1998, Stat. Med. 17,
    891-908):  |gained - lost - n d| <= z sqrt(n (2 q + d (1 - d))), with q the maximum likelihood
    probability of a loss given d.
    """
    z = stats.norm.ppf(0.5 + LEVEL / 2)
    estimate = (gained - lost) / n

    def excess(d: float) -> float:
        a, c = 2 * n, -lost * d * (1 - d)
        b = -gained - lost + (2 * n - gained + lost) * d
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = max(n * (2 * q + d * (1 - d)), 0.0)
        return abs(gained - lost - n * d) - z * math.sqrt(variance)

    def limit(end: float) -> float:
        if estimate == end:
            return end
        beside = estimate + math.copysign(1e-12, end)  # without discordant samples, 0 is a root too
        return optimize.brentq(excess, beside, end, xtol=1e-12)

    return limit(-1.0), limit(1.0)


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact p: were gains and losses equally likely, would they differ by as much?"""
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for having been computed together (Holm 1979), in the given order."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    return np.minimum(corrected, 1.0).tolist()


def t_interval(values: np.ndarray) -> Interval | None:
    """95 % interval of the mean of independent values; None for one value or a non-finite one."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    half = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean distance between confidence and accuracy over 15 equal bins (m-1)/15 < c <= m/15,
    weighted by the samples in them (Guo et al. 2017, eq. 3). A confidence that is NaN counts as 0.
    """
    confidence = np.nan_to_num(np.asarray(confidence, dtype=np.float64), nan=0.0)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
