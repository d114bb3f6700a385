"""What is expected of a comparison is judged by the interval, not the point."""

from __future__ import annotations

import numpy as np
import pytest

from bnexp.analysis.comparison import compare
from bnexp.analysis.expectations import unmet_accuracy, unmet_cost, unmet_worst_cost
from bnexp.analysis.predictions import Predictions
from bnexp.condition import Condition
from bnexp.errors import UserError

RUNNING, RECOMPUTED = Condition("running"), Condition("recomputed")


def comparison(lost: int, samples: int = 1000):
    """Recomputed statistics are right everywhere, running averages wrong on `lost` samples."""
    labels = np.arange(samples) % 10
    predicted = labels.copy()
    predicted[:lost] = (predicted[:lost] + 1) % 10
    loss = np.full(samples, 0.1, np.float32)
    found = {
        condition: Predictions(p, labels, loss, np.full(samples, 0.9, np.float32))
        for condition, p in ((RUNNING, predicted), (RECOMPUTED, labels))
    }
    return compare(found, RUNNING, [str(i) for i in range(10)])


def test_a_cost_counts_by_the_lower_end_of_its_interval():
    found = comparison(lost=40)
    low, high = found.compared[1].difference_interval
    assert low < 0.04 < high
    assert unmet_cost(found, None) is None
    assert unmet_cost(found, 0.039) is None  # the point is above it, the interval is not
    assert unmet_cost(found, low + 1e-6) is None
    line = unmet_cost(found, low - 1e-6)
    assert f"{low:.4g}" in line and "expect.cost" in line and "\n" not in line


def test_where_nothing_is_compared_nothing_costs():
    one = comparison(lost=10)
    alone = compare(
        {RUNNING: Predictions(*(np.zeros(4, t) for t in (int, int, np.float32, np.float32)))},
        RUNNING,
        ["a"],
    )
    with pytest.raises(UserError, match="something to compare with"):
        unmet_cost(alone, 0.0)
    assert unmet_worst_cost(alone, [(1, RUNNING, 0.1), (1, RECOMPUTED, 0.9)], 0.0) is None
    assert unmet_worst_cost(one, [(1, RUNNING, 0.1)], 0.0) is None


def test_the_worst_evaluation_of_the_run():
    found = comparison(lost=0)
    rows = [
        (10, RUNNING, 0.50), (10, RECOMPUTED, 0.70), (10, Condition("slow"), 0.1),
        (20, RUNNING, 0.80), (20, RECOMPUTED, 0.81), (30, RUNNING, 0.2),
    ]  # fmt: skip
    assert unmet_worst_cost(found, rows, 0.21) is None
    line = unmet_worst_cost(found, rows, 0.19)
    assert "step 10" in line and "50.00 %" in line and "70.00 %" in line


@pytest.mark.parametrize(("expected", "unmet"), [(None, False), (0.9, False), (0.97, True)])
def test_accuracy(expected, unmet):
    assert (unmet_accuracy(comparison(lost=40), expected) is not None) is unmet
