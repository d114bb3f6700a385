"""The arithmetic of claims against scipy and statsmodels."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from bnexp.analysis.paired import (
    equivalence_p,
    judge_direction,
    judge_equality,
    paired_differences,
)


@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_intervals_and_p_are_those_of_a_paired_t_test(n):
    rng = np.random.default_rng(n)
    first, second = rng.normal(0.9, 0.02, n), rng.normal(0.91, 0.02, n)
    found = paired_differences(second - first)
    reference = stats.ttest_rel(second, first)
    low, high = reference.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(second - first), rel=1e-12)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert found.interval == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 8, 40])
@pytest.mark.parametrize("within", [0.005, 0.02, 0.2])
def test_equivalence_is_tost(n, within):
    differences = np.random.default_rng(n).normal(0.002, 0.01, n)
    reference = DescrStatsW(differences).ttost_mean(-within, within)[0]
    assert equivalence_p(differences, within) == pytest.approx(reference, rel=1e-9)
    # 5 % twice is the 90 % interval within the bounds
    t = stats.t.ppf(0.95, n - 1) * stats.sem(differences)
    inside = -within < differences.mean() - t and differences.mean() + t < within
    assert (judge_equality(paired_differences(differences), within) == "supported") == inside


def test_verdicts_go_by_the_whole_interval():
    assert judge_direction(paired_differences([0.02, 0.021, 0.022])) == "supported"
    assert judge_direction(paired_differences([-0.02, -0.021, -0.022])) == "contradicted"
    assert judge_direction(paired_differences([0.02, -0.01, 0.022])) == "undecided"
    assert judge_equality(paired_differences([0.02, 0.021, 0.022]), 0.01) == "contradicted"
    assert judge_equality(paired_differences([0.001, -0.001, 0.0]), 0.01) == "supported"
    assert judge_equality(paired_differences([0.01, -0.011, 0.0]), 0.01) == "undecided"


def test_one_seed_and_no_spread_are_undecided():
    assert judge_direction(paired_differences([0.5])) == "undecided"
    assert judge_equality(paired_differences([0.0]), 0.1) == "undecided"
    assert judge_direction(paired_differences([0.5, 0.5, 0.5])) == "undecided"
    assert judge_equality(paired_differences([0.05, 0.05]), 0.1) == "undecided"
    assert judge_equality(paired_differences([0.0, 0.0]), 0.1) == "supported"
    assert paired_differences([0.5, 0.5]).p is None


def test_what_differs_by_rounding_alone_has_no_spread():
    """Both are two points; their t interval would be narrower than 1e-14, with p below 1e-14."""
    found = paired_differences([0.92 - 0.90, 0.94 - 0.92])
    assert found.values[0] != found.values[1]
    assert not found.spread and found.interval is None and found.p is None
    assert judge_direction(found) == "undecided"
    assert judge_equality(found, 0.05) == "undecided" and equivalence_p(found.values, 0.05) is None
    nothing = paired_differences([0.3 - 0.2 - 0.1, 0.0])
    assert nothing.values[0] != 0 and judge_equality(nothing, 0.01) == "supported"
    steps = paired_differences([120.0, 120.5])
    assert steps.spread and steps.interval is not None
