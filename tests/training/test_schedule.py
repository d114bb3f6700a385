"""Schedules against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from bnexp.config.schema import (
    ConstantSchedule,
    CosineSchedule,
    OneCycleSchedule,
    StepSchedule,
)
from bnexp.training.schedule import learning_rate

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
