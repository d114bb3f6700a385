"""The statistics of a comparison against scipy, statsmodels, scikit-learn and published tables."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn.metrics import recall_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from bnexp.analysis.comparison import Comparison, compare
from bnexp.analysis.intervals import (
    balanced_interval,
    expected_calibration_error,
    holm,
    information,
    mcnemar_p,
    paired_counts,
    paired_interval,
    t_interval,
    wilson_interval,
)
from bnexp.analysis.layers import LayerCost, LayerRow
from bnexp.analysis.predictions import Predictions
from bnexp.analysis.results import class_p_values
from bnexp.analysis.seeds import summarize_seeds
from bnexp.condition import Condition
from bnexp.errors import UserError

RUNNING, RECOMPUTED, EMA = (Condition(name) for name in ("running", "recomputed", "ema-0.99"))


def found(rng, labels, accuracy, classes):
    n = len(labels)
    wrong = (labels + rng.integers(1, classes, n)) % classes
    predicted = np.where(rng.random(n) < accuracy, labels, wrong)
    confidence = rng.uniform(1 / classes, 1, n).astype(np.float32)
    return Predictions(predicted, labels, rng.exponential(0.3, n).astype(np.float32), confidence)


# ------------------------------------------------------------------------ single statistics


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, 857-872, Table I, score method
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_agrees_with_newcombes_table(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_wilson_interval_agrees_with_statsmodels(n, share):
    successes = round(share * n)
    expected = proportion_confint(successes, n, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "low", "high"),
    [
        # airway reactivity before and after stem cell transplantation (Bentur et al. 2009) and
        # response before and after consolidation therapy (Cavo et al. 2012), with Tango's interval
        # as in Fagerland, Lydersen & Laake, Statistical Analysis of Contingency Tables, ch. 8
        (1, 7, 21, -0.5172, -0.0260),
        (6, 16, 161, -0.1240, -0.0054),
    ],
)
def test_paired_interval_agrees_with_published_tables(gained, lost, n, low, high):
    assert paired_interval(gained, lost, n) == pytest.approx((low, high), abs=5e-5)


def score_statistic(gained, lost, n, d):
    """Tango's statistic with the nuisance parameter found by maximizing the likelihood."""

    def minus_log_likelihood(q):
        p = (q + d, q, 1 - 2 * q - d)
        counts = (gained, lost, n - gained - lost)
        return -sum(c * np.log(max(v, 1e-300)) for c, v in zip(counts, p, strict=True) if c)

    low, high = max(0.0, -d), (1 - d) / 2
    q = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    ).x
    return (gained - lost - n * d) / np.sqrt(n * (2 * q + d * (1 - d)))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 10_000))
@settings(max_examples=60, deadline=None)
def test_paired_interval_ends_where_the_score_statistic_is_at_the_quantile(gained, lost, rest):
    n = gained + lost + rest
    low, high = paired_interval(gained, lost, n)
    z = stats.norm.ppf(0.975)
    assert score_statistic(gained, lost, n, low) == pytest.approx(z, rel=1e-3)
    assert score_statistic(gained, lost, n, high) == pytest.approx(-z, rel=1e-3)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_paired_interval_excludes_zero_exactly_where_mcnemars_score_test_rejects(
    gained, lost, rest
):
    n = gained + lost + rest
    if n == 0:
        return
    low, high = paired_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert low < high
    table = [[0, gained], [lost, rest]]
    p = mcnemar(table, exact=False, correction=False).pvalue if gained + lost else 1.0
    assert (low > 0 or high < 0) == (p < 0.05)


def test_paired_interval_without_a_discordant_sample_is_not_a_point():
    z2 = stats.norm.ppf(0.975) ** 2
    expected = z2 / (10_000 + z2)  # the closed form of that case
    assert paired_interval(0, 0, 10_000) == pytest.approx((-expected, expected), rel=1e-6)


