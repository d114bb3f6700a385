"""Each verdict as a reader sees it, for comparisons whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bnexp.analysis.comparison import compare
from bnexp.analysis.intervals import balanced_interval
from bnexp.analysis.predictions import Predictions
from bnexp.analysis.results import class_p_values
from bnexp.analysis.verdict import THESE_WEIGHTS, advice, at_chance
from bnexp.analysis.words import count, p_value, percent, signed, signed_interval
from bnexp.condition import Condition

MADE = {"running": "decay 0.9"}
RUNNING, RECOMPUTED = Condition("running"), Condition("recomputed")


def pair(n, right, lost=0, gained=0, shifted=0.0):
    """Two kinds of `n` samples in ten equal classes: `right` are right under the first; of these
    `lost` are wrong under the second, and `gained` others right."""
    labels = np.arange(n) % 10
    order = np.random.default_rng(0).permutation(n)
    first, second = np.zeros(n, bool), np.zeros(n, bool)
    first[order[:right]] = True
    second[order[lost : right + gained]] = True
    loss = np.linspace(0, 0.5, n, dtype=np.float32)
    confidence = np.full(n, 0.9, dtype=np.float32)
    wrong = (labels + 1) % 10
    return {
        RUNNING: Predictions(np.where(first, labels, wrong), labels, loss, confidence),
        RECOMPUTED: Predictions(
            np.where(second, labels, wrong), labels, loss + shifted, confidence
        ),
    }


def verdict(predictions):
    return compare(predictions, RUNNING, "0123456789", made=MADE).verdict.text


def headline(predictions):
    return verdict(predictions).removesuffix(f" {THESE_WEIGHTS}")


def test_agreement():
    assert headline(pair(10_000, 9170, lost=15, gained=16)) == (
        "Trained weights with running averages (decay 0.9) and with recomputed statistics agree: "
        "91.7 % both, 31 of 10,000 predictions differ, no evidence of a difference (p = 1)."
    )


def test_agreement_on_every_sample():
    assert headline(pair(10_000, 9170)) == (
        "Trained weights with running averages (decay 0.9) and with recomputed statistics agree on "
        "each of the 10,000 samples: 91.7 % both."
    )


@pytest.mark.parametrize("right", [0, 60, 100])
def test_samples_of_one_class_say_nothing_about_telling_classes_apart(right):
    predictions = {
        condition: replace(found, labels=0 * found.labels, predicted=found.predicted // 10)
        for condition, found in pair(100, right, lost=right // 2).items()
    }
    remarks = compare(predictions, RUNNING, "0123456789", made=MADE).verdict.remarks
    assert remarks[0] == (
        "All 100 samples are of class 0: a model that names it whatever it sees is right about "
        "each of them."
    )
    assert not any("of class" in r for r in compare(pair(100, right), RUNNING, "0123456789",
                                                    made=MADE).verdict.remarks)  # fmt: skip


def test_a_cost():
    assert headline(pair(10_000, 9170, lost=5, gained=215)) == (
        "Trained weights with running averages (decay 0.9) cost 2.10 points (95 % interval 1.83 to "
        "2.41): 91.70 % against 93.80 % with recomputed statistics; 220 of 10,000 "
        "predictions differ (p < 0.001)."
    )


def test_the_one_that_loses_is_the_subject():
    text = headline(pair(10_000, 9170, lost=30, gained=8))
    assert text.startswith(
        "Trained weights with recomputed statistics cost 0.22 points (95 % interval 0.10 to"
    )
    assert "91.48 % against 91.70 % with running averages (decay 0.9)" in text


def test_too_few_samples_are_no_agreement():
    text = headline(pair(360, 349, lost=4, gained=6))
    assert text.startswith("No difference between")
    assert "from −1.37 to +2.62 points" in text
    assert text.endswith("too few samples to call them equal.")


def test_one_kind_at_chance():
    text = headline(pair(10_000, 1000, gained=8000))
    assert text == (
        "Trained weights with running averages (decay 0.9) are at chance (balanced accuracy "
        "10.0 %, guessing gives 10.0 %) where the model reaches 90.0 % with recomputed statistics: "
        "the weights have learned, these statistics do not belong to them (p < 0.001)."
    )


def test_a_little_better_than_guessing_is_not_called_learned():
    text = headline(pair(10_000, 1000, gained=360))
    assert text.endswith(
        "where the model reaches 13.6 % with recomputed statistics: these statistics do not belong "
        "to these weights (p < 0.001)."
    )


def test_both_at_chance():
    text = headline(pair(10_000, 1000, lost=200, gained=210))
    assert "the model is at chance under both (balanced accuracy 10.0 % and 10.1 %" in text


def test_a_single_kind():
    predictions = pair(10_000, 9170)
    del predictions[RECOMPUTED]
    assert verdict(predictions) == (
        "91.7 % for trained weights with running averages (decay 0.9) (95 % interval 91.1 to "
        "92.2 %, 10,000 samples); it was evaluated under nothing else to compare with."
    )


def test_a_difference_in_loss_alone_is_remarked():
    found = compare(
        pair(10_000, 9170, lost=15, gained=16, shifted=0.05), RUNNING, "0123456789", made=MADE
    )
    (remark,) = found.verdict.remarks
    assert remark.startswith(
        "The loss tells trained weights with running averages (decay 0.9) and with recomputed"
    )
    quiet = compare(pair(10_000, 9170, lost=15, gained=16), RUNNING, "0123456789", made=MADE)
    assert quiet.verdict.remarks == ()


def test_several_kinds_are_said_to_be_corrected_and_batch_statistics_explained():
    predictions = pair(10_000, 9170, lost=5, gained=215)
    predictions[Condition("batch")] = pair(10_000, 9170, lost=400)[RECOMPUTED]
    found = compare(predictions, RUNNING, "0123456789", made=MADE)
    assert "p < 0.001, Holm-corrected" in found.verdict.text
    assert any(
        "with batch statistics cost 4.00 points" in remark for remark in found.verdict.remarks
    )
    assert any("depends on which other samples" in remark for remark in found.verdict.remarks)
    assert "(Holm)" in found.verdict.remarks[-1]


def test_broken_outputs_are_said():
    predictions = pair(1000, 900)
    predictions[RECOMPUTED].predicted[:10] = -1
    remarks = compare(predictions, RUNNING, "0123456789", made=MADE).verdict.remarks
    assert "10 of 1,000 outputs are not finite numbers" in remarks[0]


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.00099, "p < 0.001"),
        (0.0312, "p = 0.031"),
        (0.0049, "p = 0.0049"),
        (0.6171, "p = 0.62"),
        (0.9999, "p = 1"),
    ],
)
def test_p_values(p, text):
    assert p_value(p) == text


def test_numbers():
    assert percent(0.91666) == "91.7 %"
    assert [count(n) for n in (7, 1797, 10_000, 1_234_567)] == ["7", "1,797", "10,000", "1,234,567"]
    texts = [signed(d) for d in (0.0219, -0.0219, 0.0, 0.00029, -0.0000001)]
    assert signed_interval((-0.00023, 0.0209)) == "−0.02 to +2.09"
    assert signed_interval((-0.00023, 0.00005)) == "−0.023 to +0.005"
    assert texts == ["+2.19", "−2.19", "0.00", "+0.029", "−0.000010"]


def test_an_estimator_whose_name_begins_like_recomputed_is_not_taken_for_it():
    predictions = pair(10_000, 9170, gained=215)
    predictions = {
        RUNNING: predictions[RUNNING],
        Condition("recomputed-old"): predictions[RUNNING],
        RECOMPUTED: predictions[RECOMPUTED],
    }
    assert "with recomputed statistics" in verdict(predictions)


# ------------------------------------------------------------------------ chance


def named(labels, predicted):
    zeros = np.zeros(len(labels), dtype=np.float32)
    return Predictions(np.asarray(predicted), np.asarray(labels), zeros, zeros)


def of_defects(n=1000, share=0.05, recall=0.9, false_alarms=0.042):
    """Binary predictions of rare defects (class 1)."""
    defects = round(share * n)
    labels = np.arange(n) < defects
    predicted = np.zeros(n, bool)
    predicted[: round(recall * defects)] = True
    predicted[defects : defects + round(false_alarms * (n - defects))] = True
    return named(labels.astype(np.int64), predicted.astype(np.int64))


def single(predictions, classes):
    result = compare({RUNNING: predictions}, RUNNING, classes)
    return result, at_chance(result.base, result.class_samples)


def test_finding_rare_defects_is_not_chance_though_below_the_majority_rate():
    found, chance = single(of_defects(), ["fine", "defect"])
    assert found.base.accuracy == pytest.approx(0.955, abs=0.001)
    assert found.base.accuracy_interval[0] < found.chance < found.base.accuracy_interval[1]
    assert found.base.balanced_accuracy == pytest.approx(0.93, abs=0.005)
    assert not chance


def test_few_defects_found_without_a_false_alarm_are_information():
    found, chance = single(of_defects(200, recall=0.3, false_alarms=0), ["fine", "defect"])
    low, _ = balanced_interval(found.base.class_accuracy, found.class_samples)
    assert low < 0.5  # the balanced accuracy alone could be chance
    assert not chance


@pytest.mark.parametrize("n", [200, 10_000])
def test_guessing_is_chance_whatever_the_majority(n):
    rng = np.random.default_rng(n)
    labels = (rng.random(n) < 0.05).astype(np.int64)
    for predicted in (np.zeros(n, int), np.ones(n, int), rng.integers(0, 2, n)):
        assert single(named(labels, predicted), ["fine", "defect"])[1]
    assert single(named(labels, np.full(n, -1)), ["fine", "defect"])[1]


def test_a_model_that_knows_the_classes_by_other_names_is_below_chance_not_at_it():
    labels = np.arange(300) % 2
    assert not single(named(labels, 1 - labels), "ab")[1]


def test_traces_of_the_label_in_a_collapsed_model_are_chance_all_the_same():
    """Nearly always one class; of the few others twice as many are right as by chance."""
    labels = np.arange(10_000) % 10
    predicted = np.full(10_000, 3)
    others = np.flatnonzero(labels != 3)
    predicted[others[:180]] = (labels[others[:180]] + np.arange(180) % 5) % 10
    found, chance = single(named(labels, predicted), "0123456789")
    assert chance
    assert found.base.balanced_accuracy == pytest.approx(0.1036, abs=5e-4)


def test_guesses_are_called_chance_about_as_often_as_the_interval_says():
    rng = np.random.default_rng(0)
    calls = 0
    for _ in range(1000):
        labels = rng.integers(0, 5, 300)
        calls += single(named(labels, rng.integers(0, 5, 300)), "abcde")[1]
    assert 0.93 < calls / 1000 < 0.97


def test_nothing_else_is_said_of_a_model_at_chance():
    base = of_defects(recall=0, false_alarms=0)
    other = of_defects(recall=1, false_alarms=1)
    other = Predictions(other.predicted, other.labels, other.loss + 1, other.confidence)
    found = compare({RUNNING: base, RECOMPUTED: other}, RUNNING, ["fine", "defect"], made=MADE)
    assert found.verdict.outcome == "chance"
    assert found.verdict.text == (
        "Nothing can be said about trained weights with running averages (decay 0.9) and with "
        "recomputed statistics: the model is at chance under both (balanced accuracy 50.0 % and "
        "50.0 %, guessing gives 50.0 %)."
    )
    assert found.verdict.remarks == ()


def test_a_constant_answer_beside_one_that_finds_the_defects_is_at_chance_at_equal_accuracy():
    base, other = of_defects(recall=0, false_alarms=0), of_defects(recall=0.5, false_alarms=0.0263)
    found = compare({RUNNING: base, RECOMPUTED: other}, RUNNING, ["fine", "defect"], made=MADE)
    assert found.base.accuracy == pytest.approx(found[RECOMPUTED].accuracy, abs=0.001)
    assert found.verdict.outcome == "baseline-at-chance"
    assert "balanced accuracy 50.0 %, guessing gives 50.0 %" in found.verdict.text


def test_old_records_without_the_information_are_judged_by_balanced_accuracy_alone():
    found = compare({RUNNING: of_defects()}, RUNNING, ["fine", "defect"])
    assert not at_chance(replace(found.base, information=None), found.class_samples)
    few = compare({RUNNING: of_defects(200, recall=0.3, false_alarms=0)}, RUNNING, "fd")
    assert at_chance(replace(few.base, information=None), few.class_samples)


# ------------------------------------------------------------------------ what a p-value says


@pytest.mark.parametrize("changes", [{"gained": 215}, {"lost": 15, "gained": 16}, {"lost": 60}, {}])
def test_every_verdict_says_what_it_speaks_about(changes):
    assert verdict(pair(10_000, 9170, **changes)).endswith(
        "This speaks about these weights on these test images: another training may differ."
    )


# ------------------------------------------------------------------------ single classes


def test_classes_that_shift_where_the_whole_does_not_are_named():
    labels = np.arange(2000) % 10
    base, other = labels.copy(), labels.copy()
    base[np.flatnonzero(labels == 3)[:20]] = 5
    other[np.flatnonzero(labels == 5)[:20]] = 3
    found = compare(
        {RUNNING: named(labels, base), RECOMPUTED: named(labels, other)},
        RUNNING,
        [f"class {i}" for i in range(10)],
        made=MADE,
    )
    assert "(p = 1)" in found.verdict.text
    assert found.verdict.remarks == (
        "Single classes shift between trained weights with running averages (decay 0.9) and with "
        "recomputed statistics, right only under the latter : only under the former: class 3 "
        "20 : 0 (p < 0.001), class 5 0 : 20 (p < 0.001); p-values are Holm-corrected over 10 "
        "classes.",
    )


def test_classes_without_samples_are_not_among_those_corrected_for():
    labels = np.arange(2000) % 4
    base, other = labels.copy(), labels.copy()
    base[np.flatnonzero(labels == 3)[:20]] = 2
    other[np.flatnonzero(labels == 2)[:20]] = 3
    predictions = {RUNNING: named(labels, base), RECOMPUTED: named(labels, other)}
    (remark,) = compare(predictions, RUNNING, "0123456789", made=MADE).verdict.remarks
    assert remark.endswith("p-values are Holm-corrected over 4 classes.")


def test_classes_that_go_with_the_whole_are_not_named():
    found = compare(pair(10_000, 9170, gained=215), RUNNING, "0123456789")
    assert min(p for p in class_p_values(found.results)[RECOMPUTED]) < 0.05
    assert found.verdict.remarks == ()


# ------------------------------------------------------------------------ the worst moment


def moments(*differences, base=0.9):
    return [
        row
        for i, difference in enumerate(differences)
        for row in ((200 * (i + 1), RUNNING, base), (200 * (i + 1), RECOMPUTED, base + difference))
    ]


def test_the_worst_moment_of_the_run_is_in_the_verdict():
    found = compare(pair(10_000, 9170, lost=15, gained=16), RUNNING, "0123456789", made=MADE)
    told = found.along_the_run(moments(0.0005, -0.03, 0.0192, 0.0002))
    assert told.verdict.outcome == "agree"
    assert told.verdict.text == (
        f"{found.verdict.text} The worst moment of the run: 1.92 points lost at step 600 "
        "(running 90.00 %, recomputed 91.92 %; the largest of 4 such differences)."
    )


@pytest.mark.parametrize(
    ("samples", "differences"),
    [
        (10_000, (0.001, 0.008, 0.0)),  # within what is called agreement
        (10_000, (0.03,)),  # one evaluation is no run
        (200, (0.02, 0.03, 0.0)),  # six images of 200, chosen among three
        (10_000, (-0.2, -0.1)),  # never a cost
    ],
)
def test_a_moment_that_says_nothing_is_not_named(samples, differences):
    found = compare(pair(samples, samples * 9 // 10), RUNNING, "0123456789")
    assert found.along_the_run(moments(*differences)).verdict == found.verdict


def test_a_cost_that_is_worst_at_the_end_needs_no_moment():
    found = compare(pair(10_000, 9170, gained=215), RUNNING, "0123456789")
    assert found.along_the_run(moments(0.02, 0.0215)).verdict == found.verdict


def test_confidence_suffers_before_predictions_change_only_where_none_changed():
    for changes, said in (({}, True), ({"lost": 15, "gained": 16}, False)):
        found = compare(pair(10_000, 9170, shifted=0.05, **changes), RUNNING, "0123456789")
        (remark,) = found.verdict.remarks
        assert ("Confidence suffers before predictions change." in remark) == said


def test_advice_names_recomputed_statistics_and_the_averages_that_came_near():
    labels = np.arange(1000) % 10

    def predicted(wrong):
        found = labels.copy()
        found[:wrong] = (found[:wrong] + 1) % 10
        return Predictions(found, labels, np.ones(1000, np.float32), np.full(1000, 0.5, np.float32))

    def advised(**wrong):
        names = {name: Condition(name) for name in wrong}
        found = compare(
            {names[name]: predicted(n) for name, n in wrong.items()},
            names["running"],
            [str(i) for i in range(10)],
        )
        return advice(found.verdict, found.results)

    text = advised(running=400, near=12, far=200, recomputed=10)
    assert "recomputed statistics" in text and "near (98.80 %)" in text and "far" not in text
    assert advised(running=12, recomputed=10) is None
    assert advised(running=10, recomputed=400) is None
    assert advised(running=400, other=10) is None
