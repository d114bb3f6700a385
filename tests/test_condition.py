"""What is compared has one name in files and one in sentences, and both say all of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnexp.condition import Condition, compared_with, label, made_by

CONFIG = {
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


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (Condition("running"), "running"),
        (Condition("running", "best"), "running"),
        (Condition("recomputed", method="pooled"), "recomputed/pooled"),
        (Condition("recomputed", "swa"), "swa/recomputed"),
        (Condition("recomputed", "swa", "pooled"), "swa/recomputed/pooled"),
        (Condition("ema"), "ema"),
        (Condition("ema", "ema"), "ema/ema"),
    ],
)
def test_as_in_files(condition, text):
    assert str(condition) == text
    own = "best" if condition.weights == "best" else "trained"
    assert Condition.parse(text, own) == condition


@given(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True),
    st.sampled_from(["trained", "ema", "swa"]),
    st.sampled_from([None, "exact", "batch-mean"]),
)
def test_what_is_printed_is_read_back(statistics, weights, method):
    condition = Condition(statistics, weights, method)
    assert Condition.parse(str(condition)) == condition


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ("running", "trained weights with running averages (decay 0.9)"),
        ("recomputed", "trained weights with recomputed statistics (exact)"),
        ("recomputed/pooled", "trained weights with recomputed statistics (pooled)"),
        ("batch", "trained weights with batch statistics (mini-batches of 250)"),
        ("slow", "trained weights with the slow statistics (decay 0.999, debiased)"),
        ("average", "trained weights with the average statistics (cumulative average)"),
        ("window", "trained weights with the window statistics (pooled over 100 steps)"),
        ("swa/running", "SWA weights with the trained model's running averages (decay 0.9)"),
        ("ema/recomputed", "EMA weights with recomputed statistics (exact)"),
        ("none", "trained weights without batch normalization"),
        ("swa/none", "SWA weights without batch normalization"),
    ],
)
def test_in_sentences_weights_and_statistics_are_both_said(condition, text):
    assert label(Condition.parse(condition), made_by(CONFIG)) == text
    best = label(Condition.parse(condition, own="best"), made_by(CONFIG))
    assert best == text.replace("trained weights", "best weights")


def test_the_baseline_is_judged_by_recomputed_statistics_of_the_same_weights():
    names = ["recomputed-old", "swa/recomputed", "recomputed/pooled"]
    old, swa, recomputed = map(Condition.parse, names)
    assert compared_with(Condition("running"), [old, swa, recomputed]) == recomputed
    assert compared_with(Condition("running", "swa"), [old, swa, recomputed]) == swa
    assert compared_with(Condition("running"), [old]) == old
    assert compared_with(Condition("running"), []) is None