@given(st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_mcnemar_p_agrees_with_statsmodels(gained, lost):
    expected = mcnemar([[5, gained], [lost, 7]], exact=True).pvalue if gained + lost else 1.0
    assert mcnemar_p(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_p_agrees_with_a_published_table():
    assert mcnemar_p(6, 16) == pytest.approx(0.052479, abs=5e-7)  # Cavo et al. 2012, as above


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=12, deadline=None)
def test_holm_agrees_with_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_t_interval_agrees_with_statsmodels():
    values = np.random.default_rng(0).exponential(size=37)
    assert t_interval(values) == pytest.approx(DescrStatsW(values).tconfint_mean())
    assert t_interval(np.array([1.0])) is None
    assert t_interval(np.array([1.0, np.inf])) is None


def test_calibration_error_is_the_sum_of_its_definition():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.05, 1, 5000).astype(np.float32)
    correct = rng.random(5000) < confidence**2
    expected = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean(dtype=np.float64))
            expected += inside.sum() / 5000 * gap
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-7)
    assert expected > 0.1


def test_calibration_error_of_certain_and_of_broken_predictions():
    ones, right = np.ones(4, dtype=np.float32), np.array([True, True, True, False])
    assert expected_calibration_error(ones, right) == pytest.approx(0.25)
    broken = np.full(4, np.nan, dtype=np.float32)
    assert expected_calibration_error(broken, np.zeros(4, dtype=bool)) == 0.0


# ------------------------------------------------------------------------ the comparison


@pytest.fixture(scope="module")
def predictions():
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 5, 1200)
    first = found(rng, labels, 0.80, 5)
    second = found(rng, labels, 0.90, 5)
    third = Predictions(first.predicted.copy(), labels, first.loss + 0.1, first.confidence)
    third.predicted[:20] = (labels[:20] + 1) % 5
    return {RUNNING: first, RECOMPUTED: second, EMA: third}


@pytest.fixture(scope="module")
def comparison(predictions):
    return compare(predictions, RUNNING, "abcde")


def test_accuracy_per_class_is_recall(predictions, comparison):
    for result in comparison.results:
        f = predictions[result.condition]
        expected = recall_score(f.labels, f.predicted, average=None)
        assert result.class_accuracy == pytest.approx(expected.tolist())
        base = recall_score(f.labels, predictions[RUNNING].predicted, average=None)
        if result.versus_baseline:
            difference = result.versus_baseline.class_difference
            assert difference == pytest.approx((expected - base).tolist())


def test_changes_are_counted_sample_by_sample(predictions, comparison):
    base = predictions[RUNNING]
    for name in (RECOMPUTED, EMA):
        f, counts = predictions[name], {"gained": 0, "lost": 0, "other": 0, "same": 0}
        for label, before, after in zip(f.labels, base.predicted, f.predicted, strict=True):
            if before == after:
                counts["same"] += 1
            elif after == label:
                counts["gained"] += 1
            elif before == label:
                counts["lost"] += 1
            else:
                counts["other"] += 1
        paired = comparison[name].versus_baseline
        assert (paired.gained, paired.lost) == (counts["gained"], counts["lost"])
        assert (paired.gained, paired.lost) == paired_counts(base.correct, f.correct)
        assert paired.wrong_to_other_wrong == counts["other"]
        assert paired.changed == len(f) - counts["same"]
        assert sum(paired.class_gained) == paired.gained
        assert sum(paired.class_lost) == paired.lost
        difference = comparison[name].accuracy - comparison[RUNNING].accuracy
        assert paired.difference == pytest.approx(difference)


def test_p_values_are_corrected_over_the_kinds_tested(predictions, comparison):
    base = predictions[RUNNING]
    raw = []
    for result in comparison.results[1:]:
        f = predictions[result.condition]
        table = [[0, (f.correct & ~base.correct).sum()], [(base.correct & ~f.correct).sum(), 0]]
        raw.append(mcnemar(table, exact=True).pvalue)
    corrected = multipletests(raw, method="holm")[1]
    found_p = [(pair.p, pair.p_holm) for _, pair in comparison.others]
    assert found_p == [pytest.approx(pair) for pair in zip(raw, corrected, strict=True)]


