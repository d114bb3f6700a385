"""A comparison in plain words, for a reader who wants to know what the moving averages cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bnexp.analysis.results import Paired, Result, compared_result, paired_results
from bnexp.analysis.words import (
    capital,
    count,
    decimals,
    interval_percent,
    p_value,
    percent,
    points,
    signed_interval,
)
from bnexp.condition import statistics_label

SIGNIFICANT = 0.05
# Two conditions are said to agree only where the whole 95 % interval of their difference is closer
# to zero than this; a wide interval around zero is no agreement but a lack of evidence.
AGREEMENT = 0.01
# A difference of mean losses is worth a remark from this share of the baseline's loss on.
LOSS_DIFFERS = 0.01

Outcome = Literal[
    "alone",  # nothing to compare the baseline with
    "chance",  # both are at chance
    "baseline-at-chance",
    "other-at-chance",
    "identical",  # every prediction is the same
    "baseline-worse",
    "baseline-better",
    "agree",
    "undecided",  # too few samples to tell
]


@dataclass(frozen=True)
class Verdict:
    """`text` is the answer in a sentence or two, about the baseline against the condition it is
    judged by; `remarks` are further sentences, most important first."""

    outcome: Outcome
    text: str
    remarks: tuple[str, ...] = ()


def outcome(results: Sequence[Result], chance: float) -> Outcome:
    """What the numbers of `results`, the baseline first, come to."""
    compared = compared_result(results)
    return _outcome(results[0], *compared, chance) if compared else "alone"


def _outcome(base: Result, other: Result, pair: Paired, chance: float) -> Outcome:
    base_at_chance, other_at_chance = _at_chance(base, chance), _at_chance(other, chance)
    if base_at_chance and other_at_chance:
        return "chance"
    if base_at_chance:
        return "baseline-at-chance"
    if other_at_chance:
        return "other-at-chance"
    if pair.changed == 0:
        return "identical"
    if pair.p_holm < SIGNIFICANT:
        return "baseline-worse" if pair.difference > 0 else "baseline-better"
    return "agree" if max(map(abs, pair.difference_interval)) <= AGREEMENT else "undecided"


def _at_chance(result: Result, chance: float) -> bool:
    return result.accuracy_interval[0] <= chance < 1.0


def judge(
    results: Sequence[Result], samples: int, chance: float, made: Mapping[str, str]
) -> Verdict:
    """The verdict on `results`, the baseline first. `made` as in `bnexp.condition.label`."""
    base, pairs = results[0], paired_results(results)
    words = _Words(samples, chance, made, ", Holm-corrected" if len(pairs) > 1 else "")
    compared = compared_result(results)
    headline = words.sentence(base, *compared) if compared else words.alone(base)
    remarks = [
        f"{capital(result.label)}: {count(result.broken)} of {count(samples)} outputs are not "
        "finite numbers; they count as wrong."
        for result in results
        if result.broken
    ]
    sentences = [words.sentence(base, result, pair) for result, pair in pairs]
    remarks += [sentence for sentence in sentences if sentence != headline]
    remarks += filter(None, (words.loss(base, result, pair) for result, pair in pairs))
    if any(result.condition.statistics == "batch" for result in results):
        remarks.append(
            "Under batch statistics a prediction depends on which other samples share the "
            "mini-batch, so these predictions are not independent and their intervals are "
            "approximate; a model in use cannot rely on them."
        )
    if len(pairs) > 1:
        remarks.append(
            f"{len(pairs)} conditions are tested against {base.label} at once: p-values are "
            "corrected for that (Holm), intervals are not."
        )
    return Verdict(outcome(results, chance), headline, tuple(remarks))


@dataclass(frozen=True)
class _Words:
    samples: int
    chance: float
    made: Mapping[str, str]
    corrected: str

    def alone(self, base: Result) -> str:
        without = base.condition.statistics == "none"
        why = "the model has no statistics" if without else "it was evaluated under nothing else"
        return (
            f"{percent(base.accuracy)} for {base.label} "
            f"({interval_percent(base.accuracy_interval)}, {count(self.samples)} samples); "
            f"{why} to compare with."
        )

    def sentence(self, base: Result, other: Result, pair: Paired) -> str:
        found = _outcome(base, other, pair, self.chance)
        first, second = capital(base.label), self._second(base, other)
        p = p_value(pair.p_holm) + self.corrected
        shares = percent(base.accuracy), percent(other.accuracy)
        values = f"{shares[0]} both" if shares[0] == shares[1] else " and ".join(shares)
        changed = f"{count(pair.changed)} of {count(self.samples)} predictions differ"
        if found == "chance":
            return (
                f"Nothing can be said about {base.label} and {second}: the model is at chance "
                f"under both ({' and '.join(shares)}; always naming the most frequent class gives "
                f"{percent(self.chance)})."
            )
        if found in ("baseline-at-chance", "other-at-chance"):
            bad, good = (base, other) if found == "baseline-at-chance" else (other, base)
            why = ""
            if bad.condition.weights == good.condition.weights:
                why = ": the weights have learned, these statistics do not belong to them"
            return (
                f"{capital(bad.label)} are at chance ({percent(bad.accuracy)}) where the model "
                f"reaches {percent(good.accuracy)} {self._of(bad, good)}{why} ({p})."
            )
        if found == "identical":
            return (
                f"{first} and {second} agree on each of the {count(self.samples)} samples: "
                f"{shares[0]} both."
            )
        low, high = pair.difference_interval
        if found in ("baseline-worse", "baseline-better"):
            worse, better = (base, other) if found == "baseline-worse" else (other, base)
            digits = decimals(pair.difference)
            if found == "baseline-better":
                low, high = -high, -low
            return (
                f"{capital(worse.label)} cost {points(abs(pair.difference), digits)} points "
                f"(95 % interval {points(low, digits)} to {points(high, digits)}): "
                f"{percent(worse.accuracy, digits)} against {percent(better.accuracy, digits)} "
                f"{self._of(worse, better)}; {changed} ({p})."
            )
        if found == "agree":
            return (
                f"{first} and {second} agree: {values}, {changed}, no evidence of a difference "
                f"({p})."
            )
        if low * high > 0:
            return (
                f"{first} and {second}: {values}. Seen alone, the difference is "
                f"{signed_interval(pair.difference_interval)} points, but that is no evidence of "
                f"one by the exact test ({p})."
            )
        return (
            f"No difference between {base.label} and {second} can be shown on "
            f"{count(self.samples)} samples ({values}, {p}), but it may be anything from "
            f"{signed_interval(pair.difference_interval)} points for the latter: too few samples "
            "to call them equal."
        )

    def loss(self, base: Result, other: Result, pair: Paired) -> str | None:
        """Where accuracy shows no difference and the loss does."""
        interval, difference = pair.loss_difference_interval, pair.loss_difference
        if interval is None or difference is None or not base.loss or other.loss is None:
            return None
        if pair.p_holm < SIGNIFICANT or interval[0] <= 0 <= interval[1]:
            return None
        if abs(difference) < LOSS_DIFFERS * base.loss:
            return None
        better, worse = (base, other) if difference > 0 else (other, base)
        return (
            f"The loss tells {better.label} and {self._second(better, worse)} apart where accuracy "
            f"does not: {better.loss:.3g} and {worse.loss:.3g} nats, calibration error "
            f"{percent(better.ece)} and {percent(worse.ece)}. Confidence suffers before "
            "predictions change."
        )

    def _second(self, first: Result, second: Result) -> str:
        """The second after the first's label: its weights are named where they are others."""
        if first.condition.weights != second.condition.weights:
            return second.label
        return f"with {statistics_label(second.condition, self.made)}"

    def _of(self, first: Result, second: Result) -> str:
        same = first.condition.weights == second.condition.weights
        return self._second(first, second) if same else f"of {second.label}"
