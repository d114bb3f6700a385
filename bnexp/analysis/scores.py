"""Scores other than top-1: numbers per sample, compared in pairs, and judged in words that fit.

| scores | interval of the mean | paired difference | test |
| --- | --- | --- | --- |
| 0 or 1 | Wilson 1927 | Tango 1998 | exact McNemar |
| real numbers | Student's t | Student's t of the differences | Wilcoxon signed-rank |

Several conditions at once are corrected for as everywhere (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bnexp.analysis.comparison import Comparison
from bnexp.analysis.findings import Gain
from bnexp.analysis.intervals import (
    Interval,
    holm,
    mcnemar_p,
    paired_counts,
    paired_interval,
    t_interval,
    wilson_interval,
)
from bnexp.analysis.layers import LayerRow
from bnexp.analysis.results import Paired, Result, compared_result, paired_results
from bnexp.analysis.verdict import AGREEMENT, SIGNIFICANT, Outcome, Verdict
from bnexp.analysis.words import capital, p_value
from bnexp.condition import Condition, label, statistics_label
from bnexp.errors import UserError


def is_binary(*values: np.ndarray) -> bool:
    return all(bool(np.isin(v, (0.0, 1.0)).all()) for v in values)


def close_scores(values: Sequence[np.ndarray]) -> float:
    """What difference of mean scores, float (N,) per condition, is none to speak of: a hundredth
    where all are from 0 to 1, else of their standard deviation under the first condition."""
    unit = all(v.min() >= 0 and v.max() <= 1 for v in values)
    return AGREEMENT * (1.0 if unit else float(values[0].std()))


def gain(first: np.ndarray, second: np.ndarray, close: float = 0.0) -> Gain:
    """How much higher the scores `second` are than `first`, float (N,) of the same samples.

    close: a difference below it doesn't matter, however certain it is.
    """
    if is_binary(first, second):
        better, worse = paired_counts(first > 0.5, second > 0.5)
        interval = paired_interval(better, worse, len(first))
        p = mcnemar_p(better, worse)
        return Gain((better - worse) / len(first), *interval, p, close)
    difference = second - first
    mean = float(difference.mean())
    return Gain(mean, *_t(difference, mean), wilcoxon_p(difference), close)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p of the signed-rank test, zeros left out (Wilcoxon 1945); 1 if all are zero.

    Exact for up to 50 differences without ties, else the normal approximation.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    from scipy import stats  # takes long, and few need it

    return float(stats.wilcoxon(differences).pvalue)


def compare_scores(
    values: Mapping[Condition, np.ndarray],
    baseline: Condition,
    *,
    name: str = "score",
    made: Mapping[str, str] | None = None,
    layers: Mapping[Condition, Sequence[LayerRow]] | None = None,
) -> Comparison:
    """Compare scores of the same samples, float (N,), under several conditions.

    As `compare`, for scores that are not top-1; in the results `accuracy` is the mean score, and
    gained and lost count the samples that score higher and lower. There are no classes and no
    losses. Raises UserError where a score is not a finite number or conditions have different
    numbers of samples.
    """
    made = made or {}
    base = values[baseline]
    for condition, found in values.items():
        if len(found) != len(base) or not len(found):
            raise UserError(f"{condition} and {baseline} were not scored on the same samples")
        if not np.isfinite(found).all():
            bad = int((~np.isfinite(found)).sum())
            raise UserError(f"{bad:,} of {len(found):,} scores of {condition} are not finite")
    others = [condition for condition in values if condition != baseline]
    gains = {condition: gain(base, values[condition]) for condition in others}
    corrected = dict(zip(others, holm([gains[c].p for c in others]), strict=True))
    results = []
    for condition in (baseline, *others):
        found = values[condition]
        paired = None
        if condition != baseline:
            paired = _paired(gains[condition], corrected[condition], base, found)
        results.append(
            Result(
                condition=condition,
                label=label(condition, made),
                accuracy=float(found.mean()),
                accuracy_interval=_interval(found),
                loss=None,
                loss_interval=None,
                ece=None,
                broken=0,
                class_accuracy=[],
                versus_baseline=paired,
            )
        )
    return Comparison(
        samples=len(base),
        classes=[],
        class_samples=[],
        chance=0.0,
        baseline=baseline,
        results=results,
        layers={condition: list(rows) for condition, rows in (layers or {}).items()},
        verdict=_judge(results, list(values.values()), name, made),
        score=name,
    )


def _paired(found: Gain, corrected: float, base: np.ndarray, values: np.ndarray) -> Paired:
    return Paired(
        difference=found.difference,
        difference_interval=(found.low, found.high),
        gained=int((values > base).sum()),
        lost=int((values < base).sum()),
        wrong_to_other_wrong=0,
        p=found.p,
        p_holm=corrected,
        loss_difference=None,
        loss_difference_interval=None,
        class_difference=[],
        class_gained=[],
        class_lost=[],
    )


def _interval(values: np.ndarray) -> Interval:
    if is_binary(values):
        return wilson_interval(int(values.sum()), len(values))
    return _t(values, float(values.mean()))


def _t(values: np.ndarray, mean: float) -> Interval:
    return t_interval(values) or (mean, mean)


def _judge(
    results: Sequence[Result], values: Sequence[np.ndarray], name: str, made: Mapping[str, str]
) -> Verdict:
    base, pairs = results[0], paired_results(results)
    close = close_scores(values)
    compared = compared_result(results)
    if compared is None:
        text = f"Mean {name} {base.accuracy:.4g} for {base.label}; nothing to compare with."
        return Verdict("alone", text)
    corrected = ", Holm-corrected" if len(pairs) > 1 else ""
    headline = _sentence(base, *compared, name, close, made, corrected)
    remarks = [_sentence(base, *pair, name, close, made, corrected) for pair in pairs]
    return Verdict(
        _outcome(compared[1], close), headline, tuple(r for r in remarks if r != headline)
    )


def _outcome(pair: Paired, close: float) -> Outcome:
    if pair.changed == 0:
        return "identical"
    if pair.p_holm < SIGNIFICANT and pair.difference != 0:
        return "baseline-worse" if pair.difference > 0 else "baseline-better"
    return "agree" if max(map(abs, pair.difference_interval)) <= close else "undecided"


def _sentence(
    base: Result,
    other: Result,
    pair: Paired,
    name: str,
    close: float,
    made: Mapping[str, str],
    corrected: str,
) -> str:
    first, second = capital(base.label), statistics_label(other.condition, made)
    p = p_value(pair.p_holm) + corrected
    low, high = pair.difference_interval
    values = f"mean {name} {base.accuracy:.4g} and {other.accuracy:.4g}"
    outcome = _outcome(pair, close)
    if outcome == "identical":
        return f"{first} and {second} give every sample the same {name}: {base.accuracy:.4g}."
    if outcome == "agree":
        return f"{first} and {second} agree: {values}, no evidence of a difference ({p})."
    if outcome == "undecided":
        return (
            f"No difference between {base.label} and {second} can be shown ({values}, {p}), but it "
            f"may be anything from {_signed(low)} to {_signed(high)} for the latter: too few "
            "samples to call them equal."
        )
    verb = "cost" if outcome == "baseline-worse" else "gain"
    if outcome == "baseline-better":
        low, high = -high, -low
    return (
        f"{first} {verb} {_plain(abs(pair.difference))} in {name} (95 % interval {_plain(low)} to "
        f"{_plain(high)}): {base.accuracy:.4g} against {other.accuracy:.4g} with {second}; "
        f"{pair.gained:,} samples score higher with the latter and {pair.lost:,} lower ({p})."
    )


def _plain(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")
