from __future__ import annotations

import math

import pytest
import torch

from bnexp.errors import UserError
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
        layer_drift(a, statistics(y=([1.0], [1.0])))
    with pytest.raises(UserError, match="different models"):
        layer_drift(a, statistics(x=([1.0, 2.0], [1.0, 2.0])))
    with pytest.raises(UserError, match="eps"):
        layer_drift(a, a, eps=0)
