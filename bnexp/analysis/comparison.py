"""What the predictions under several kinds of statistics say, and how sure that is.

Every number comes with its uncertainty at 95 %. The samples are the same under every kind, so
differences are paired: a sample that is right under both, or wrong under both, says nothing about
the difference, however many of them there are.

| quantity | method | source |
| --- | --- | --- |
| accuracy, also per class | score interval | Wilson 1927 |
| difference of accuracies | score interval for paired proportions | Tango 1998 |
| is there a difference | exact McNemar test | McNemar 1947, binomial form |
| several kinds at once | step-down correction of the p-values | Holm 1979 |
| mean loss and its paired difference | Student's t interval | |
| calibration | expected calibration error, 15 bins | Guo et al. 2017 |
| runs with several seeds | Student's t interval, differences paired by seed | |

Tango's interval rather than Newcombe's (1998, method 10): the statistics under comparison often
disagree on a handful of 10 000 samples only. There (2 to 5 gains and losses expected, all
outcomes enumerated) Tango's covers the truth with probability 0.93 to 0.96 and Newcombe's with
0.98 to 0.995, being wider than need be. Besides, it inverts the score test whose value at zero is
McNemar's chi-square, so interval and test tell the same story up to the exact test's caution.

Pure functions of numpy arrays; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import optimize, stats

from bnexp.condition import default_label
from bnexp.errors import UserError

if TYPE_CHECKING:
    from bnexp.evaluation.predictions import Predictions

LEVEL = 0.95
BINS = 15

Interval = tuple[float, float]


# ------------------------------------------------------------------------ statistics


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


# ------------------------------------------------------------------------ results


@dataclass(frozen=True)
class Paired:
    """One kind of statistics against the baseline, on the same samples. Differences are this kind
    less the baseline; gained: wrong under the baseline, right here; lost: the other way round."""

    difference: float
    difference_interval: Interval
    gained: int
    lost: int
    wrong_to_other_wrong: int
    p: float
    p_holm: float
    loss_difference: float | None
    loss_difference_interval: Interval | None
    class_difference: list[float | None]
    class_gained: list[int]
    class_lost: list[int]

    @property
    def changed(self) -> int:
        return self.gained + self.lost + self.wrong_to_other_wrong


@dataclass(frozen=True)
class KindResult:
    """How the model does under one kind of statistics. `label` names the kind in sentences;
    `broken` counts the samples whose logits are not finite numbers (they count as wrong)."""

    name: str
    label: str
    accuracy: float
    accuracy_interval: Interval
    loss: float | None
    loss_interval: Interval | None
    ece: float
    broken: int
    class_accuracy: list[float | None]
    versus_baseline: Paired | None


@dataclass(frozen=True)
class Comparison:
    """All kinds of statistics of one model on one set of samples, the baseline first.

    `chance` is the accuracy of always naming the most frequent class. `layers` holds, per kind,
    rows about single layers: drift (`bnexp.statistics.layer_drift`) and what exchanging that layer
    alone costs (`layer_costs`). `verdict` is the answer in a sentence or two, `remarks` are
    further sentences.
    """

    samples: int
    classes: list[str]
    class_samples: list[int]
    chance: float
    baseline: str
    kinds: list[KindResult]
    layers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    verdict: str = ""
    remarks: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> KindResult:
        for kind in self.kinds:
            if kind.name == name:
                return kind
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Lists, strings, numbers and None only; no NaN."""
        return asdict(self)


# ------------------------------------------------------------------------ comparing