def test_loss_and_its_paired_difference(predictions, comparison):
    base, f = predictions[RUNNING], predictions[EMA]
    result = comparison[EMA]
    assert result.loss == pytest.approx(f.loss.mean(dtype=np.float64))
    expected = DescrStatsW(f.loss.astype(np.float64)).tconfint_mean()
    assert result.loss_interval == pytest.approx(expected)
    difference = f.loss.astype(np.float64) - base.loss
    assert result.versus_baseline.loss_difference == pytest.approx(difference.mean())
    expected = DescrStatsW(difference).tconfint_mean()
    assert result.versus_baseline.loss_difference_interval == pytest.approx(expected)


def test_baseline_comes_first_and_chance_is_the_most_frequent_class(predictions):
    reordered = {name: predictions[name] for name in (EMA, RECOMPUTED, RUNNING)}
    comparison = compare(reordered, RUNNING, "abcde")
    assert [r.condition for r in comparison.results] == [RUNNING, EMA, RECOMPUTED]
    assert comparison.results[0].versus_baseline is None
    labels = predictions[RUNNING].labels
    assert comparison.chance == pytest.approx(np.bincount(labels).max() / len(labels))


def test_survives_json_without_nan(predictions):
    broken = Predictions(
        np.full(1200, -1),
        predictions[RUNNING].labels,
        np.full(1200, np.nan, dtype=np.float32),
        np.full(1200, np.nan, dtype=np.float32),
    )
    cost = LayerCost(-0.1, (-0.2, 0.0), 7, None, 1200)
    row = LayerRow("bn1", 8, 0.1, 0.3, 1, 0.2, 0.4, 2, mended=cost)
    comparison = compare(
        {RUNNING: predictions[RUNNING], Condition("batch"): broken},
        RUNNING,
        ["a", "b", "c", "d", "e", "no samples"],
        layers={Condition("batch"): [row]},
    )
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    assert json.loads(text)["kinds"][1]["name"] == "batch"
    assert comparison[Condition("batch")].broken == 1200
    assert comparison[Condition("batch")].loss is None
    assert comparison[Condition("batch")].class_accuracy[-1] is None
    assert Comparison.from_dict(json.loads(text)) == comparison


def test_different_samples_are_refused(predictions):
    other = found(np.random.default_rng(1), predictions[RUNNING].labels[::-1].copy(), 0.5, 5)
    with pytest.raises(UserError, match="not evaluated on the same samples"):
        compare({RUNNING: predictions[RUNNING], EMA: other}, RUNNING, "abcde")
    with pytest.raises(UserError, match="baseline"):
        compare(predictions, Condition("recompute"), "abcde")


# ------------------------------------------------------------------------ several seeds


def test_seeds_are_paired():
    rng = np.random.default_rng(0)
    running = 0.9 + 0.01 * rng.standard_normal(6)
    recomputed = running + 0.004 + 0.0005 * rng.standard_normal(6)
    first, second = summarize_seeds({RUNNING: running, RECOMPUTED: recomputed}, RUNNING)
    assert first.interval == pytest.approx(DescrStatsW(running).tconfint_mean())
    assert first.difference is None
    assert second.mean == pytest.approx(recomputed.mean())
    test = stats.ttest_rel(recomputed, running).confidence_interval(0.95)
    assert second.difference_interval == pytest.approx((test.low, test.high))
    assert second.standard_deviation == pytest.approx(recomputed.std(ddof=1))


def test_one_seed_has_no_interval_and_unequal_seeds_are_refused():
    (only,) = summarize_seeds({RUNNING: [0.9]}, RUNNING)
    assert only.interval is None
    assert only.standard_deviation is None
    with pytest.raises(UserError, match="same seeds"):
        summarize_seeds({RUNNING: [0.9, 0.8], "batch": [0.9]}, RUNNING)


