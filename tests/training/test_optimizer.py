"""Weight decay against the rule it follows."""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.parametrize("fields", [{"name": "sgd"}, {"name": "adamw"}])
def test_updates_are_those_of_torch_without_its_compiler(fields):
    """As in a process of its own, where nothing else has imported the compiler."""
    script = f"""
import sys, torch
from torch import nn
from bnexp.config.schema import AdamWConfig, SgdConfig
from bnexp.training.optimizer import build_optimizer

torch.manual_seed(0)
kind = AdamWConfig if {fields["name"]!r} == "adamw" else SgdConfig
config = kind(name={fields["name"]!r}, lr=0.1, weight_decay=0.01)
models = [nn.Linear(5, 3), nn.Linear(5, 3)]
models[1].load_state_dict(models[0].state_dict())
x = torch.randn(7, 5)

def train(model, optimizer):
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.state_dict()

ours = build_optimizer(config, models[0])
state = train(models[0], ours)
ours.load_state_dict(state)
assert "torch._dynamo" not in sys.modules
base = type(ours).__base__
assert base in (torch.optim.SGD, torch.optim.AdamW)
groups = [
    {{**{{k: v for k, v in g.items() if k != "params"}}, "params": [p]}}
    for g, p in zip(ours.param_groups, models[1].parameters(), strict=True)
]
theirs = train(models[1], base(groups, lr=0.1))
assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models)))
for index, entries in theirs["state"].items():
    for name, value in entries.items():
        assert torch.equal(state["state"][index][name], value)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(SgdConfig(name="sgd"), model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model[1].parameters()}
