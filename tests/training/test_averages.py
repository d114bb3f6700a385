"""Averages of the parameters against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnexp.config.schema import EmaWeightsConfig, SwaConfig
from bnexp.training.averages import ParameterAverage


def walk(model, average, steps=20):
    torch.manual_seed(0)
    seen = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        seen.append(model.weight.detach().double().numpy().copy())
        average.update()
    return seen


def test_swa_is_the_mean_of_the_weights():
    model = nn.Linear(3, 2)
    average = ParameterAverage(model, SwaConfig())
    seen = walk(model, average)
    found = average.model_with_average(model).weight.detach().numpy()
    assert found == pytest.approx(np.mean(seen, axis=0), abs=1e-5)


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_follows_its_recursion(warmup):
    model = nn.Linear(3, 2)
    average = ParameterAverage(model, EmaWeightsConfig(decay=0.8, warmup=warmup))
    expected = model.weight.detach().double().numpy().copy()
    for t, weight in enumerate(walk(model, average)):
        decay = min(0.8, (1 + t) / (10 + t)) if warmup else 0.8
        expected = decay * expected + (1 - decay) * weight
    found = average.model_with_average(model).weight.detach().numpy()
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_model_itself_is_untouched_and_buffers_travel():
    model = nn.BatchNorm1d(4)
    average = ParameterAverage(model, SwaConfig())
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)
    copied = average.model_with_average(model)
    assert torch.equal(copied.weight, torch.ones(4))
    assert torch.equal(copied.running_mean, model.running_mean)
    assert torch.equal(model.weight, torch.full((4,), 3.0))


def test_resuming_continues_the_same_average():
    model = nn.Linear(3, 2)
    whole = ParameterAverage(model, EmaWeightsConfig(decay=0.9))
    resumed = ParameterAverage(model, EmaWeightsConfig(decay=0.9))
    walk(model, whole, 10)
    resumed.load_state_dict(whole.state_dict())
    with torch.no_grad():
        model.weight.add_(1.0)
    whole.update()
    resumed.update()
    for one, other in zip(whole.average, resumed.average, strict=True):
        assert torch.equal(one, other)
