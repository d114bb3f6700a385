"""Factors against loops over scipy's paired t test and statsmodels' Holm."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from bnexp.analysis.factors import Score, cell_contrasts, level_contrasts


def grid(seeds=4):
    rng = np.random.default_rng(0)
    return {
        (a, b, s, c): float(np.clip(rng.normal(0.8 + 0.02 * (a == "y"), 0.02), 0, 1))
        for a in "xyz"
        for b in "12"
        for s in range(seeds)
        for c in ("running", "recomputed")
    }


def scores(table):
    return [Score((a, b), s, c, v) for (a, b, s, c), v in table.items()]


def test_levels_are_paired_by_seed_over_the_other_axes():
    table = grid()
    found = level_contrasts(scores(table), 0)
    assert len(found) == 6
    p_values, expected = [], []
    for condition in ("running", "recomputed"):
        means = {
            a: [np.mean([table[a, b, s, condition] for b in "12"]) for s in range(4)] for a in "xyz"
        }
        for a in "xyz":
            row = next(r for r in found if r.levels == (a,) and r.condition == condition)
            assert (row.cells, row.seeds) == (2, 4)
            assert row.mean == pytest.approx(np.mean(means[a]))
            low, high = stats.ttest_1samp(means[a], 0).confidence_interval()
            assert row.interval == pytest.approx((low, high))
            if a == "x":
                assert row.difference is None and row.p is None
                continue
            reference = stats.ttest_rel(means[a], means["x"])
            assert row.difference_interval == pytest.approx(tuple(reference.confidence_interval()))
            assert row.p == pytest.approx(reference.pvalue)
            p_values.append(reference.pvalue)
            expected.append(row.p_holm)
    assert expected == pytest.approx(multipletests(p_values, method="holm")[1])


def test_a_combination_that_is_missing_somewhere_is_left_out_everywhere():
    table = grid()
    del table["z", "2", 1, "running"]  # it diverged
    for row in level_contrasts(scores(table), 0):
        if row.condition == "running":
            values = [
                np.mean([table[row.levels[0], b, s, "running"] for b in ("1" if s == 1 else "12")])
                for s in range(4)
            ]
            assert row.mean == pytest.approx(np.mean(values))


def test_conditions_are_compared_within_each_cell():
    table = grid()
    found = cell_contrasts(scores(table), "running")
    assert len(found) == 12
    tested = [row for row in found if row.p is not None]
    assert {row.condition for row in tested} == {"recomputed"}
    for row in tested:
        a, b = row.levels
        pairs = [[table[a, b, s, c] for s in range(4)] for c in ("recomputed", "running")]
        reference = stats.ttest_rel(*pairs)
        assert row.difference == pytest.approx(np.subtract(*pairs).mean())
        assert row.p == pytest.approx(reference.pvalue)
    corrected = multipletests([row.p for row in tested], method="holm")[1]
    assert [row.p_holm for row in tested] == pytest.approx(corrected)


def test_one_seed_has_no_interval():
    (row, *_) = cell_contrasts(scores(grid(1)), "running")
    assert row.interval is None and row.p_holm is None