def compare(
    predictions: Mapping[str, Predictions],
    baseline: str,
    classes: Sequence[str],
    *,
    labels: Mapping[str, str] | None = None,
    layers: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Comparison:
    """Compare predictions of the same samples under several kinds of statistics.

    `predictions`  by kind, as `evaluate` returns them
    `baseline`     the kind the others are paired with
    `classes`      the names of the classes
    `labels`       names of kinds for sentences, such as {"running": "running averages (decay 0.9)"}
    `layers`       per kind, rows about single layers to keep with the result

    Raises UserError where the kinds were not evaluated on the same samples.
    """
    from bnexp.analysis.verdict import remarks, verdict

    if baseline not in predictions:
        raise UserError(f"the baseline {baseline!r} is not among {', '.join(predictions)}")
    base = predictions[baseline]
    if len(base) == 0:
        raise UserError("there are no samples to compare on")
    others = [name for name in predictions if name != baseline]
    for name in others:
        if not np.array_equal(predictions[name].labels, base.labels):
            raise UserError(f"{name} and {baseline} were not evaluated on the same samples")

    counts = {name: paired_counts(base.correct, predictions[name].correct) for name in others}
    p_values = {name: mcnemar_p(*counts[name]) for name in others}
    corrected = dict(zip(others, holm(list(p_values.values())), strict=True))

    class_samples = np.bincount(base.labels, minlength=len(classes))
    kinds = []
    for name in [baseline, *others]:
        paired = None
        if name != baseline:
            paired = _pair(base, predictions[name], len(classes), p_values[name], corrected[name])
        label = (labels or {}).get(name) or default_label(name)
        kinds.append(_kind(name, label, predictions[name], class_samples, paired))
    result = Comparison(
        samples=len(base),
        classes=list(classes),
        class_samples=class_samples.tolist(),
        chance=float(class_samples.max() / len(base)),
        baseline=baseline,
        kinds=kinds,
        layers={name: [dict(row) for row in rows] for name, rows in (layers or {}).items()},
    )
    return replace(result, verdict=verdict(result), remarks=remarks(result))


def _kind(
    name: str, label: str, found: Predictions, class_samples: np.ndarray, paired: Paired | None
) -> KindResult:
    correct, n = found.correct, len(found)
    return KindResult(
        name=name,
        label=label,
        accuracy=float(correct.mean()),
        accuracy_interval=wilson_interval(int(correct.sum()), n),
        loss=_finite(found.loss.mean(dtype=np.float64)),
        loss_interval=t_interval(found.loss),
        ece=expected_calibration_error(found.confidence, correct),
        broken=int((found.predicted < 0).sum()),
        class_accuracy=_ratios(
            _per_class(found.labels, correct, len(class_samples)), class_samples
        ),
        versus_baseline=paired,
    )


def _pair(base: Predictions, found: Predictions, classes: int, p: float, p_holm: float) -> Paired:
    n = len(base)
    gained, lost = found.correct & ~base.correct, base.correct & ~found.correct
    changed = found.predicted != base.predicted
    with np.errstate(invalid="ignore"):
        loss_difference = found.loss.astype(np.float64) - base.loss
    class_gained = _per_class(base.labels, gained, classes)
    class_lost = _per_class(base.labels, lost, classes)
    class_samples = np.bincount(base.labels, minlength=classes)
    return Paired(
        difference=(int(gained.sum()) - int(lost.sum())) / n,
        difference_interval=paired_interval(int(gained.sum()), int(lost.sum()), n),
        gained=int(gained.sum()),
        lost=int(lost.sum()),
        wrong_to_other_wrong=int((changed & ~gained & ~lost).sum()),
        p=p,
        p_holm=p_holm,
        loss_difference=_finite(loss_difference.mean()),
        loss_difference_interval=t_interval(loss_difference),
        class_difference=_ratios(class_gained - class_lost, class_samples),
        class_gained=class_gained.tolist(),
        class_lost=class_lost.tolist(),
    )


def _per_class(labels: np.ndarray, flags: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(labels[flags], minlength=classes)


def _ratios(counts: np.ndarray, totals: np.ndarray) -> list[float | None]:
    pairs = zip(counts.tolist(), totals.tolist(), strict=True)
    return [count / total if total else None for count, total in pairs]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ------------------------------------------------------------------------ several seeds


@dataclass(frozen=True)
class SeedSummary:
    """Accuracies of runs that differ in their seed alone, by kind of statistics; differences to the
    baseline are paired by seed. Intervals speak about the next seed's mean, not about one run."""

    kind: str
    runs: int
    mean: float
    interval: Interval | None
    standard_deviation: float | None
    difference: float | None
    difference_interval: Interval | None


def summarize_seeds(accuracies: Mapping[str, Sequence[float]], baseline: str) -> list[SeedSummary]:
    """`accuracies` by kind, one value per seed, in the same order of seeds for every kind."""
    base = np.asarray(accuracies[baseline], dtype=np.float64)
    summaries = []
    for kind, values in accuracies.items():
        values = np.asarray(values, dtype=np.float64)
        if len(values) != len(base):
            raise UserError(f"{kind} and {baseline} were not evaluated for the same seeds")
        paired = None if kind == baseline else values - base
        summaries.append(
            SeedSummary(
                kind=kind,
                runs=len(values),
                mean=float(values.mean()),
                interval=t_interval(values),
                standard_deviation=float(values.std(ddof=1)) if len(values) > 1 else None,
                difference=None if paired is None else float(paired.mean()),
                difference_interval=None if paired is None else t_interval(paired),
            )
        )
    return summaries
