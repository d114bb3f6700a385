"""What the figures show, measured on finished runs and their checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bnexp.analysis.comparison import compare
from bnexp.condition import Condition
from bnexp.config import load_config
from bnexp.evaluation.predictions import predict_under
from bnexp.nn.find import batchnorm_layers
from bnexp.records import Run
from bnexp.report.run_data import RunData
from bnexp.statistics import (
    Statistics,
    batch_statistics,
    recompute_statistics,
)
from bnexp.training.averages import with_parameters
from bnexp.training.build import Training, build_training
from bnexp.training.checkpoints import load_checkpoint, newest_checkpoint, step_checkpoints
from bnexp.training.state import load_weights
from bnexp.training.subject import run_subject

DECAYS = (0.9, 0.99, 0.999)
PERCENTILES = (15, 50, 85)


def ema(values: np.ndarray, decay: float) -> np.ndarray:
    """The debiased exponential moving average of (T,) values, as steps.csv has it."""
    result, average = np.empty(len(values)), 0.0
    for t, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        result[t] = average / (1 - decay ** (t + 1))
    return result


def ema_accuracy(folder: Path) -> dict:
    """EMA training accuracy of one run with three decays, beside whole-train accuracy.

    `after` is the step from which the distances are taken: not before even the slowest average
    has something to average over.
    """
    run = RunData.read(Run(folder))
    steps, batch = run.steps["step"], run.steps["accuracy"]
    at, train = run.curve("train", Condition("running"))
    _, test = run.curve("test", Condition("running"))
    after = 200
    result = {
        "batch_size": run.config["training"]["batch_size"],
        "steps": steps.tolist(),
        "batch": batch.tolist(),
        "evaluated": at.tolist(),
        "train": train.tolist(),
        "test": test.tolist(),
        "after": after,
        "decays": {},
    }
    p, m = train[-1], result["batch_size"]
    result["train_with_batch_statistics"] = _train_accuracy_in_training_mode(folder)
    for decay in DECAYS:
        curve = ema(batch, decay)
        distance = (curve[at.astype(int) - 1] - train)[at > after]
        result["decays"][str(decay)] = {
            "curve": curve.tolist(),
            "distance_mean": float(distance.mean()),
            "distance_sd": float(distance.std(ddof=1)),
            "distance_mean_last_10": float(distance[-10:].mean()),
            "distance_sd_last_10": float(distance[-10:].std(ddof=1)),
            "noise_expected": float(np.sqrt(p * (1 - p) / m * (1 - decay) / (1 + decay))),
        }
    return result


def _train_accuracy_in_training_mode(folder: Path) -> float:
    """Of the final weights over the whole training set, normalized by mini-batch as in training."""
    config = load_config(folder / "config.yaml")
    training = build_training(config, torch.device("cpu"))
    state, _ = newest_checkpoint(folder / "checkpoints")
    load_weights(training.state.model, training.state.tracker, state)
    size = config.training.batch_size
    found = predict_under(
        training.state.model, lambda: training.data.train.batches(size), {"batch": None}
    )
    return found["batch"].accuracy


def statistics_curves(folder: Path) -> dict:
    """Test accuracy by step under every kind of statistics of one run."""
    run = RunData.read(Run(folder))
    curves = {str(c): run.curve("test", c) for c in run.conditions("test")}
    steps = curves["running"][0]
    result = {
        "batch_size": run.config["training"]["batch_size"],
        "steps": steps.tolist(),
        "accuracy": {kind: values.tolist() for kind, (_, values) in curves.items()},
        "gap": {},
    }
    early, late = (steps >= 30) & (steps <= 150), steps > steps[-1] - 300
    recomputed = curves["recomputed"][1]
    for kind, (_, values) in curves.items():
        gap = values - recomputed
        result["gap"][kind] = {
            "early": float(gap[early].mean()),
            "late": float(gap[late].mean()),
            "late_worst": float(gap[late].min()),
        }
    return result


def averaged_weights(folder: Path, every: int = 200) -> dict:
    """Test accuracy by step of the last, EMA and SWA weights under several statistics."""
    config = load_config(folder / "config.yaml")
    training = build_training(config, torch.device("cpu"))
    size = config.test.batch_size
    result: dict = {"steps": [], "accuracy": {}, "std_ratio": {}}
    for path in reversed(step_checkpoints(folder / "checkpoints")):
        state = load_checkpoint(path)
        if state["step"] % every:
            continue
        load_weights(training.state.model, training.state.tracker, state)
        result["steps"].append(state["step"])
        stale = training.state.estimates()
        kinds = {"last/running": (training.state.model, stale["running"])}
        for name, average in training.state.averages.items():
            average.load_state_dict(state["averages"][name])
            if average.count == 0:
                continue
            model = with_parameters(training.state.model, average.average)
            method = config.statistics.recompute.method
            population = run_subject(model, training.data, config).population(method)
            fresh = recompute_statistics(model, population, method=method)
            kinds[f"{name}/stale"] = (model, stale["running"])
            kinds[f"{name}/recomputed"] = (model, fresh)
            if name == "ema":
                kinds["ema/averaged"] = (model, stale["ema-0.99"])
            result["std_ratio"][name] = _std_ratio(stale["running"], fresh)
        for kind, (model, statistics) in kinds.items():
            found = predict_under(
                model, lambda: training.data.test.batches(size), {"it": statistics}
            )
            curve = result["accuracy"].setdefault(kind, {"steps": [], "values": []})
            curve["steps"].append(state["step"])
            curve["values"].append(found["it"].accuracy)
    return result


def _std_ratio(a: Statistics, b: Statistics) -> dict[str, float]:
    """Median over a layer's channels of std_a / std_b."""
    return {
        name: float((a.var[name].double() / b.var[name].double()).sqrt().median()) for name in a.var
    }


