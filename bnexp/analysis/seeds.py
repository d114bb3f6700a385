"""Runs that differ in their seed alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bnexp.analysis.intervals import Interval, interval_over_seeds
from bnexp.condition import Condition
from bnexp.errors import UserError


@dataclass(frozen=True)
class SeedSummary:
    """Accuracies of runs that differ in their seed alone, under one condition; differences to the
    baseline are paired by seed. Intervals speak about the next seed's mean, not about one run."""

    condition: Condition
    runs: int
    mean: float
    interval: Interval | None
    standard_deviation: float | None
    difference: float | None
    difference_interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        del found["condition"]
        return {"kind": str(self.condition), **found}


def summarize_seeds(
    accuracies: Mapping[Condition, Sequence[float]], baseline: Condition
) -> list[SeedSummary]:
    """`accuracies` by condition, one value per seed, in the same order of seeds everywhere."""
    base = np.asarray(accuracies[baseline], dtype=np.float64)
    summaries = []
    for condition, given in accuracies.items():
        values = np.asarray(given, dtype=np.float64)
        if len(values) != len(base):
            raise UserError(f"{condition} and {baseline} were not evaluated for the same seeds")
        paired = None if condition == baseline else values - base
        summaries.append(
            SeedSummary(
                condition=condition,
                runs=len(values),
                mean=float(values.mean()),
                interval=_within_0_and_1(interval_over_seeds(values)),
                standard_deviation=float(values.std(ddof=1)) if len(values) > 1 else None,
                difference=None if paired is None else float(paired.mean()),
                difference_interval=None if paired is None else interval_over_seeds(paired),
            )
        )
    return summaries


def _within_0_and_1(interval: Interval | None) -> Interval | None:
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))
