"""Schedules against torch's, weight decay against the rule it follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from bnexp.config.schema import (
    AdamWConfig,
    ConstantSchedule,
    CosineSchedule,
    OneCycleSchedule,
    PlateauSchedule,
    SgdConfig,
    StepSchedule,
)
from bnexp.training.optimization import Plateau, build_optimizer, learning_rate

STEPS = 57


def rates_of_torch(make, lr=0.3):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates_of_bnexp(schedule, lr=0.3):
    return [learning_rate(schedule, lr, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize(
    "schedule, reference",
    [
        (ConstantSchedule(name="constant"), lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0)),
        (
            ConstantSchedule(name="constant", warmup_steps=9),
            lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 10, total_iters=9),
        ),
        (
            StepSchedule(name="step", milestones=[0.5, 0.75], gamma=0.2),
            lambda o: lr_scheduler.MultiStepLR(o, [28, 43], gamma=0.2),
        ),
        (
            CosineSchedule(name="cosine"),
            lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
        ),
        (
            CosineSchedule(name="cosine", final=0.1),
            lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.03),
        ),
        (
            CosineSchedule(name="cosine", warmup_steps=5),
            lambda o: lr_scheduler.SequentialLR(
                o,
                [
                    lr_scheduler.LinearLR(o, start_factor=1 / 6, total_iters=5),
                    lr_scheduler.CosineAnnealingLR(o, STEPS - 5),
                ],
                [5],
            ),
        ),
        (
            OneCycleSchedule(name="one-cycle", rise=0.25, start=10, end=100),
            lambda o: lr_scheduler.OneCycleLR(
                o, 0.3, STEPS, pct_start=0.25, div_factor=10, final_div_factor=100
            ),
        ),
    ],
)
def test_schedules_are_those_of_torch(schedule, reference):
    assert rates_of_bnexp(schedule) == pytest.approx(rates_of_torch(reference), rel=1e-9)


def test_plateau_lowers_the_rate_when_the_accuracy_stops_improving():
    schedule = PlateauSchedule(name="plateau", patience=300, min_delta=0.01, factor=0.5)
    plateau = Plateau()
    accuracies = [0.5, 0.6, 0.605, 0.604, 0.6, 0.7, 0.7, 0.7, 0.7]
    reduced = [
        step
        for step, accuracy in zip(range(100, 1000, 100), accuracies, strict=True)
        if plateau.observe(schedule, step, accuracy)
    ]
    # best 0.6 at 200, so 500 is the first look 300 steps later; then 0.7 at 600, so 900
    assert reduced == [500, 900]
    assert learning_rate(schedule, 0.8, 900, 1000, plateau.reductions) == pytest.approx(0.2)


def test_a_plateau_survives_its_state_dict():
    schedule = PlateauSchedule(name="plateau", patience=200)
    plateau = Plateau()
    plateau.observe(schedule, 100, 0.5)
    restored = Plateau()
    restored.load_state_dict(plateau.state_dict())
    assert restored.observe(schedule, 300, 0.5) is True


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
