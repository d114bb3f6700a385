"""Intervals at 95 % and tests, each from its source. Pure functions of numbers and numpy arrays.

Of scipy only what is imported quickly: `scipy.stats` alone takes half as long as torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

LEVEL = 0.95
Z = float(special.ndtri(0.5 + LEVEL / 2))
"""The normal quantile of two-sided intervals."""
BINS = 15

Interval = tuple[float, float]


def wilson_interval(successes: int, n: int) -> Interval:
    """95 % score interval of a proportion (Wilson 1927)."""
    p, z2 = successes / n, Z**2
    middle = (2 * n * p + z2) / (2 * (n + z2))
    half = Z / (2 * (n + z2)) * math.sqrt(4 * n * p * (1 - p) + z2)
    return middle - half if successes else 0.0, middle + half if successes < n else 1.0


def score_interval(share: float, n: float) -> Interval:
    """Wilson's interval for a share that need not be a count of successes, of n samples' worth."""
    z2 = Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def balanced_interval(recalls: Sequence[float], class_samples: Sequence[int]) -> Interval:
    """95 % interval of the mean of the classes' recalls, each class with samples of its own.

    A score interval with as many samples as give the mean its variance where all recalls are the
    same: K² / Σ 1/n_k. With equal classes it is that of the accuracy.
    """
    worth = len(recalls) ** 2 / sum(1 / n for n in class_samples)
    return score_interval(sum(recalls) / len(recalls), worth)


def information(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Evidence that samples are named right more often than predictions that know nothing would
    name them; 0 and below is none. Integer arrays (N,), labels from 0 on, predictions from -1 on.

    For each of the K classes, the likelihood ratio statistic G² of "predicted as it" against "is
    it", negative where fewer are right than by chance; their sum, which counts K - 1 of K
    comparisons twice over, times (K - 1) / K, less (K - 1)·ln N, so that the traces any test finds
    in many samples do not count (BIC; Schwarz 1978). With two classes this is G² - ln N of their
    table.
    """
    n, classes = len(labels), int(max(labels.max(), predicted.max())) + 1
    are = np.bincount(labels, minlength=classes)
    named = np.bincount(predicted[predicted >= 0], minlength=classes)
    both = np.bincount(labels[predicted == labels], minlength=classes)
    g = 2 * sum(
        special.xlogy(cell, np.where(cell, cell * n / np.maximum(rows * columns, 1), 1))
        for cell, rows, columns in (
            (both, are, named),
            (are - both, are, n - named),
            (named - both, n - are, named),
            (n - are - named + both, n - are, n - named),
        )
    )
    count = int((are > 0).sum())
    signed = (np.sign(both * n - are * named) * g)[are > 0].sum()
    return float((count - 1) * (signed / count - math.log(n)))


def paired_counts(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """How many samples only `second` has right, and how many only `first` (bool arrays (N,))."""
    return int((second & ~first).sum()), int((first & ~second).sum())


def paired_interval(gained: int, lost: int, n: int) -> Interval:
    """95 % score interval of the difference (gained - lost) / n of paired proportions.

    All d where the score statistic is within the normal quantile z (Tango 1998, Stat. Med. 17,
    891-908):  |gained - lost - n d| <= z sqrt(n (2 q + d (1 - d))), with q the maximum likelihood
    probability of a loss given d.
    """
    estimate = (gained - lost) / n

    def excess(d: float) -> float:
        a, c = 2 * n, -lost * d * (1 - d)
        b = -gained - lost + (2 * n - gained + lost) * d
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = max(n * (2 * q + d * (1 - d)), 0.0)
        return abs(gained - lost - n * d) - Z * math.sqrt(variance)

    def limit(end: float) -> float:
        if estimate == end:
            return end
        beside = estimate + math.copysign(1e-12, end)  # without discordant samples, 0 is a root too
        return _root(excess, beside, end)

    return limit(-1.0), limit(1.0)


def _root(function: Callable[[float], float], below: float, above: float) -> float:
    """Where `function` turns from negative, at `below`, to positive, to the last bit."""
    while (middle := (below + above) / 2) not in (below, above):
        below, above = (middle, above) if function(middle) < 0 else (below, middle)
    return middle


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact p: were gains and losses equally likely, would they differ by as much?"""
    if gained + lost == 0:
        return 1.0
    n, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * float(special.bdtr(fewer, n, 0.5)))


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
    half = special.stdtrit(len(values) - 1, 0.5 + LEVEL / 2) * standard_error(values)
    return float(values.mean() - half), float(values.mean() + half)


def differ(values: Sequence[float] | np.ndarray) -> bool:
    """Whether the values, one per seed, are not all the same but for rounding: 0.92 - 0.90 and
    0.94 - 0.92 are two points, and differ in the sixteenth digit. Not where one isn't finite."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2 or not np.isfinite(array).all():
        return False
    return bool(np.ptp(array) > 1e-12 * max(1.0, np.abs(array).max()))


def interval_over_seeds(values: np.ndarray) -> Interval | None:
    """`t_interval`, and None where all seeds have the same: they say nothing about chance then."""
    return t_interval(values) if differ(values) else None


def standard_error(values: np.ndarray) -> float:
    """Of the mean of two or more independent values."""
    return values.std(ddof=1) / math.sqrt(len(values))


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
