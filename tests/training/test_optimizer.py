"""Weight decay against the rule it follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnexp.config.schema import AdamWConfig, SgdConfig
from bnexp.training.optimizer import build_optimizer


@pytest.mark.parametrize(
    "config",
    [
        SgdConfig(name="sgd", lr=0.1, weight_decay=0.5, momentum=0.0, nesterov=False),
        AdamWConfig(name="adamw", lr=0.1, weight_decay=0.5),
    ],
)
def test_weight_decay_spares_bn_parameters_and_biases(config):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(SgdConfig(name="sgd"), model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model[1].parameters()}
