"""A comparison in plain words, for a reader who wants to know what the moving averages cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bnexp.analysis.intervals import balanced_interval, mcnemar_p
from bnexp.analysis.results import (
    Paired,
    Result,
    class_p_values,
    compared_result,
    costs_along_the_run,
    paired_results,
)
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
from bnexp.condition import Condition, statistics_label

SIGNIFICANT = 0.05
# Two conditions are said to agree only where the whole 95 % interval of their difference is closer
# to zero than this; a wide interval around zero is no agreement but a lack of evidence. A worse
# moment of the run is told only from there on, too.
AGREEMENT = 0.01
# A difference of mean losses is worth a remark from this share of the baseline's loss on.
LOSS_DIFFERS = 0.01
# The weights are said to have learned from this share of the way from guessing to certainty on.
LEARNED = 0.5
# How many of the classes that shift are named.
CLASSES_NAMED = 5

THESE_WEIGHTS = "This speaks about these weights on these test images: another training may differ."
ABOUT_P_VALUES = (
    "A p-value and an interval speak about these weights on these test images: they say how far "
    "the choice of the images alone could have produced the difference. They do not say what "
    "another training of the same config would show. One training, for example, found −1.10 points "
    "with p = 0.049; three that differ in the seed alone, −1.32 points on average with a 95 % "
    "interval from −4.27 to +1.64. For a claim about a method rather than about one model, train "
    "with several seeds and compare them: bnexp compare pairs them by seed."
)

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
    """`text` is the answer in a few sentences, about the baseline against the condition it is
    judged by; `remarks` are further sentences, most important first."""

    outcome: Outcome
    text: str
    remarks: tuple[str, ...] = ()


def outcome(results: Sequence[Result], class_samples: Sequence[int]) -> Outcome:
    """What the numbers of `results`, the baseline first, come to."""
    compared = compared_result(results)
    return _outcome(results[0], *compared, class_samples) if compared else "alone"


def at_chance(result: Result, class_samples: Sequence[int]) -> bool:
    """Whether the predictions can't be told from guessing: the interval of the balanced accuracy
    has guessing's, and the predictions carry no information about the label, as where they all
    name one class. (The share of the most frequent class does not come into it: a model that finds
    rare defects hardly exceeds it.)"""
    if result.broken == sum(class_samples):
        return True
    low, high = _balanced_interval(result, class_samples)
    return low <= result.guessing <= high and result.guessing < 1 and (result.information or 0) <= 0


def _balanced_interval(result: Result, class_samples: Sequence[int]) -> tuple[float, float]:
    recalls = [share for share in result.class_accuracy if share is not None]
    return balanced_interval(recalls, [n for n in class_samples if n])


def _outcome(base: Result, other: Result, pair: Paired, class_samples: Sequence[int]) -> Outcome:
    base_at_chance, other_at_chance = (at_chance(r, class_samples) for r in (base, other))
    if base_at_chance and other_at_chance:
        return "chance"
    if base_at_chance or other_at_chance:
        bad, good = (base, other) if base_at_chance else (other, base)
        apart = _balanced_interval(bad, class_samples)[1] < good.balanced_accuracy
        if apart and _balanced_interval(good, class_samples)[0] > bad.balanced_accuracy:
            return "baseline-at-chance" if base_at_chance else "other-at-chance"
    if pair.changed == 0:
        return "identical"
    if pair.p_holm < SIGNIFICANT:
        return "baseline-worse" if pair.difference > 0 else "baseline-better"
    return "agree" if max(map(abs, pair.difference_interval)) <= AGREEMENT else "undecided"


def judge(
    results: Sequence[Result],
    classes: Sequence[str],
    class_samples: Sequence[int],
    made: Mapping[str, str],
) -> Verdict:
    """The verdict on `results`, the baseline first. `made` as in `bnexp.condition.label`."""
    base, pairs = results[0], paired_results(results)
    words = _Words(class_samples, made, ", Holm-corrected" if len(pairs) > 1 else "")
    compared = compared_result(results)
    found = outcome(results, class_samples)
    headline = words.sentence(base, *compared) if compared else words.alone(base)
    remarks = [
        f"{capital(result.label)}: {count(result.broken)} of {count(words.samples)} outputs are "
        "not finite numbers; they count as wrong."
        for result in results
        if result.broken
    ]
    tested = [name for name, n in zip(classes, class_samples, strict=True) if n]
    if len(tested) == 1 < words.samples:
        remarks.append(
            f"All {count(words.samples)} samples are of class {tested[0]}: a model that names it "
            "whatever it sees is right about each of them."
        )
    sentences = [words.sentence(base, result, pair) for result, pair in pairs]
    remarks += [sentence for sentence in sentences if sentence != headline]
    if found == "chance":
        return Verdict(found, headline, tuple(remarks))
    shifts = class_p_values(results)
    for result, pair in pairs:
        if not any(at_chance(r, class_samples) for r in (base, result)):
            shift = words.classes(base, result, pair, classes, shifts[result.condition])
            remarks += [text for text in (shift, words.loss(base, result, pair)) if text]
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
    text = headline if found == "alone" else f"{headline} {THESE_WEIGHTS}"
    return Verdict(found, text, tuple(remarks))


def advice(verdict: Verdict, results: Sequence[Result]) -> str | None:
    """What to do where recomputed statistics are better than the baseline; None where they are
    not."""
    compared = compared_result(results)
    if compared is None or verdict.outcome not in ("baseline-worse", "baseline-at-chance"):
        return None
    recomputed = compared[0]
    if not recomputed.condition.is_recomputed:
        return None
    near = [
        f"{result.condition} ({percent(result.accuracy, 2)})"
        for result, _ in paired_results(results)
        if result.condition.weights == recomputed.condition.weights
        and not result.condition.is_recomputed
        and result.condition.statistics != "batch"
        and abs(result.accuracy - recomputed.accuracy) <= AGREEMENT
    ]
    averages = f", or with an average of the same training that came near: {', '.join(near)}"
    return f"Use these weights with recomputed statistics{averages if near else ''}."


def worst_moment(
    verdict: Verdict,
    results: Sequence[Result],
    rows: Iterable[tuple[int, Condition, float]],
    samples: int,
) -> Verdict:
    """`verdict` with the step of the run at which the baseline cost most, where that is worse than
    at the end, beyond `AGREEMENT`, and more than the samples of one evaluation leave to chance.

    `rows` are the run's evaluations on the test set: step, condition, accuracy. Only steps count at
    which the baseline and the condition it is judged by were both evaluated.
    """
    compared = compared_result(results)
    if compared is None or verdict.outcome == "chance":
        return verdict
    seen = costs_along_the_run(results, rows)
    moments = [(other - base, step) for step, (base, other) in seen.items()]
    if len(moments) < 2:
        return verdict
    difference, step = max(moments)
    # Were all changed predictions changes for the better: what the test could say at most.
    p = mcnemar_p(max(0, round(difference * samples)), 0) * len(moments)
    if difference <= max(AGREEMENT, compared[1].difference) or p >= SIGNIFICANT:
        return verdict
    first, second = seen[step]
    return replace(
        verdict,
        text=f"{verdict.text} The worst moment of the run: {points(difference, 2)} points lost at "
        f"step {count(step)} ({results[0].condition} {percent(first, 2)}, {compared[0].condition} "
        f"{percent(second, 2)}; the largest of {count(len(moments))} such differences).",
    )


@dataclass(frozen=True)
class _Words:
    class_samples: Sequence[int]
    made: Mapping[str, str]
    corrected: str

    @property
    def samples(self) -> int:
        return sum(self.class_samples)

    def alone(self, base: Result) -> str:
        without = base.condition.statistics == "none"
        why = "the model has no statistics" if without else "it was evaluated under nothing else"
        guess = ", no more than guessing" if at_chance(base, self.class_samples) else ""
        return (
            f"{percent(base.accuracy)} for {base.label} "
            f"({interval_percent(base.accuracy_interval)}, {count(self.samples)} samples){guess}; "
            f"{why} to compare with."
        )

    def sentence(self, base: Result, other: Result, pair: Paired) -> str:
        found = _outcome(base, other, pair, self.class_samples)
        first, second = capital(base.label), self._second(base, other)
        p = p_value(pair.p_holm) + self.corrected
        shares = percent(base.accuracy), percent(other.accuracy)
        values = f"{shares[0]} both" if shares[0] == shares[1] else " and ".join(shares)
        changed = f"{count(pair.changed)} of {count(self.samples)} predictions differ"
        low, high = pair.difference_interval
        if found == "chance":
            balanced = f"{percent(base.balanced_accuracy)} and {percent(other.balanced_accuracy)}"
            return (
                f"Nothing can be said about {base.label} and {second}: the model is at chance "
                f"under both (balanced accuracy {balanced}, guessing gives "
                f"{percent(base.guessing)})."
            )
        if found in ("baseline-at-chance", "other-at-chance"):
            bad, good = (base, other) if found == "baseline-at-chance" else (other, base)
            why = ""
            if bad.condition.weights == good.condition.weights:
                why = ": these statistics do not belong to these weights"
                if good.balanced_accuracy - good.guessing >= LEARNED * (1 - good.guessing):
                    why = ": the weights have learned, these statistics do not belong to them"
            return (
                f"{capital(bad.label)} are at chance (balanced accuracy "
                f"{percent(bad.balanced_accuracy)}, guessing gives {percent(bad.guessing)}) where "
                f"the model reaches {percent(good.balanced_accuracy)} {self._of(bad, good)}{why} "
                f"({p})."
            )
        if found == "identical":
            return (
                f"{first} and {second} agree on each of the {count(self.samples)} samples: "
                f"{shares[0]} both."
            )
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

    def classes(
        self,
        base: Result,
        other: Result,
        pair: Paired,
        names: Sequence[str],
        p_values: Sequence[float | None],
    ) -> str | None:
        """The classes that shift although the whole does not, or against the whole."""
        shifting = []
        for name, gained, lost, p in zip(
            names, pair.class_gained, pair.class_lost, p_values, strict=True
        ):
            against = (gained - lost) * pair.difference <= 0 or pair.p_holm >= SIGNIFICANT
            if p is not None and p < SIGNIFICANT and against:
                shifting.append((p, f"{name} {count(gained)} : {count(lost)} ({p_value(p)})"))
        if not shifting:
            return None
        shifting.sort(key=lambda item: item[0])
        tested = sum(p is not None for p in p_values)
        further = len(shifting) - CLASSES_NAMED
        listed = ", ".join(text for _, text in shifting[:CLASSES_NAMED])
        more = f" and {count(further)} more" if further > 0 else ""
        return (
            f"Single classes shift between {base.label} and {self._second(base, other)}, right "
            f"only under the latter : only under the former: {listed}{more}; p-values are "
            f"Holm-corrected over {count(tested)} classes"
            f"{' and all conditions' if self.corrected else ''}."
        )

    def loss(self, base: Result, other: Result, pair: Paired) -> str | None:
        """Where accuracy shows no difference and the loss does."""
        interval, difference = pair.loss_difference_interval, pair.loss_difference
        if interval is None or difference is None or not base.loss or other.loss is None:
            return None
        if base.ece is None or other.ece is None:
            return None
        if pair.p_holm < SIGNIFICANT or interval[0] <= 0 <= interval[1]:
            return None
        if abs(difference) < LOSS_DIFFERS * base.loss:
            return None
        better, worse = (base, other) if difference > 0 else (other, base)
        calibration = (base.ece, other.ece) if difference > 0 else (other.ece, base.ece)
        before = " Confidence suffers before predictions change." if pair.changed == 0 else ""
        return (
            f"The loss tells {better.label} and {self._second(better, worse)} apart where accuracy "
            f"does not: {better.loss:.3g} and {worse.loss:.3g} nats, calibration error "
            f"{' and '.join(map(percent, calibration))}.{before}"
        )

    def _second(self, first: Result, second: Result) -> str:
        """The second after the first's label: its weights are named where they are others."""
        if first.condition.weights != second.condition.weights:
            return second.label
        return f"with {statistics_label(second.condition, self.made)}"

    def _of(self, first: Result, second: Result) -> str:
        same = first.condition.weights == second.condition.weights
        return self._second(first, second) if same else f"of {second.label}"
