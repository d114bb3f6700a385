"""What a config expects of a comparison, and how it is not met."""

from __future__ import annotations

from collections.abc import Iterable

from bnexp.analysis.comparison import Comparison
from bnexp.analysis.results import costs_along_the_run
from bnexp.analysis.words import percent
from bnexp.condition import Condition
from bnexp.errors import UserError


def unmet_accuracy(comparison: Comparison, expected: float | None) -> str | None:
    """Under the baseline. A line where it is lower than `expected`; None where nothing is."""
    found = comparison.base.accuracy
    if expected is None or found >= expected:
        return None
    return f"expect.test_accuracy: {expected:.2%} was expected, {found:.2%} was reached"


def unmet_cost(comparison: Comparison, allowed: float | None) -> str | None:
    """A line where the baseline costs more than `allowed`, a share of accuracy (or in units of the
    score), by the whole 95 % interval of its difference to the condition it is judged by.
    UserError where there is nothing it could be judged by."""
    if allowed is None:
        return None
    if comparison.compared is None:
        raise UserError(
            "expect.cost needs something to compare with, such as recomputed statistics"
        )
    result, pair = comparison.compared
    least = pair.difference_interval[0]
    if least <= allowed:
        return None
    return (
        f"expect.cost: {comparison.baseline} was to cost {allowed:g} at most, and costs at least "
        f"{least:.4g} beside {result.condition} ({comparison.score}, lower end of the 95 % "
        "interval)"
    )


def unmet_worst_cost(
    comparison: Comparison, rows: Iterable[tuple[int, Condition, float]], allowed: float | None
) -> str | None:
    """A line where at some evaluation of the run the baseline's accuracy was lower by more than
    `allowed` than that of the condition it is judged by.

    `rows` are the run's evaluations on the test set: step, condition, accuracy. They hold
    accuracies and no pairs, so that this is about the difference as it was seen, without an
    interval.
    """
    seen = costs_along_the_run(comparison.results, rows)
    if allowed is None or comparison.compared is None or not seen:
        return None
    step = max(seen, key=lambda step: seen[step][1] - seen[step][0])
    base, other = seen[step]
    if other - base <= allowed:
        return None
    return (
        f"expect.worst_cost: {comparison.baseline} was never to cost more than {allowed:g}, and "
        f"cost {other - base:.4g} at step {step} ({percent(base, 2)} against {percent(other, 2)} "
        f"with {comparison.compared[0].condition})"
    )