def test_intervals_of_an_accuracy_over_seeds_stay_within_0_and_100_percent():
    high, low = [0.9999, 0.99, 0.9999], [0.0001, 0.01, 0.0001]
    above, below = summarize_seeds({RUNNING: high, RECOMPUTED: low}, RUNNING)
    assert DescrStatsW(high).tconfint_mean()[1] > 1
    assert above.interval[1] == 1.0
    assert below.interval[0] == 0.0
    assert below.difference_interval == pytest.approx(
        DescrStatsW(np.subtract(low, high)).tconfint_mean()
    )


# ------------------------------------------------------------------------ chance


@given(st.integers(0, 400), st.integers(1, 400))
@settings(max_examples=50, deadline=None)
def test_balanced_interval_of_equal_classes_is_wilsons_of_the_accuracy(right, n):
    shares = [min(right, n) / n] * 3
    expected = proportion_confint(3 * min(right, n), 3 * n, method="wilson")
    assert balanced_interval(shares, [n] * 3) == pytest.approx(expected, abs=1e-12)


def test_balanced_interval_covers_the_truth_with_unequal_classes():
    rng = np.random.default_rng(0)
    recalls, samples = [0.7, 0.7, 0.7], [20, 60, 400]
    covered = 0
    for _ in range(2000):
        found = [rng.binomial(n, p) / n for n, p in zip(samples, recalls, strict=True)]
        low, high = balanced_interval(found, samples)
        covered += low <= np.mean(recalls) <= high
    assert 0.93 < covered / 2000 < 0.985


def test_information_is_the_signed_likelihood_ratio_less_its_penalty():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 800)
    predicted = np.where(rng.random(800) < 0.4, labels, rng.integers(-1, 3, 800))
    signed = 0.0
    for k in range(4):
        table = stats.contingency.crosstab(predicted == k, labels == k).count
        if table.shape == (2, 2):
            g = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")
            right, expected = (labels[predicted == k] == k).sum(), g.expected_freq[1, 1]
            signed += np.sign(right - expected) * g.statistic
    assert information(predicted, labels) == pytest.approx(3 * (signed / 4 - np.log(800)))
    assert information(predicted, labels) > 0
    assert information(rng.permutation(predicted), labels) < 0
    assert information((labels + 1) % 4, labels) < 0
    assert information(np.full(800, 3), labels) < 0
    assert information(np.full(800, -1), labels) < 0
    assert information(labels % 1, labels % 1) == 0


def test_information_of_two_classes_is_that_of_their_table():
    predicted, labels = np.array([0] * 190 + [1] * 10), np.array([0] * 185 + [1] * 5 + [0, 1] * 5)
    table = stats.contingency.crosstab(predicted, labels).count
    g = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood").statistic
    assert information(predicted, labels) == pytest.approx(g - np.log(200))


# ------------------------------------------------------------------------ classes


def test_classes_are_tested_with_holm_over_classes_and_conditions(comparison):
    raw = []
    for _, pair in comparison.others:
        for gained, lost in zip(pair.class_gained, pair.class_lost, strict=True):
            raw.append(mcnemar([[0, gained], [lost, 0]], exact=True).pvalue)
    expected = multipletests(raw, method="holm")[1].reshape(2, 5)
    found = class_p_values(comparison.results)
    assert [found[r.condition] for r, _ in comparison.others] == [
        pytest.approx(row.tolist()) for row in expected
    ]


# ------------------------------------------------------------------------ read back


