"""Each verdict as a reader sees it, for comparisons whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from bnexp.analysis.comparison import compare
from bnexp.analysis.verdict import (
    count,
    p_value,
    percent,
    signed,
    signed_interval,
)
from bnexp.condition import compared_kind, config_labels
from bnexp.evaluation.predictions import Predictions

LABELS = {"running": "running averages (decay 0.9)"}


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
        "running": Predictions(np.where(first, labels, wrong), labels, loss, confidence),
        "recomputed": Predictions(
            np.where(second, labels, wrong), labels, loss + shifted, confidence
        ),
    }


def verdict(predictions):
    return compare(predictions, "running", "0123456789", labels=LABELS).verdict


def test_agreement():
    assert verdict(pair(10_000, 9170, lost=15, gained=16)) == (
        "Running averages (decay 0.9) and recomputed statistics agree: 91.7 % both, 31 of 10 000 "
        "predictions differ, no evidence of a difference (p = 1)."
    )


def test_agreement_on_every_sample():
    assert verdict(pair(10_000, 9170)) == (
        "Running averages (decay 0.9) and recomputed statistics agree on each of the 10 000 "
        "samples: 91.7 % both."
    )


def test_a_cost():
    assert verdict(pair(10_000, 9170, lost=5, gained=215)) == (
        "Running averages (decay 0.9) cost 2.10 points (95 % interval 1.83 to 2.41): 91.70 % "
        "against 93.80 % with recomputed statistics; 220 of 10 000 predictions differ (p < 0.001)."
    )


def test_a_gain():
    text = verdict(pair(10_000, 9170, lost=30, gained=8))
    assert text.startswith("Running averages (decay 0.9) gain 0.22 points (95 % interval 0.10 to")
    assert "91.70 % against 91.48 % with recomputed statistics" in text


def test_too_few_samples_are_no_agreement():
    text = verdict(pair(360, 349, lost=4, gained=6))
    assert text.startswith("No difference between")
    assert "from −1.37 to +2.62 points" in text
    assert text.endswith("too few samples to call them equal.")


def test_one_kind_at_chance():
    text = verdict(pair(10_000, 1000, gained=8000))
    assert text == (
        "Running averages (decay 0.9) leave the model at chance (10.0 %) where recomputed "
        "statistics give 90.0 %: the weights have learned, these statistics do not belong to them "
        "(p < 0.001)."
    )


def test_both_at_chance():
    text = verdict(pair(10_000, 1000, lost=200, gained=210))
    assert "the model is at chance under both (10.0 % and 10.1 %" in text


def test_a_single_kind():
    predictions = pair(10_000, 9170)
    del predictions["recomputed"]
    assert verdict(predictions) == (
        "91.7 % with running averages (decay 0.9) (95 % interval 91.1 to 92.2 %, 10 000 samples); "
        "the model was evaluated under no others to compare with."
    )


def test_a_difference_in_loss_alone_is_remarked():
    found = compare(pair(10_000, 9170, lost=15, gained=16, shifted=0.05), "running", "0123456789")
    (remark,) = found.remarks
    assert remark.startswith("The loss tells running averages and recomputed statistics apart")
    quiet = compare(pair(10_000, 9170, lost=15, gained=16), "running", "0123456789")
    assert quiet.remarks == []


def test_several_kinds_are_said_to_be_corrected_and_batch_statistics_explained():
    predictions = pair(10_000, 9170, lost=5, gained=215)
    predictions["batch"] = pair(10_000, 9170, lost=400)["recomputed"]
    found = compare(predictions, "running", "0123456789")
    assert "p < 0.001, Holm-corrected" in found.verdict
    assert any("gain 4.00 points" in remark for remark in found.remarks)
    assert any("depends on which other samples" in remark for remark in found.remarks)
    assert "(Holm)" in found.remarks[-1]


def test_broken_outputs_are_said():
    predictions = pair(1000, 900)
    predictions["recomputed"].predicted[:10] = -1
    remarks = compare(predictions, "running", "0123456789").remarks
    assert "10 of 1000 outputs are not finite numbers" in remarks[0]


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
    assert [count(n) for n in (7, 1797, 10_000, 1_234_567)] == ["7", "1797", "10 000", "1 234 567"]
    texts = [signed(d) for d in (0.0219, -0.0219, 0.0, 0.00029, -0.0000001)]
    assert signed_interval((-0.00023, 0.0209)) == "−0.02 to +2.09"
    assert signed_interval((-0.00023, 0.00005)) == "−0.023 to +0.005"
    assert texts == ["+2.19", "−2.19", "0.00", "+0.029", "−0.000010"]


def test_labels_of_a_config_say_how_the_statistics_were_made():
    config = {
        "statistics": {
            "decay": 0.9,
            "recompute": {"method": "exact"},
            "estimators": {
                "slow": {"rule": "ema", "decay": 0.999, "debias": True},
                "average": {"rule": "cumulative"},
                "window": {"rule": "pooled", "window": 100},
            },
        },
        "test": {"batch_size": 250},
    }
    labels = config_labels(config)
    assert labels["running"] == "running averages (decay 0.9)"
    assert labels["recomputed"] == "recomputed statistics (exact)"
    assert labels["batch"] == "batch statistics (mini-batches of 250)"
    assert labels["slow"] == "the slow statistics (decay 0.999, debiased)"
    assert labels["average"] == "the average statistics (cumulative average)"
    assert labels["window"] == "the window statistics (pooled over 100 steps)"


def test_an_estimator_whose_name_begins_like_recomputed_is_not_taken_for_it():
    predictions = pair(10_000, 9170, gained=215)
    predictions = {
        "running": predictions["running"],
        "recomputed-old": predictions["running"],
        "recomputed": predictions["recomputed"],
    }
    assert "with recomputed statistics" in verdict(predictions)
    assert compared_kind(["recomputed-old", "recomputed/pooled"]) == "recomputed/pooled"
    assert compared_kind(["recomputed-old"]) == "recomputed-old"
    assert compared_kind([]) is None
