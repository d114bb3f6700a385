"""The EMA training accuracy against its definition, and the step log against what it was told."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from bnexp.errors import RunFailed
from bnexp.records import STEP_COLUMNS, CsvLog
from bnexp.training.metrics import EmaAccuracy, StepLog


def test_debiased_ema_is_the_weighted_mean_of_its_definition():
    rng = np.random.default_rng(0)
    accuracies = rng.random(40)
    ema = EmaAccuracy(0.9)
    for t, accuracy in enumerate(accuracies, start=1):
        weights = 0.9 ** np.arange(t)[::-1]
        expected = np.average(accuracies[:t], weights=weights)
        assert ema.update(accuracy) == pytest.approx(expected, rel=1e-12)


def test_decay_zero_is_the_batch_accuracy():
    ema = EmaAccuracy(0.0)
    assert [ema.update(a) for a in (0.25, 0.75)] == [0.25, 0.75]


def make_log(path, capacity=5):
    return StepLog(
        CsvLog(path, STEP_COLUMNS),
        EmaAccuracy(0.5),
        batch_size=8,
        steps_per_epoch=3,
        capacity=capacity,
        device=torch.device("cpu"),
    )


def test_every_step_has_one_row_whenever_it_is_flushed(tmp_path):
    path = tmp_path / "steps.csv"
    log = make_log(path)
    losses = torch.rand(11)
    for step in range(1, 12):
        log.record(step, 0.1 * step, losses[step - 1], torch.tensor(step % 8))
        if step in (3, 4, 9):
            log.flush()
    log.flush()
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == list(range(1, 12))
    assert [int(r["epoch"]) for r in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [np.float32(r["loss"]) for r in rows] == losses.numpy().tolist()
    assert [float(r["accuracy"]) for r in rows] == [step % 8 / 8 for step in range(1, 12)]


def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_rate(tmp_path):
    log = make_log(tmp_path / "steps.csv", capacity=10)
    for step, loss in enumerate([1.0, 2.0, float("nan"), 1.0], start=1):
        log.record(step, 0.25, torch.tensor(loss), torch.tensor(1))
    with pytest.raises(RunFailed, match=r"nan at step 3 with learning rate 0\.25"):
        log.flush()
