from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.nn.find import layer_eps
from bnexp.statistics import Statistics, layer_drift


def statistics(**layers) -> Statistics:
    return Statistics(
        {n: torch.tensor(mean) for n, (mean, _) in layers.items()},
        {n: torch.tensor(var) for n, (_, var) in layers.items()},
        dict.fromkeys(layers, 1),
    )


def test_by_hand():
    a = statistics(near=([1.0, 2.0], [1.0, 1.0]), far=([0.0, 6.0], [4.0, 1.0]))
    b = statistics(
        near=([1.0, 2.0], [1.0, 2.0]), far=([0.0, 0.0], [3.0, 3.0]), other=([0.0], [1.0])
    )
    first, second = layer_drift(a, b, eps=1.0)
    assert (first.name, second.name) == ("far", "near")
    assert first.channels == 2
    assert first.worst_mean_drift == pytest.approx(6 / 2)
    assert first.worst_mean_channel == 1
    assert first.mean_drift == pytest.approx(3 / math.sqrt(2))
    assert first.worst_log_var_drift == pytest.approx(math.log(2))
    assert first.worst_var_channel == 1
    assert first.log_var_drift == pytest.approx(
        math.sqrt((math.log(5 / 4) ** 2 + math.log(2 / 4) ** 2) / 2)
    )
    assert second.mean_drift == 0
    assert second.worst_log_var_drift == pytest.approx(math.log(3 / 2))


def test_refusals():
    a = statistics(x=([1.0], [1.0]))
    with pytest.raises(UserError, match="in common"):
        layer_drift(a, statistics(y=([1.0], [1.0])), 1e-5)
    with pytest.raises(UserError, match="different models"):
        layer_drift(a, statistics(x=([1.0, 2.0], [1.0, 2.0])), 1e-5)
    with pytest.raises(UserError, match="eps"):
        layer_drift(a, a, eps=0)
    with pytest.raises(UserError, match="no eps for layer 'x'"):
        layer_drift(a, a, eps={"y": 1e-5})


def test_each_layer_has_its_own_eps():
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-3), nn.BatchNorm1d(2))
    assert layer_eps(torch.compile(model, backend="eager")) == {"0": 1e-3, "1": 1e-5}
    a = statistics(**{"0": ([1.0, 0.0], [1e-3, 1.0]), "1": ([1.0, 0.0], [1e-3, 1.0])})
    b = statistics(**{"0": ([0.0, 0.0], [1e-4, 1.0]), "1": ([0.0, 0.0], [1e-4, 1.0])})
    drifts = {row.name: row for row in layer_drift(a, b, layer_eps(model))}
    for name, eps in layer_eps(model).items():
        assert drifts[name].worst_mean_drift == pytest.approx(1 / math.sqrt(1e-4 + eps))
        assert drifts[name].worst_log_var_drift == pytest.approx(
            math.log((1e-3 + eps) / (1e-4 + eps))
        )
