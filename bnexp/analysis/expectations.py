"""What a user expects of a comparison."""

from __future__ import annotations

from bnexp.analysis.comparison import Comparison
from bnexp.errors import UserError


def unmet_cost(comparison: Comparison, allowed: float | None) -> str | None:
    """What is said where running averages cost more than `allowed`, by the whole 95 % interval of
    the difference to the condition they are judged by; None where they don't, or nothing is
    allowed or not. UserError where there is nothing they could be judged by."""
    if allowed is None:
        return None
    if comparison.compared is None:
        raise UserError(
            "expect.cost needs something to compare with, such as recomputed statistics"
        )
    cost = comparison.compared[1].difference_interval[0]
    if cost <= allowed:
        return None
    return (
        f"expect.cost: running averages were to cost {allowed:g} at most, and cost at least "
        f"{cost:.4g} ({comparison.score}, lower end of the 95 % interval)"
    )