def test_an_old_record_reads_back():
    path = ROOT / "tests/records/before-the-rebuild/before-1/comparison.json"
    content = json.loads(path.read_text())
    found = Comparison.from_dict(content)
    assert [str(r.condition) for r in found.results] == [k["name"] for k in content["kinds"]]
    again = found.to_dict()
    for key in ("samples", "classes", "class_samples", "chance", "baseline", "verdict", "remarks"):
        assert again[key] == content[key]
    for kind, old in zip(again["kinds"], content["kinds"], strict=True):
        assert json.loads(json.dumps({k: kind[k] for k in old})) == old
        assert kind["information"] is None
    (rows,) = (again["layers"][name] for name in content["layers"] if name == "recomputed")
    for row, old in zip(rows, content["layers"]["recomputed"], strict=True):
        assert json.loads(json.dumps({k: row[k] for k in old})) == old
        assert row["samples"] is None
    assert found.verdict.outcome in ("undecided", "agree", "baseline-worse", "baseline-better")


def damaged(content, path, value):
    content = json.loads(json.dumps(content))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["kinds"], []),
        (["kinds"], None),
        (["kinds", 0], 7),
        (["kinds", 1, "versus_baseline"], None),
        (["kinds", 1, "accuracy"], float("nan")),
        (["kinds", 1, "name"], ["running"]),
        (["kinds", 1, "class_accuracy"], [0.5]),
        (["kinds", 1, "accuracy_interval"], [0.5]),
        (["kinds", 1, "versus_baseline", "class_lost"], [1, 2, 3]),
        (["class_samples"], [0, 0, 0, 0, 0]),
        (["class_samples"], [-1, 2, 2, 2, 2]),
        (["classes"], "abcde"),
        (["baseline"], "batch"),
        (["verdict"], {"text": "fine"}),
        (["layers"], ["bn1"]),
        (["layers"], {"recomputed": [{"name": "bn1"}]}),
        (["samples"], "many"),
    ],
)
def test_a_damaged_record_is_one_line(comparison, path, value):
    content = comparison.to_dict()
    Comparison.from_dict(content)
    with pytest.raises(UserError) as error:
        Comparison.from_dict(damaged(content, path, value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


FREE = (
    "information",
    "ece",
    "loss",
    "loss_interval",
    "loss_difference",
    "loss_difference_interval",
)
"""What follows from no other number of a record, or from one that may be missing."""


def numbers(tree, where=()):
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    if isinstance(tree, int | float):
        yield where
    for key in keys:
        if key not in FREE:
            yield from numbers(tree[key], (*where, key))


def test_no_number_of_a_record_can_be_changed_alone(comparison):
    """But for a few: how many are wrong otherwise, how many are broken, and FREE."""
    content = json.loads(json.dumps(comparison.to_dict()))
    places = [p for p in numbers(content) if p[-1] not in ("wrong_to_other_wrong", "broken")]
    assert len(places) > 60
    for path in places:
        value = content
        for key in path:
            value = value[key]
        for other in {value + 1, 0.999 * value, -value, 0} - {value}:
            with pytest.raises(UserError):
                Comparison.from_dict(damaged(content, path, type(value)(other)))
                raise AssertionError(f"{path}: {value} became {other}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["kinds", 0, "broken"], -1),
        (["kinds", 0, "broken"], 5000),
        (["kinds", 0, "ece"], 1.5),
        (["kinds", 0, "loss"], 1e9),
        (["kinds", 1, "loss_interval"], [3.0, 4.0]),
        (["kinds", 1, "versus_baseline", "loss_difference"], 0.5),
        (["kinds", 1, "versus_baseline", "wrong_to_other_wrong"], 5000),
        (["kinds", 1, "accuracy"], "0.9"),
        (["kinds", 1, "accuracy"], True),
        (["kinds", 1, "versus_baseline", "p"], 10**400),
    ],
)
def test_numbers_that_can_not_be_are_refused(comparison, path, value):
    with pytest.raises(UserError):
        Comparison.from_dict(damaged(comparison.to_dict(), path, value))


def test_analysis_needs_no_torch():
    code = (
        "import sys, bnexp.analysis.comparison, bnexp.analysis.seeds; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
