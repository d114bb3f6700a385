"""The estimators' rules against their definitions, written out in numpy."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnexp.errors import UserError
from bnexp.statistics.banks import average_, pool_window_, pooled_value
from bnexp.statistics.rules import Cumulative, Ema, Estimator, Pooled


@pytest.mark.parametrize("decay", [1, 1.0, -0.1, 2, float("nan"), "0.9", None, True])
def test_decays_out_of_range_are_refused(decay):
    with pytest.raises(UserError, match="decay must be at least 0 and less than 1"):
        Ema(decay)


@pytest.mark.parametrize("window", [0, -1, 2.5, "8", True])
def test_windows_that_make_no_sense_are_refused(window):
    with pytest.raises(UserError, match="window is a positive number"):
        Pooled(window)


def run_average(rule, batches, start):
    values = torch.from_numpy(start).double().reshape(1, 2, -1).clone()
    start = torch.tensor(rule.initial_weight_sum, dtype=torch.float64)
    weight_sum = start.expand(1, 1, values.shape[2]).clone()
    decay = torch.tensor(rule.decay, dtype=torch.float64).view(1, 1, 1)
    for batch, seen in batches:
        average_(values, weight_sum, decay, torch.from_numpy(batch), seen)
    return values[0].numpy()


@settings(deadline=None)
@given(
    steps=st.integers(0, 30),
    decay=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9]),
    seed=st.integers(0, 999),
    all_seen=st.booleans(),
)
def test_averages_follow_their_definitions(steps, decay, seed, all_seen):
    random = np.random.default_rng(seed)
    start = random.normal(size=(2, 3))
    batches = random.normal(size=(steps, 2, 3)) + 5
    seen = np.ones((steps, 3), bool) if all_seen else random.random((steps, 3)) < 0.6
    fed = [
        (batch, None if all_seen else torch.from_numpy(mask))
        for batch, mask in zip(batches, seen, strict=True)
    ]

    def literally(rule, column):
        mine = [b[:, column] for b, mask in zip(batches, seen, strict=True) if mask[column]]
        if not mine:
            return start[:, column]
        if rule == Cumulative():
            return np.mean(mine, axis=0)
        value = np.zeros(2) if rule.debias else start[:, column]
        for batch in mine:
            value = decay * value + (1 - decay) * batch
        # 1 - decay^t, without cancellation for decays close to 1
        return value / -np.expm1(len(mine) * np.log(decay)) if rule.debias and decay else value

    for rule in (Ema(decay), Ema(decay, debias=True), Cumulative()):
        got = run_average(rule, fed, start)
        expected = np.stack([literally(rule, column) for column in range(3)], axis=1)
        np.testing.assert_allclose(got, expected, rtol=1e-6 if decay > 0.9999 else 1e-10)


def last_batches(rule, t):
    """How many of the newest mini-batches the docstring of Pooled says count after t of them."""
    if rule.window is None:
        return t
    if rule.window < 32:
        return min(t, rule.window)
    q = rule.window // 16
    full = (rule.window // q) * q
    return t if t <= full else full - q + ((t - 1) % q + 1)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=90),
    window=st.sampled_from([None, 1, 2, 5, 31, 32, 33, 40, 50, 64, 79]),
    offset=st.sampled_from([0.0, 1000.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_pooled_is_numpy_over_all_values_of_the_last_batches(sizes, window, offset, seed):
    rule = Pooled(window)
    random = np.random.default_rng(seed)
    batches = [random.normal(offset + random.normal(), 0.1, size=(n, 2)) for n in sizes]
    blocks = torch.zeros(rule.blocks, 3, 2, dtype=torch.float64)
    otherwise = torch.zeros(2, 2, dtype=torch.float64)
    for t, batch in enumerate(batches):
        moments = np.stack([batch.mean(0), batch.var(0, ddof=1)])
        pool_window_(
            blocks,
            torch.full((2,), t),
            rule.block_length,
            torch.full((2,), float(len(batch)), dtype=torch.float64),
            torch.from_numpy(moments),
        )
        values = np.concatenate(batches[: t + 1][-last_batches(rule, t + 1) :])
        mean, var = pooled_value(blocks, otherwise).numpy()
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(var, values.var(0, ddof=1), rtol=1e-7 if offset > 1e5 else 1e-9)
    if window:
        assert 7 / 8 * window <= last_batches(rule, 10 * window) <= window
    assert len(blocks) <= 31


def test_pooled_channels_keep_their_own_place_in_the_ring():
    rule = Pooled(3)
    blocks = torch.zeros(rule.blocks, 3, 2, dtype=torch.float64)
    turn, mine = torch.zeros(2, dtype=torch.int64), [[], []]
    random = np.random.default_rng(0)
    for _ in range(40):
        seen = random.random(2) < 0.5
        batch = random.normal(size=(4, 2))
        pool_window_(
            blocks,
            turn,
            rule.block_length,
            torch.full((2,), 4.0, dtype=torch.float64),
            torch.from_numpy(np.stack([batch.mean(0), batch.var(0, ddof=1)])),
            torch.from_numpy(seen),
        )
        turn += torch.from_numpy(seen)
        otherwise = torch.full((2, 2), 7.0, dtype=torch.float64)
        value = pooled_value(blocks, otherwise).numpy()
        for channel in range(2):
            if seen[channel]:
                mine[channel].append(batch[:, channel])
            if mine[channel]:
                values = np.concatenate(mine[channel][-3:])
                expected = [values.mean(), values.var(ddof=1)]
            else:
                expected = [7.0, 7.0]
            np.testing.assert_allclose(value[:, channel], expected)


def test_rules_are_sections_of_a_config():
    adapter = pydantic.TypeAdapter(Annotated[Estimator, pydantic.Field(discriminator="rule")])
    for section, rule in [
        ({"rule": "ema"}, Ema(0.9)),
        ({"rule": "ema", "decay": 0.99, "debias": True}, Ema(0.99, debias=True)),
        ({"rule": "cumulative"}, Cumulative()),
        ({"rule": "pooled"}, Pooled()),
        ({"rule": "pooled", "window": 8}, Pooled(8)),
    ]:
        assert adapter.validate_python(section) == rule
        dumped = adapter.dump_python(rule)
        assert next(iter(dumped)) == "rule" and section.items() <= dumped.items()
        assert adapter.validate_python(dumped) == rule
    for wrong in (
        {"rule": "ema", "decay": 1.0},
        {"rule": "ema", "momentum": 0.1},
        {"rule": "pooled", "window": 0},
        {"rule": "median"},
    ):
        with pytest.raises(pydantic.ValidationError):
            adapter.validate_python(wrong)
    described = adapter.json_schema()["$defs"]["Ema"]["properties"]["decay"]["description"]
    assert "Weight kept on the old value" in described


def test_labels():
    assert Ema(0.9).label() == "decay 0.9"
    assert Ema(0.99, debias=True).label() == "decay 0.99, debiased"
    assert Cumulative().label() == "cumulative average"
    assert Pooled(8).label() == "pooled over 8 steps"
    assert Pooled().label() == "pooled over all steps"


def test_rules_are_read_without_torch():
    script = "import sys, bnexp.statistics.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
