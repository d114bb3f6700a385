"""The numbers of a comparison: one result per condition, each paired with the baseline's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bnexp.analysis.intervals import Interval, holm, mcnemar_p
from bnexp.condition import Condition, compared_with


@dataclass(frozen=True)
class Paired:
    """One condition against the baseline, on the same samples. Differences are this condition
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
class Result:
    """How the model does under one condition. `label` names the condition in sentences;
    `broken` counts the samples whose logits are not finite numbers (they count as wrong).
    `information` is the evidence that predictions know the label (`intervals.information`); None
    in records that do not have it."""

    condition: Condition
    label: str
    accuracy: float
    accuracy_interval: Interval
    loss: float | None
    loss_interval: Interval | None
    ece: float | None
    broken: int
    class_accuracy: list[float | None]
    versus_baseline: Paired | None
    information: float | None = None

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the classes' accuracies, of those that have samples."""
        found = [share for share in self.class_accuracy if share is not None]
        return sum(found) / len(found)

    @property
    def guessing(self) -> float:
        """The balanced accuracy of predictions that know nothing of the label."""
        return 1 / sum(share is not None for share in self.class_accuracy)


def paired_results(results: Sequence[Result]) -> list[tuple[Result, Paired]]:
    """All but the baseline, each with its difference to it."""
    return [(r, r.versus_baseline) for r in results if r.versus_baseline is not None]


def compared_result(results: Sequence[Result]) -> tuple[Result, Paired] | None:
    """The one that the baseline, `results[0]`, is judged by; None where it stands alone."""
    by_condition = {result.condition: (result, pair) for result, pair in paired_results(results)}
    chosen = compared_with(results[0].condition, by_condition)
    return by_condition[chosen] if chosen else None


def class_p_values(results: Sequence[Result]) -> dict[Condition, list[float | None]]:
    """Per condition and class, the exact McNemar test of the class's gains against its losses,
    Holm-corrected over classes and conditions; None for a class without samples."""
    tested = [
        (result.condition, i, mcnemar_p(pair.class_gained[i], pair.class_lost[i]))
        for result, pair in paired_results(results)
        for i, share in enumerate(result.class_accuracy)
        if share is not None
    ]
    found: dict[Condition, list[float | None]] = {
        result.condition: [None] * len(result.class_accuracy) for result in results[1:]
    }
    for (condition, i, _), p in zip(tested, holm([p for *_, p in tested]), strict=True):
        found[condition][i] = p
    return found


def costs_along_the_run(
    results: Sequence[Result], rows: Iterable[tuple[int, Condition, float]]
) -> dict[int, tuple[float, float]]:
    """Step -> accuracies under the baseline and under the condition it is judged by, of the
    evaluations (step, condition, accuracy) at which both were looked at."""
    compared = compared_result(results)
    if compared is None:
        return {}
    base, other = str(results[0].condition), str(compared[0].condition)
    by_step: dict[int, dict[str, float]] = {}
    for step, condition, accuracy in rows:
        by_step.setdefault(step, {})[str(condition)] = accuracy
    both = {base, other}
    return {step: (f[base], f[other]) for step, f in by_step.items() if both <= f.keys()}
