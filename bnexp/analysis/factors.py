"""What the axes of a grid do to accuracy. Seeds are the unit: every interval and every p is over
trainings, paired by seed, and what is tested together is corrected together (Holm)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bnexp.analysis.intervals import Interval, holm, interval_over_seeds
from bnexp.analysis.paired import paired_differences

Levels = tuple[str, ...]
"""A level of each axis, in the order of the axes."""


@dataclass(frozen=True)
class Score:
    """The accuracy of one experiment under one condition."""

    levels: Levels
    seed: int
    condition: str
    accuracy: float


@dataclass(frozen=True)
class Contrast:
    """Accuracies of `seeds` trainings, a mean for each seed: their mean with its 95 % t interval,
    and, where there is something to compare with, the difference to it, paired by seed. `p`: paired
    t test; `p_holm`: the same corrected for all that is tested in one table. `cells`: combinations
    of the other axes that a seed's value is the mean of."""

    levels: Levels
    condition: str
    seeds: int
    cells: int
    mean: float
    interval: Interval | None
    difference: float | None
    difference_interval: Interval | None
    p: float | None
    p_holm: float | None = None


def cell_contrasts(scores: Sequence[Score], baseline: str) -> list[Contrast]:
    """Each condition in each combination of levels, its difference to the baseline's there."""
    cells: dict[Levels, dict[str, dict[int, float]]] = {}
    for score in scores:
        found = cells.setdefault(score.levels, {}).setdefault(score.condition, {})
        found[score.seed] = score.accuracy
    contrasts = []
    for levels, conditions in cells.items():
        base = conditions.get(baseline, {})
        for condition, values in conditions.items():
            reference = base if condition != baseline else {}
            contrasts.append(_contrast(levels, condition, 1, values, reference))
    return _corrected(contrasts)


def level_contrasts(scores: Sequence[Score], axis: int) -> list[Contrast]:
    """Each level of an axis under each condition, its difference to the axis' first level. A seed's
    value is the mean over the combinations of the other axes that it has at every level, so that
    levels are compared like with like. `levels` holds the level alone."""
    names = list(dict.fromkeys(score.levels[axis] for score in scores))
    contrasts = []
    for condition in dict.fromkeys(score.condition for score in scores):
        found: dict[tuple[Levels, int], dict[str, float]] = {}
        for score in scores:
            if score.condition == condition:
                others = score.levels[:axis] + score.levels[axis + 1 :]
                found.setdefault((others, score.seed), {})[score.levels[axis]] = score.accuracy
        there = [name for name in names if any(name in values for values in found.values())]
        whole = {key: values for key, values in found.items() if len(values) == len(there)}
        by_seed: dict[int, list[Mapping[str, float]]] = {}
        for (_, seed), values in whole.items():
            by_seed.setdefault(seed, []).append(values)
        if len(there) < 2 or not by_seed:
            continue
        cells = max(map(len, by_seed.values()))
        means = {
            name: {s: float(np.mean([v[name] for v in each])) for s, each in by_seed.items()}
            for name in there
        }
        for name in there:
            reference = means[there[0]] if name != there[0] else {}
            contrasts.append(_contrast((name,), condition, cells, means[name], reference))
    return _corrected(contrasts)


def _contrast(
    levels: Levels,
    condition: str,
    cells: int,
    values: Mapping[int, float],
    reference: Mapping[int, float],
) -> Contrast:
    accuracies = np.array([values[seed] for seed in sorted(values)])
    both = sorted(values.keys() & reference.keys())
    paired = paired_differences([values[s] - reference[s] for s in both]) if both else None
    return Contrast(
        levels=levels,
        condition=condition,
        seeds=len(accuracies),
        cells=cells,
        mean=float(accuracies.mean()),
        interval=interval_over_seeds(accuracies),
        difference=paired.mean if paired else None,
        difference_interval=paired.interval if paired else None,
        p=paired.p if paired else None,
    )


def _corrected(contrasts: Sequence[Contrast]) -> list[Contrast]:
    tested = [i for i, contrast in enumerate(contrasts) if contrast.p is not None]
    found = list(contrasts)
    p_values = [contrast.p for contrast in contrasts if contrast.p is not None]
    for i, p in zip(tested, holm(p_values), strict=True):
        found[i] = replace(found[i], p_holm=p)
    return found
