"""The events of a run, read back with TensorBoard's own reader."""

from __future__ import annotations

import numpy as np
import pytest

from bnexp.records import Run

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

CONFIG = """
name: events
data: {name: digits}
model: {name: mlp}
statistics: {estimators: {slow: {rule: ema, decay: 0.99}}}
training: {steps: 30, batch_size: 64, check_every: 7}
test: {every: 10, statistics: [running, recomputed]}
logging: {tensorboard: true}
"""


def read(run):
    events = accumulator.EventAccumulator(
        str(run.path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}
    )
    events.Reload()
    return events


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_events_hold_every_step_every_evaluation_and_the_drift(bnexp):
    (bnexp.cwd / "events.yaml").write_text(CONFIG)
    done = bnexp("train", "events.yaml")
    assert done.code == 0, done.stderr
    run = Run(bnexp.cwd / "runs" / "events-1")
    events = read(run)
    steps = run.steps()
    for column in ("loss", "accuracy", "ema_accuracy", "lr"):
        found = scalars(events, f"train/{column}")
        assert [step for step, _ in found] == list(range(1, 31))
        assert np.allclose([value for _, value in found], steps[column], rtol=1e-6)
    for kind in ("running", "slow", "recomputed"):
        logged = {r["step"]: r["accuracy"] for r in run.evals() if r["statistics"] == kind}
        assert dict(scalars(events, f"test/accuracy/{kind}")) == pytest.approx(logged)
    tag = "drift of means from recomputed/bn1"
    assert tag in events.Tags()["histograms"]
    histograms = events.Histograms(tag)
    assert [event.step for event in histograms] == [10, 20, 30]
    assert all(event.histogram_value.num == 100 for event in histograms)


def test_a_resumed_run_has_no_step_twice(bnexp):
    (bnexp.cwd / "events.yaml").write_text(CONFIG)
    assert bnexp("train", "events.yaml").code == 0
    run = Run(bnexp.cwd / "runs" / "events-1")
    assert bnexp("train", "--resume", run.path, "training.steps=50").code == 0
    assert [step for step, _ in scalars(read(run), "train/loss")] == list(range(1, 51))


def test_events_change_nothing_that_is_learned(bnexp):
    (bnexp.cwd / "events.yaml").write_text(CONFIG)
    for override in ("logging.tensorboard=true", "logging.tensorboard=false"):
        assert bnexp("train", "events.yaml", override).code == 0
    with_events, without = (
        (bnexp.cwd / "runs" / name / "steps.csv").read_bytes() for name in ("events-1", "events-2")
    )
    assert with_events == without
