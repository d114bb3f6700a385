"""Scores other than top-1, against scipy and statsmodels."""

import json

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from bnexp.analysis.comparison import Comparison
from bnexp.analysis.scores import compare_scores, gain
from bnexp.condition import Condition
from bnexp.errors import UserError

RUNNING, RECOMPUTED = Condition("running"), Condition("recomputed")
RNG = np.random.default_rng(0)


def test_real_scores_are_compared_by_t_and_wilcoxon():
    first = RNG.normal(size=200)
    second = first + RNG.normal(0.1, 0.4, size=200)
    found = gain(first, second)
    reference = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found.difference == pytest.approx((second - first).mean())
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.p == pytest.approx(stats.wilcoxon(second, first).pvalue)


def test_zeros_and_ones_are_compared_by_mcnemar():
    first, second = (RNG.random((2, 300)) < [[0.7], [0.8]]).astype(float)
    table = [[np.sum((first == a) & (second == b)) for b in (1, 0)] for a in (1, 0)]
    assert gain(first, second).p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert gain(first, first).p == 1 and gain(first, first).difference == 0


def test_equal_scores_have_no_evidence():
    values = RNG.normal(size=50)
    assert gain(values, values).p == 1
    comparison = compare_scores({RUNNING: values, RECOMPUTED: values.copy()}, RUNNING, name="IoU")
    assert comparison.verdict.outcome == "identical"
    assert "every sample the same IoU" in comparison.verdict.text


@pytest.mark.parametrize(
    ("shift", "noise", "outcome", "said"),
    [
        (0.1, 0.05, "baseline-worse", "cost 0."),
        (-0.1, 0.05, "baseline-better", "gain 0."),
        (0.0, 0.01, "agree", "agree: mean IoU"),
        (0.0, 0.5, "undecided", "too few samples"),
    ],
)
def test_verdicts_fit_the_score(shift, noise, outcome, said):
    rng = np.random.default_rng(1)
    first = rng.uniform(0.3, 0.7, 200)
    second = np.clip(first + shift + rng.normal(0, noise, 200), 0, 1)
    comparison = compare_scores({RUNNING: first, RECOMPUTED: second}, RUNNING, name="IoU")
    assert comparison.verdict.outcome == outcome
    assert said in comparison.verdict.text
    assert "points" not in comparison.verdict.text and "accuracy" not in comparison.verdict.text


def test_several_conditions_are_corrected_and_the_record_reads_back():
    first = RNG.normal(-5, 1, 100)
    others = {Condition("recomputed", method=m): first + RNG.normal(0, 1, 100) for m in "ab"}
    comparison = compare_scores({RUNNING: first, **others}, RUNNING, name="negative error")
    (_, one), (_, two) = comparison.others
    small, large = sorted((one, two), key=lambda pair: pair.p)
    assert small.p_holm == pytest.approx(min(1, 2 * small.p))
    assert large.p_holm == pytest.approx(max(large.p, small.p_holm))
    again = Comparison.from_dict(json.loads(json.dumps(comparison.to_dict())))
    assert again == comparison and again.score == "negative error"


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="1 of 2 scores of recomputed are not finite"):
        compare_scores({RUNNING: np.ones(2), RECOMPUTED: np.array([1, np.nan])}, RUNNING)
