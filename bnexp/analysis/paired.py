"""What differences that are paired by seed say. Seeds are the unit: one number per training.

As in intervals.py, of scipy only what is imported quickly; the tests compare with `scipy.stats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from bnexp.analysis.intervals import Interval, differ, interval_over_seeds, standard_error

Verdict = Literal["supported", "contradicted", "undecided"]
ALPHA = 0.05


@dataclass(frozen=True)
class Differences:
    """One difference per seed, their mean with its 95 % t interval, and the two-sided p of the
    paired t test (both None for one seed, and where all seeds have the same)."""

    values: tuple[float, ...]
    mean: float
    interval: Interval | None
    p: float | None

    @property
    def spread(self) -> bool:
        """Whether the seeds differ at all, without which there is nothing to judge chance by."""
        return differ(self.values)

    @property
    def absent(self) -> bool:
        """Whether no seed has a difference, and there are several."""
        return len(self.values) > 1 and not differ([*self.values, 0.0])


def paired_differences(values: Sequence[float]) -> Differences:
    array = np.asarray(values, dtype=np.float64)
    p = None
    if differ(array):
        p = float(2 * special.stdtr(len(array) - 1, -abs(_t(array, 0.0))))
    interval = interval_over_seeds(array)
    return Differences(tuple(float(v) for v in array), float(array.mean()), interval, p)


def equivalence_p(values: Sequence[float], within: float) -> float | None:
    """p of the two one-sided t tests that the mean lies between -within and within (Schuirmann
    1987); None where there is no spread to judge by."""
    array = np.asarray(values, dtype=np.float64)
    if not differ(array):
        return None
    degrees = len(array) - 1
    above = special.stdtr(degrees, -_t(array, -within))
    below = special.stdtr(degrees, _t(array, within))
    return float(max(above, below))


def _t(values: np.ndarray, mean: float) -> float:
    """Student's t of the hypothesis that the values' mean is `mean`."""
    return (values.mean() - mean) / standard_error(values)


def judge_direction(found: Differences) -> Verdict:
    """Whether the mean difference lies above 0: by the whole 95 % interval, or not at all. Without
    a spread over seeds it is undecided."""
    if found.interval is None:
        return "undecided"
    low, high = found.interval
    return "supported" if low > 0 else "contradicted" if high < 0 else "undecided"


def judge_equality(found: Differences, within: float) -> Verdict:
    """Whether the mean difference is smaller than `within`: by two one-sided tests at 5 %, or
    contradicted by the whole 95 % interval. Where no seed differs at all, it is."""
    if found.interval is None:
        return "supported" if found.absent else "undecided"
    p = equivalence_p(found.values, within)
    low, high = found.interval
    if p is not None and p <= ALPHA:
        return "supported"
    return "contradicted" if low > within or high < -within else "undecided"