def sigmoid_inputs(folder: Path) -> dict:
    """Percentiles of the inputs of the last hidden layer's sigmoids at every checkpoint.

    Over 6,000 training images in mini-batches of 60, normalized as in training. The unit shown is
    the typical one: its median travels as far as the median unit's does.
    """
    config = load_config(folder / "config.yaml")
    training = build_training(config, torch.device("cpu"))
    model = training.state.model
    batches = [x for x, _ in training.data.train.batches(60, samples=6000)]
    steps, percentiles = [0], [_percentiles(model, batches)]
    for path in reversed(step_checkpoints(folder / "checkpoints")):
        state = load_checkpoint(path)
        if state["step"] % (20 if state["step"] < 500 else 500):
            continue  # written because it was the best so far
        load_weights(training.state.model, training.state.tracker, state)
        steps.append(state["step"])
        percentiles.append(_percentiles(model, batches))
    table = np.stack(percentiles)  # (checkpoints, 3, units)
    low, middle, high = table[:, 0], table[:, 1], table[:, 2]
    travel = middle.max(0) - middle.min(0)
    unit = int(np.argsort(travel)[len(travel) // 2])
    width = high - low
    run = RunData.read(Run(folder))
    at, test = run.curve("test", run.baseline)
    return {
        "steps": steps,
        "unit": unit,
        "percentiles": table[:, :, unit].T.tolist(),
        "median_travel": float(np.median(travel)),
        "median_width_first": float(np.median(width[0])),
        "median_width_last": float(np.median(width[-1])),
        "tested": at.tolist(),
        "test": test.tolist(),
    }


@torch.no_grad()
def _percentiles(model: torch.nn.Module, batches: list[torch.Tensor]) -> np.ndarray:
    """(3, units) float64"""
    seen: list[torch.Tensor] = []
    hook = model.bn3.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    model.eval()
    try:
        with batch_statistics(model):
            for x in batches:
                model(x)
    finally:
        hook.remove()
    return np.percentile(torch.cat(seen).double().numpy(), PERCENTILES, axis=0)


def variances(folder: Path, samples: int = 5000) -> dict:
    """The variance inside mini-batches, with and without m/(m-1), over the population's.

    Per BN layer the median over channels; and the test accuracy under each variance. `pooled`
    takes the same mini-batches through the same network as `batch-mean` and adds only the
    variance between the mini-batches' means; in `exact` the layers below normalize as in inference.
    """
    config = load_config(folder / "config.yaml")
    training = build_training(config, torch.device("cpu"))
    state, _ = newest_checkpoint(folder / "checkpoints")
    load_weights(training.state.model, training.state.tracker, state)
    size = config.training.batch_size
    batches = list(training.data.train.batches(size, samples=samples))
    unbiased = recompute_statistics(training.state.model, batches, method="batch-mean")
    pooled = recompute_statistics(training.state.model, batches, method="pooled")
    chunks = training.data.train.batches(100, samples=samples)
    exact = recompute_statistics(training.state.model, chunks, method="exact")
    values = _values_per_channel(training.state.model, batches[0][0])
    biased = replace(
        unbiased,
        var={name: v * (values[name] - 1) / values[name] for name, v in unbiased.var.items()},
    )
    kinds = {"biased": biased, "unbiased": unbiased, "pooled": pooled, "exact": exact}
    size = config.test.batch_size
    found = predict_under(training.state.model, lambda: training.data.test.batches(size), kinds)
    return {
        "model": config.model.name,
        "layers": {
            name: {
                "values": values[name],
                **{
                    kind: float((s.var[name].double() / exact.var[name].double()).median())
                    for kind, s in kinds.items()
                },
            }
            for name in exact.var
        },
        "accuracy": {kind: p.accuracy for kind, p in found.items()},
        "comparison": _against(found, "exact", training),
    }


def final_comparison(folder: Path) -> dict:
    """Accuracy and the paired difference to the baseline, by kind, as `bnexp eval` has it."""
    return _brief(Run(folder).comparison())


def _against(predictions, baseline: str, training: Training) -> dict:
    by_condition = {Condition(name): found for name, found in predictions.items()}
    classes = training.data.info.classes
    return _brief(compare(by_condition, Condition(baseline), classes).to_dict())


def _brief(comparison: dict) -> dict:
    found = {}
    for kind in comparison["kinds"]:
        row = found[kind["name"]] = {"accuracy": kind["accuracy"]}
        if versus := kind.get("versus_baseline"):
            row["difference"] = versus["difference"]
            row["interval"] = versus["difference_interval"]
            row["p_holm"] = versus["p_holm"]
    return found


@torch.no_grad()
def _values_per_channel(model: torch.nn.Module, x: torch.Tensor) -> dict[str, int]:
    values: dict[str, int] = {}

    def record(name):
        def hook(layer, inputs):
            values[name] = inputs[0].numel() // inputs[0].shape[1]

        return hook

    hooks = [
        layer.register_forward_pre_hook(record(name))
        for name, layer in batchnorm_layers(model).items()
    ]
    model.eval()
    model(x)
    for hook in hooks:
        hook.remove()
    return values
