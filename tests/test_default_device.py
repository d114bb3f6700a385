"""The library under `torch.set_default_device`: it makes its own tensors where its inputs are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bnexp


@pytest.fixture
def given():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    batches = [(torch.randn(8, 3, 6, 6), torch.randint(3, (8,))) for _ in range(4)]
    return nn.Sequential(*layers), batches


def everything(model: nn.Module, batches: list) -> tuple:
    model = copy.deepcopy(model)
    rules = {"ema": bnexp.Ema(0.9), "mean": bnexp.Cumulative(), "pooled": bnexp.Pooled()}
    with bnexp.StatisticsTracker(model.train(), rules) as tracker:
        for x, _ in batches:
            model(x)
            tracker.update()
        tracked = [(found.mean["1"], found.var["1"]) for found in tracker.statistics().values()]
    judged = bnexp.audit(model, batches, batches)
    return tracked, judged.to_dict() | {"seconds": None}


def test_results_are_those_without_it(given):
    alone = repr(everything(*given))
    torch.set_default_device("meta")
    try:
        assert repr(everything(*given)) == alone
    finally:
        torch.set_default_device(None)
