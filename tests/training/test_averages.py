"""Averages of the parameters against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnexp.config import resolve
from bnexp.training.averages import EmaWeights, SwaWeights, with_parameters
from bnexp.training.build import build_training


def walk(model, average, steps=20):
    torch.manual_seed(0)
    seen = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        seen.append(model.weight.detach().double().numpy().copy())
        average.update(step)
    return seen


def test_swa_is_the_mean_of_the_weights():
    model = nn.Linear(3, 2)
    average = SwaWeights(model, start=0, every=1)
    seen = walk(model, average)
    found = with_parameters(model, average.average).weight.detach().numpy()
    assert found == pytest.approx(np.mean(seen, axis=0), abs=1e-5)


def test_swa_takes_the_weights_after_its_start_at_regular_steps():
    model = nn.Linear(3, 2)
    average = SwaWeights(model, start=8, every=4)
    seen = walk(model, average)
    assert average.count == 3  # after steps 12, 16 and 20
    found = with_parameters(model, average.average).weight.detach().numpy()
    assert found == pytest.approx(np.mean([seen[11], seen[15], seen[19]], axis=0), abs=1e-5)


@pytest.mark.parametrize(
    ("swa", "due"),
    [
        ({"start": 0.5, "every": 7}, [14]),
        ({"start": 0.7, "every": 7}, []),  # due after steps 7 and 14, and begins after 14
        ({"start": 0.95, "every": 20}, [20]),
        ({"start": 0.5, "every": 21}, []),
        ({"start": 0.95}, [20]),
        ({"start": 0.99}, []),  # of 20 steps, that is after the last one
    ],
)
def test_swa_that_will_average_nothing_is_said(swa, due):
    tree = {
        "data": {"name": "digits"},
        "model": {"name": "mlp"},
        "training": {"steps": 20, "batch_size": 64, "averages": {"swa": swa}},
    }
    config = resolve(tree, [], "test")
    training = build_training(config, torch.device("cpu"))
    average = training.state.averages["swa"]
    taken = []
    for step in range(1, 21):
        before = average.count
        average.update(step)
        taken += [step] * (average.count - before)
    assert taken == due
    said = ["training.averages.swa averages no weights in 20 steps"] if not due else []
    assert [line.partition(":")[0] for line in training.warnings] == said


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_follows_its_recursion(warmup):
    model = nn.Linear(3, 2)
    average = EmaWeights(model, 0.8, warmup)
    expected = model.weight.detach().double().numpy().copy()
    for t, weight in enumerate(walk(model, average)):
        decay = min(0.8, (1 + t) / (10 + t)) if warmup else 0.8
        expected = decay * expected + (1 - decay) * weight
    found = with_parameters(model, average.average).weight.detach().numpy()
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_model_itself_is_untouched_and_buffers_travel():
    model = nn.BatchNorm1d(4)
    average = SwaWeights(model, start=0, every=1)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)
    copied = with_parameters(model, average.average)
    assert torch.equal(copied.weight, torch.ones(4))
    assert torch.equal(copied.running_mean, model.running_mean)
    assert torch.equal(model.weight, torch.full((4,), 3.0))


def test_resuming_continues_the_same_average():
    model = nn.Linear(3, 2)
    whole = EmaWeights(model, 0.9, warmup=True)
    resumed = EmaWeights(model, 0.9, warmup=True)
    walk(model, whole, 10)
    resumed.load_state_dict(whole.state_dict())
    with torch.no_grad():
        model.weight.add_(1.0)
    whole.update(11)
    resumed.update(11)
    for one, other in zip(whole.average, resumed.average, strict=True):
        assert torch.equal(one, other)
