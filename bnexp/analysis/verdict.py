"""A comparison in plain words, for a reader who wants to know what the moving averages cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnexp.condition import compared_kind

if TYPE_CHECKING:
    from bnexp.analysis.comparison import Comparison, Interval, KindResult, Paired

SIGNIFICANT = 0.05
# Two kinds are said to agree only where the whole 95 % interval of their difference is closer to
# zero than this; a wide interval around zero is no agreement but a lack of evidence.
AGREEMENT = 0.01


def verdict(comparison: Comparison) -> str:
    """The answer in one or two sentences: the baseline against the recomputed statistics where
    there are any, else against the first other kind."""
    base = comparison.kinds[0]
    others = comparison.kinds[1:]
    if not others:
        why = "has no statistics" if base.name == "none" else "was evaluated under no others"
        return (
            f"{percent(base.accuracy)} with {base.label} "
            f"({interval_percent(base.accuracy_interval)}, {count(comparison.samples)} samples); "
            f"the model {why} to compare with."
        )
    other = comparison[compared_kind(kind.name for kind in others)]
    return _sentence(comparison, base, other)


def remarks(comparison: Comparison) -> list[str]:
    """What else a careful reader should be told, most important first."""
    lines = []
    base = comparison.kinds[0]
    for kind in comparison.kinds:
        if kind.broken:
            lines.append(
                f"With {kind.label}, {count(kind.broken)} of {count(comparison.samples)} outputs "
                "are not finite numbers; they count as wrong."
            )
    others = comparison.kinds[1:]
    headline = verdict(comparison)
    for kind in others:
        sentence = _sentence(comparison, base, kind)
        if sentence != headline:
            lines.append(sentence)
    for kind in others:
        if (remark := _loss_remark(base, kind)) is not None:
            lines.append(remark)
    if any(kind.name == "batch" for kind in comparison.kinds):
        lines.append(
            "Under batch statistics a prediction depends on which other samples share the "
            "mini-batch, so these predictions are not independent and their intervals are "
            "approximate; a model in use cannot rely on them."
        )
    if len(others) > 1:
        lines.append(
            f"{len(others)} kinds are tested against {base.label} at once: p-values are corrected "
            "for that (Holm), intervals are not."
        )
    return lines


def _sentence(comparison: Comparison, base: KindResult, other: KindResult) -> str:
    chance = comparison.chance
    if _at_chance(base, chance) and _at_chance(other, chance):
        return (
            f"Nothing can be said about {base.label} and {other.label}: the model is at chance "
            f"under both ({percent(base.accuracy)} and {percent(other.accuracy)}; always naming "
            f"the most frequent class gives {percent(chance)})."
        )
    for bad, good in ((base, other), (other, base)):
        if _at_chance(bad, chance):
            return (
                f"{_capital(bad.label)} leave the model at chance ({percent(bad.accuracy)}) where "
                f"{good.label} give {percent(good.accuracy)}: the weights have learned, these "
                f"statistics do not belong to them ({_p(other.versus_baseline, comparison)})."
            )
    return _difference_sentence(comparison, base, other)


def _difference_sentence(comparison: Comparison, base: KindResult, other: KindResult) -> str:
    paired = other.versus_baseline
    n, p = comparison.samples, _p(paired, comparison)
    low, high = paired.difference_interval
    if paired.changed == 0:
        return (
            f"{_capital(base.label)} and {other.label} agree on each of the {count(n)} samples: "
            f"{percent(base.accuracy)} both."
        )
    changed = f"{count(paired.changed)} of {count(n)} predictions differ"
    if paired.p_holm < SIGNIFICANT:
        verb = "cost" if paired.difference > 0 else "gain"
        digits = _decimals(paired.difference)
        if paired.difference < 0:
            low, high = -high, -low
        return (
            f"{_capital(base.label)} {verb} {_points(abs(paired.difference), digits)} points "
            f"(95 % interval {_points(low, digits)} to {_points(high, digits)}): "
            f"{percent(base.accuracy, digits)} against {percent(other.accuracy, digits)} with "
            f"{other.label}; {changed} ({p})."
        )
    first, second = percent(base.accuracy), percent(other.accuracy)
    values = f"{first} both" if first == second else f"{first} and {second}"
    if max(abs(low), abs(high)) <= AGREEMENT:
        return (
            f"{_capital(base.label)} and {other.label} agree: {values}, {changed}, "
            f"no evidence of a difference ({p})."
        )
    if low * high > 0:
        return (
            f"{_capital(base.label)} and {other.label}: {values}. Seen alone, the difference is "
            f"{signed_interval(paired.difference_interval)} points, but that is no evidence of one "
            f"by the exact test ({p})."
        )
    return (
        f"No difference between {base.label} and {other.label} can be shown on {count(n)} samples "
        f"({values}, {p}), but it may be anything from "
        f"{signed_interval(paired.difference_interval)} points for the latter: too few samples to "
        "call them equal."
    )


def _loss_remark(base: KindResult, other: KindResult) -> str | None:
    """Where accuracy shows no difference and the loss does."""
    paired = other.versus_baseline
    interval = paired.loss_difference_interval
    if interval is None or base.loss is None or other.loss is None or base.loss <= 0:
        return None
    if paired.p_holm < SIGNIFICANT or interval[0] <= 0 <= interval[1]:
        return None
    if abs(paired.loss_difference) < 0.01 * base.loss:
        return None
    better, worse = (base, other) if paired.loss_difference > 0 else (other, base)
    return (
        f"The loss tells {better.label} and {worse.label} apart where accuracy does not: "
        f"{better.loss:.3g} and {worse.loss:.3g} nats, calibration error {percent(better.ece)} and "
        f"{percent(worse.ece)}. Confidence suffers before predictions change."
    )


def _at_chance(kind: KindResult, chance: float) -> bool:
    return kind.accuracy_interval[0] <= chance < 1.0


def _p(paired: Paired, comparison: Comparison) -> str:
    corrected = ", Holm-corrected" if len(comparison.kinds) > 2 else ""
    return p_value(paired.p_holm) + corrected


# ------------------------------------------------------------------------ numbers in words


def percent(share: float, digits: int = 1) -> str:
    """0.917 -> 91.7 %"""
    return f"{100 * share:.{digits}f} %"


def count(n: int) -> str:
    """10000 -> 10 000; four digits stay together."""
    return f"{n:,}".replace(",", " ") if n >= 10_000 else str(n)


def signed(difference: float, digits: int | None = None) -> str:
    """A difference of shares in percentage points: 0.021 -> +2.10, -0.021 -> −2.10"""
    text = _points(difference, _decimals(difference) if digits is None else digits)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def signed_interval(interval: Interval) -> str:
    """(-0.00023, 0.0209) -> −0.02 to +2.09, in percentage points"""
    digits = _decimals(max(interval, key=abs))
    return f"{signed(interval[0], digits)} to {signed(interval[1], digits)}"


def interval_percent(interval: Interval) -> str:
    """(0.911, 0.922) -> 95 % interval 91.1 to 92.2 %"""
    return f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def p_value(p: float) -> str:
    """0.0002 -> p < 0.001; 0.0312 -> p = 0.031; 0.6171 -> p = 0.62"""
    if p < 0.001:
        return "p < 0.001"
    if p >= 0.995:
        return "p = 1"
    text = f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"
    return f"p = {text}"


def _decimals(difference: float) -> int:
    """Decimals of a percentage that show two digits of the difference; from two to six."""
    if difference == 0:
        return 2
    return min(max(2, 1 - math.floor(math.log10(abs(100 * difference)))), 6)


def _points(difference: float, digits: int) -> str:
    text = f"{100 * difference:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def _capital(label: str) -> str:
    return label[0].upper() + label[1:]
