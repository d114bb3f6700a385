"""A run folder with invented but plausible numbers, of any length, for tests of the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from bnexp.analysis.comparison import compare
from bnexp.analysis.layers import LayerCost, LayerRow
from bnexp.analysis.predictions import Predictions
from bnexp.condition import Condition, made_by
from bnexp.records import EVAL_COLUMNS, STEP_COLUMNS, CsvLog, Run

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
           "Bag", "Ankle boot")  # fmt: skip
LAYERS = ("features.norm0", "features.norm1", "classifier.norm")


def config(steps=1000, seed=0, **changes):
    tree = {
        "name": "example",
        "seed": seed,
        "device": "cpu",
        "data": {"name": "fashion-mnist", "val_fraction": 0.0},
        "model": {"name": "small-cnn", "norm": "batch", "eps": 1e-5},
        "statistics": {
            "decay": 0.9,
            "estimators": {"ema-0.99": {"rule": "ema", "decay": 0.99, "debias": False}},
            "recompute": {"method": "exact", "samples": 10000},
        },
        "training": {
            "epochs": None,
            "steps": steps,
            "batch_size": 128,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": {"name": "cosine"},
            "label_smoothing": 0.0,
            "ema_accuracy_decay": 0.98,
        },
        "test": {"every": 100, "batch_size": 250, "statistics": ["running", "recomputed"]},
    }
    return {**tree, **changes}


def make_run(
    folder: Path, name="example-1", steps=1000, seed=0, evaluations=20, samples=2000, cost=0.0,
    train=True, kinds=("running", "ema-0.99", "recomputed", "batch"), finished=True, costs=False,
    **changes,
) -> Run:  # fmt: skip
    """Write a run folder; `cost` is what running averages lose at the end, as a share; with
    `costs` the layers have what mending and spoiling each does."""
    rng = np.random.default_rng(seed)
    run = Run(folder / name)
    (run.path / "checkpoints").mkdir(parents=True)
    tree = config(max(1, steps), seed, **changes)
    (run.path / "config.yaml").write_text(yaml.safe_dump(tree))
    run.write_json(
        "environment.json",
        {
            "created": f"2026-01-{1 + seed:02d}T12:00:00+00:00",
            "command": "bnexp train configs/example.yaml",
            "seed": seed,
            "device": "cpu (2 threads)",
            "git_commit": "0123456789abcdef",
            "python": "3.11.7",
            "packages": {"bnexp": "0.1.0", "torch": "2.11.0"},
            "resumes": [],
        },
    )
    state = {"state": "finished", "step": steps, "total_steps": steps, "message": None}
    run.write_json("state.json", state if finished else {**state, "state": "interrupted"})

    t = np.arange(1, steps + 1)
    truth = 0.93 - 0.83 * np.exp(-12 * t / steps) + 0.0 * t
    batch = rng.binomial(128, np.clip(truth, 0, 1)) / 128
    ema = _debiased_ema(batch, 0.98)
    loss = -np.log(np.clip(truth, 0.05, 1)) + 0.2 + 0.05 * rng.standard_normal(steps) ** 2
    lr = 0.05 * (1 + np.cos(np.pi * t / steps))
    log = CsvLog(run.path / "steps.csv", STEP_COLUMNS)
    log.append(
        zip(
            t.tolist(), (t // 468).tolist(), lr.tolist(), loss.tolist(), batch.tolist(),
            ema.tolist(), strict=True,
        )
    )  # fmt: skip
    log.close()
    evals = CsvLog(run.path / "evals.csv", EVAL_COLUMNS)
    final = _predictions(rng, samples, cost, kinds)
    lag = {"running": 0.10, "ema-0.99": 0.35, "recomputed": 0.0, "batch": 0.02}
    for step in np.linspace(0, steps, evaluations + 1).round().astype(int)[1:]:
        done = step / steps
        best = 0.92 - 0.8 * np.exp(-12 * done)
        for kind in kinds:
            value = best - lag.get(kind, 0.2) * np.exp(-6 * done) * (0.6 + 0.4 * rng.random())
            if step == steps:
                value = final[kind].accuracy
            evals.append([(int(step), "test", kind, max(value, 0.1), 0.3, samples, 1.0)])
        if train:
            evals.append([(int(step), "train", "running", best + 0.02, 0.2, 60000, 6.0)])
    evals.close()
    if finished:
        drift = [
            LayerRow(
                name=layer,
                channels=32,
                mean_drift=0.02 * (i + 1),
                worst_mean_drift=0.07 * (i + 1),
                worst_mean_channel=3,
                log_var_drift=0.03 * (i + 1),
                worst_log_var_drift=0.09 * (i + 1),
                worst_var_channel=5,
                mended=_cost(0.01 * i) if costs else None,
                spoiled=_cost(-0.1 * i) if costs else None,
            )
            for i, layer in reversed(list(enumerate(LAYERS)))
        ]
        found = compare(
            {Condition.parse(kind): predictions for kind, predictions in final.items()},
            Condition.parse(kinds[0]),
            CLASSES,
            made=made_by(tree),
            layers={Condition.parse(k): drift for k in kinds[1:] if k != "batch"},
        )
        run.write_json("comparison.json", {"step": steps, "weights": "last", **found.to_dict()})
    return run


def _cost(difference):
    interval = (difference - 0.005, difference + 0.005)
    return LayerCost(difference, interval, changed=40, loss_difference=0.1, samples=500)


def _debiased_ema(values, decay):
    ema, average = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        ema[i] = average / (1 - decay ** (i + 1))
    return ema


def _predictions(rng, samples, cost, kinds):
    labels = rng.integers(0, 10, samples)
    right = rng.random(samples) < 0.92
    found = {}
    for kind in kinds:
        correct = right ^ (rng.random(samples) < 0.002)
        if kind == "running":
            correct &= rng.random(samples) >= cost
        if kind == "batch":
            correct &= rng.random(samples) >= 0.02
        found[kind] = Predictions(
            np.where(correct, labels, (labels + 1) % 10),
            labels,
            np.where(correct, 0.1, 2.0).astype(np.float32) * rng.random(samples, dtype=np.float32),
            np.clip(0.85 + 0.1 * rng.standard_normal(samples), 0.1, 1).astype(np.float32),
        )
    return found
