"""The numbers of a comparison: one result per condition, each paired with the baseline's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnexp.analysis.intervals import Interval
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
    `broken` counts the samples whose logits are not finite numbers (they count as wrong)."""

    condition: Condition
    label: str
    accuracy: float
    accuracy_interval: Interval
    loss: float | None
    loss_interval: Interval | None
    ece: float
    broken: int
    class_accuracy: list[float | None]
    versus_baseline: Paired | None


def paired_results(results: Sequence[Result]) -> list[tuple[Result, Paired]]:
    """All but the baseline, each with its difference to it."""
    return [(r, r.versus_baseline) for r in results if r.versus_baseline is not None]


def compared_result(results: Sequence[Result]) -> tuple[Result, Paired] | None:
    """The one that the baseline, `results[0]`, is judged by; None where it stands alone."""
    by_condition = {result.condition: (result, pair) for result, pair in paired_results(results)}
    chosen = compared_with(results[0].condition, by_condition)
    return by_condition[chosen] if chosen else None
