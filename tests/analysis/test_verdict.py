"""Each verdict as a reader sees it, for comparisons whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from bnexp.analysis.comparison import compare
from bnexp.analysis.predictions import Predictions
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


def test_agreement():
    assert verdict(pair(10_000, 9170, lost=15, gained=16)) == (
        "Trained weights with running averages (decay 0.9) and with recomputed statistics agree: "
        "91.7 % both, 31 of 10,000 predictions differ, no evidence of a difference (p = 1)."
    )


def test_agreement_on_every_sample():
    assert verdict(pair(10_000, 9170)) == (
        "Trained weights with running averages (decay 0.9) and with recomputed statistics agree on "
        "each of the 10,000 samples: 91.7 % both."
    )


def test_a_cost():
    assert verdict(pair(10_000, 9170, lost=5, gained=215)) == (
        "Trained weights with running averages (decay 0.9) cost 2.10 points (95 % interval 1.83 to "
        "2.41): 91.70 % against 93.80 % with recomputed statistics; 220 of 10,000 "
        "predictions differ (p < 0.001)."
    )


def test_the_one_that_loses_is_the_subject():
    text = verdict(pair(10_000, 9170, lost=30, gained=8))
    assert text.startswith(
        "Trained weights with recomputed statistics cost 0.22 points (95 % interval 0.10 to"
    )
    assert "91.48 % against 91.70 % with running averages (decay 0.9)" in text


def test_too_few_samples_are_no_agreement():
    text = verdict(pair(360, 349, lost=4, gained=6))
    assert text.startswith("No difference between")
    assert "from −1.37 to +2.62 points" in text
    assert text.endswith("too few samples to call them equal.")


def test_one_kind_at_chance():
    text = verdict(pair(10_000, 1000, gained=8000))
    assert text == (
        "Trained weights with running averages (decay 0.9) are at chance (10.0 %) where the model "
        "reaches 90.0 % with recomputed statistics: the weights have learned, these "
        "statistics do not belong to them (p < 0.001)."
    )


def test_both_at_chance():
    text = verdict(pair(10_000, 1000, lost=200, gained=210))
    assert "the model is at chance under both (10.0 % and 10.1 %" in text


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
