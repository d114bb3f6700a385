"""The figures of docs/statistics.md: how far each way to get population statistics is off.

    OMP_NUM_THREADS=1 python docs/figures/layer_errors.py

Trains a ResNet-20 on 2048 images of Fashion-MNIST and computes its statistics over those same
images: in float64 with all of them as a single batch (the truth, made by torch alone), and by every
method with mini-batches of several sizes. Writes layer-errors.png, batch-size-errors.png and
layer-errors.json beside this file, and prints the tables of the page. About four minutes on one
core.
"""

from __future__ import annotations

import copy
import io
import json
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from draw import GREEN, MUTED, ORANGE, PURPLE
from draw import STYLE as STYLE_OF_PAGES
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from bnexp.config.schema import OneCycleSchedule, SgdConfig  # noqa: E402
from bnexp.data import Data, DataSettings, load_data  # noqa: E402
from bnexp.networks import build_model  # noqa: E402
from bnexp.nn.find import batchnorm_layers  # noqa: E402
from bnexp.performance import keep_freed_memory  # noqa: E402
from bnexp.statistics import (  # noqa: E402
    Statistics,
    batch_statistics,
    estimate_memory,
    layer_drift,
    recompute_statistics,
    running_statistics,
)
from bnexp.training.optimizer import build_optimizer  # noqa: E402
from bnexp.training.schedule import learning_rate  # noqa: E402

IMAGES, TEST_IMAGES = 2048, 2000
STEPS, BATCH = 160, 128
SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
SHOWN = (8, 32, 128)
EPS = 1e-5


# ------------------------------------------------------------------------------------ measuring


def train(data: Data) -> nn.Module:
    """A ResNet-20 after STEPS steps, in eval mode, its running averages as training left them."""
    torch.manual_seed(0)
    model = build_model(
        "resnet20", channels=1, image_size=data.info.image_size, num_classes=10, eps=EPS
    ).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(SgdConfig(name="sgd", lr=0.1, weight_decay=5e-4), model)
    schedule = OneCycleSchedule(name="one-cycle")
    batches = data.train.training_batches(BATCH)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, 0.1, step, STEPS)
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def truth(model: nn.Module, images: Tensor) -> Statistics:
    """float64 moments of every BN input, all images as one batch; torch's layers do it all."""
    model = copy.deepcopy(model).double().train()
    counts = {}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            # A convolution sees one image at a time anyway: in parts, for memory's sake.
            layer.forward = lambda x, conv=layer.forward: torch.cat([conv(p) for p in x.split(64)])
    for name, layer in batchnorm_layers(model).items():
        layer.momentum = 1.0
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: counts.update({name: inputs[0][:, 0].numel()})
        )
    model(images.double())
    found = running_statistics(model)  # torch stores the unbiased variance
    var = {name: v * (counts[name] - 1) / counts[name] for name, v in found.var.items()}
    return Statistics(found.mean, var, counts)


def errors(found: Statistics, true: Statistics) -> dict[str, list[float]]:
    """By layer in order: RMS over channels of the relative error of the variance, and of the error
    of the mean in standard deviations; the worst channel's; and the mean of the former with its
    sign. As BN sees them: with eps."""
    keys = ("var", "mean", "worst_var", "worst_mean", "signed_var")
    result: dict[str, list[float]] = {key: [] for key in keys}
    for name in true.names:
        scale = true.var[name] + EPS
        var = (found.var[name].double() - true.var[name]) / scale
        mean = (found.mean[name].double() - true.mean[name]).abs() / scale.sqrt()
        for key, error in (("var", var), ("mean", mean)):
            result[key].append(float(error.square().mean().sqrt()))
            result[f"worst_{key}"].append(float(error.abs().max()))
        result["signed_var"].append(float(var.mean()))
    return result


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Tensor, statistics: Statistics) -> Tensor:
    with statistics.applied_to(model):
        return torch.cat([model(x).double().log_softmax(1) for x in images.split(100)])


@torch.no_grad()
def between_batches(model: nn.Module, images: Tensor, size: int) -> list[float]:
    """By layer: the share of the variance that lies between the means of mini-batches, in %.

    What the layers below normalize with is the caller's choice. Mean over channels.
    """
    means: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}

    def look(name: str, x: Tensor) -> None:
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        means.setdefault(name, []).append(mean)
        variances.setdefault(name, []).append(var)

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0]))
        for name, layer in batchnorm_layers(model).items()
    ]
    for batch in images.split(size):
        model(batch)
    for hook in hooks:
        hook.remove()
    result = []
    for name in means:
        between = torch.stack(means[name]).var(0, correction=0)
        total = between + torch.stack(variances[name]).mean(0)
        result.append(100 * float((between / (total + EPS)).mean()))
    return result


@torch.no_grad()
def costs(model: nn.Module, images: Tensor) -> dict:
    """Processor seconds, medians of three interleaved rounds, and what `exact` keeps waiting."""
    batches = list(images.split(BATCH))
    bound = "64MiB"
    ways = {
        "inference": lambda: [model(batch) for batch in batches],
        "pooled": lambda: recompute_statistics(model, batches, "pooled"),
        "exact": lambda: recompute_statistics(model, batches, "exact"),
        "exact, bounded": lambda: recompute_statistics(model, batches, "exact", memory=bound),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(3):
        for name, way in ways.items():
            start = time.process_time()
            results[name] = way()
            seconds[name].append(time.process_time() - start)
    free, bounded = results["exact"], results["exact, bounded"]
    return {
        "seconds": {name: float(np.median(taken)) for name, taken in seconds.items()},
        "estimate": str(estimate_memory(model, batches)),
        "bounded_estimate": str(estimate_memory(model, batches, memory=bound)),
        "bounded_is_identical": all(
            torch.equal(free.var[n], bounded.var[n]) and torch.equal(free.mean[n], bounded.mean[n])
            for n in free.names
        ),
    }


def measure() -> dict:
    keep_freed_memory()
    settings = DataSettings("fashion-mnist", limit_train=IMAGES, limit_test=TEST_IMAGES)
    data = load_data(settings, seed=0, device="cpu")
    model = train(data)
    images = torch.cat([x for x, _ in data.train.batches(BATCH)])
    by_class = list(images[data.train.labels.argsort(stable=True)].split(BATCH))
    test = torch.cat([x for x, _ in data.test.batches(BATCH)])
    true = truth(model, images)

    found = {"running": running_statistics(model)}
    for size in SIZES:
        batches = list(images.split(size))
        found[f"pooled {size}"] = recompute_statistics(model, batches, "pooled")
        if size in SHOWN:
            found[f"batch-mean {size}"] = recompute_statistics(model, batches, "batch-mean")
            found[f"exact {size}"] = recompute_statistics(model, batches, "exact")

    for method in ("pooled", "exact"):
        found[f"{method} {BATCH} by class"] = recompute_statistics(model, by_class, method)

    reference = log_probabilities(model, test, true)
    labels = data.test.labels
    consequences = {}
    for kind in [
        "running",
        *(f"{m} {s}" for m in ("batch-mean", "pooled") for s in SHOWN),
        f"pooled {BATCH} by class",
        f"exact {BATCH}",
        f"exact {BATCH} by class",
    ]:
        log_p = log_probabilities(model, test, found[kind])
        predicted = log_p.argmax(1)
        consequences[kind] = {
            "accuracy": float((predicted == labels).double().mean()),
            "changed": int((predicted != reference.argmax(1)).sum()),
            "divergence": float((reference.exp() * (reference - log_p)).sum(1).mean()),
            "drift": layer_drift(found[kind], true, EPS)[0].drift,
        }
    with true.applied_to(model):
        there = between_batches(model, images, SHOWN[0])
    with batch_statistics(model):
        left = between_batches(model, images, SHOWN[0])
    return {
        "images": IMAGES,
        "steps": STEPS,
        "torch": torch.__version__,
        "layers": list(true.names),
        "values_per_image": [true.count[name] // IMAGES for name in true.names],
        "test_accuracy": float((reference.argmax(1) == labels).double().mean()),
        "errors": {kind: errors(statistics, true) for kind, statistics in found.items()},
        "consequences": consequences,
        "between_batches": {"batch_size": SHOWN[0], "population": there, "own batch": left},
        "costs": costs(model, images),
    }


# -------------------------------------------------------------------------------------- drawing

BLUES = {8: "#0f3d66", 32: "#1f6fb5", 128: "#7db4e3"}
PINK = "#b03a6d"
STYLE = {**STYLE_OF_PAGES, "lines.linewidth": 1.6}


def _figure(width: float, height: float, columns: int, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, **options)


def _decades(axis) -> None:
    axis.set_major_locator(LogLocator(10, numticks=12))
    axis.set_minor_formatter(NullFormatter())


def by_layer(found: dict) -> Figure:
    """Two panels, variance and mean: errors of every method from the first layer to the last."""
    figure, panels = _figure(9.6, 4.9, 2, sharey=True)
    layers = np.arange(1, len(found["layers"]) + 1)
    ends = [
        i + 0.5
        for i in range(1, len(layers))
        if found["values_per_image"][i] != found["values_per_image"][i - 1]
    ]
    titles = {"var": "variance: relative error", "mean": "mean: error in standard deviations"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):

        def curve(kind: str, axes=axes, key=key, **style) -> np.ndarray:
            values = np.array(found["errors"][kind][key])
            axes.plot(layers, values, **style)
            return values

        last = curve(
            f"pooled {BATCH} by class", color=PINK, linewidth=1.4, marker="o", markersize=2.5
        )[-1]
        axes.text(layers[-1] + 0.35, last, str(BATCH), color=PINK, va="center")
        for size, blue in BLUES.items():
            last = curve(f"pooled {size}", color=blue, marker="o", markersize=3)[-1]
            axes.text(layers[-1] + 0.35, last, str(size), color=blue, va="center")
            curve(f"batch-mean {size}", color=ORANGE, linewidth=1, linestyle=(0, (2, 2)))
            curve(f"exact {size}", color=GREEN, linewidth=1.4, marker="o", markersize=2.2)
        curve(f"exact {BATCH} by class", color=GREEN, linewidth=1.4, marker="o", markersize=2.2)
        curve("running", color=PURPLE, linewidth=1.6, linestyle=(0, (5, 1.5)))
        for start, end in zip([0.5, *ends], [*ends, layers[-1] + 0.5], strict=True):
            side = round(found["values_per_image"][int(start)] ** 0.5)
            axes.text((start + end) / 2, 7e-9, f"{side}×{side} pixels", color=MUTED, ha="center")
            if end < layers[-1]:
                axes.axvline(end, color=MUTED, linewidth=0.7, linestyle=":")
        axes.set_yscale("log")
        _decades(axes.yaxis)
        axes.set_ylim(5e-9, 2.5)
        axes.set_xlim(0.4, layers[-1] + 1.6)
        axes.set_xticks([1, 4, 7, 10, 13, 16, 19])
        axes.set_xlabel("BN layer, from input to output")
        axes.set_title(title)
        axes.text(12.5, 3.5e-7, "exact, any batches", color=GREEN, ha="center", weight="bold")
    left, right = panels
    pointing = {"arrowstyle": "-", "linewidth": 0.8}
    left.annotate(
        "pooled, batches of 8, 32, 128",
        (2.4, 8e-4),
        (2.2, 2.2e-5),
        color=BLUES[32],
        weight="bold",
        arrowprops={**pointing, "color": BLUES[32]},
    )
    left.annotate(
        "batch-mean: off in layer 1,\nthen the same as pooled",
        (1.05, 1.2e-2),
        (1.6, 0.16),
        color=ORANGE,
        weight="bold",
        arrowprops={**pointing, "color": ORANGE},
    )
    left.annotate(
        "pooled is exact\nin layer 1 only",
        (1.05, 6e-8),
        (2.2, 1.2e-6),
        color=BLUES[32],
        arrowprops={**pointing, "color": BLUES[32]},
    )
    left.annotate(
        "pooled, 128 sorted by class",
        (17, 1.9e-1),
        (10.3, 1.1),
        color=PINK,
        weight="bold",
        arrowprops={**pointing, "color": PINK},
    )
    right.annotate(
        "running averages, decay 0.9",
        (1.1, 4.3e-3),
        (1.6, 6e-1),
        color=PURPLE,
        weight="bold",
        arrowprops={**pointing, "color": PURPLE},
    )
    return figure


def by_batch_size(found: dict) -> Figure:
    """Left: the error of `pooled` against the batch size. Right: where it comes from."""
    figure, (left, right) = _figure(9.6, 3.7, 2)
    sizes = np.array(SIZES)
    last = len(found["layers"]) - 1
    for layer, colour, place in ((last, BLUES[8], "bottom"), (last // 2, BLUES[32], "top")):
        values = [found["errors"][f"pooled {size}"]["var"][layer] for size in SIZES]
        left.plot(sizes, values, color=colour, marker="o", markersize=3.5)
        factor = 1.35 if place == "bottom" else 1 / 4.5
        left.text(
            sizes[0],
            values[0] * factor,
            f"pooled, layer {layer + 1}",
            color=colour,
            va=place,
            weight="bold",
        )
    exact = [max(found["errors"][f"exact {size}"]["var"]) for size in SHOWN]
    left.plot(SHOWN, exact, color=GREEN, marker="o", markersize=3.5)
    left.text(
        SHOWN[1], max(exact) * 2, "exact, its worst layer", color=GREEN, ha="center", weight="bold"
    )
    middle = [found["errors"][f"pooled {size}"]["var"][last // 2] for size in SIZES]
    guide = np.array([16, 512])
    left.plot(guide, middle[1] / 6 * 8 / guide, color=MUTED, linewidth=1, linestyle=":")
    left.text(
        90, middle[1] / 6 * 8 / 90 / 1.3, "∝ 1 / batch size", color=MUTED, ha="right", va="top"
    )
    left.set(
        xscale="log",
        yscale="log",
        xlim=(3.2, 640),
        ylim=(2e-8, 0.4),
        xlabel="mini-batch size",
        title="variance: relative error",
    )
    left.set_xticks(sizes, [str(size) for size in SIZES])
    left.minorticks_off()
    _decades(left.yaxis)

    shares = found["between_batches"]
    layers = np.arange(1, last + 2)
    there, seen = np.array(shares["population"]), np.array(shares["own batch"])
    right.fill_between(layers, seen, there, color=BLUES[128], alpha=0.35, linewidth=0)
    right.plot(layers, there, color=GREEN, marker="o", markersize=3)
    right.plot(layers, seen, color=BLUES[32], marker="o", markersize=3)
    right.text(
        9, there[8] + 0.3, "there is: exact sees it", color=GREEN, ha="center", weight="bold"
    )
    right.text(
        9, seen[8] + 0.12, "left for pooled to see", color=BLUES[32], ha="center", weight="bold"
    )
    right.set(
        xlim=(0.4, 19.6),
        ylim=(0, None),
        xlabel="BN layer, from input to output",
        title=f"% of variance between the means of batches of {shares['batch_size']}",
    )
    right.set_xticks([1, 4, 7, 10, 13, 16, 19])
    return figure


def main() -> None:
    """Measure, draw, write the files, print the numbers."""
    found = measure()
    (HERE / "layer-errors.json").write_text(json.dumps(_rounded(found), indent=1) + "\n")
    draw(found)
    print(
        *tables(found),
        *(found["costs"][key] for key in ("estimate", "bounded_estimate")),
        sep="\n\n",
    )


def tables(found: dict) -> list[str]:
    """The tables of the page, in Markdown: errors, consequences, costs."""
    last = len(found["layers"])
    shown = (1, 2, last // 2 + 1, last)
    columns = [
        "relative error of the variance",
        *(f"layer {n}" for n in shown),
        "worst channel of all",
    ]
    kinds = [
        "running",
        *(f"{m} {s}" for m in ("batch-mean", "pooled", "exact") for s in SHOWN),
        *(f"{m} {BATCH} by class" for m in ("pooled", "exact")),
    ]
    rows = []
    for kind in kinds:
        error = found["errors"][kind]
        values = [*(error["var"][n - 1] for n in shown), max(error["worst_var"])]
        rows.append([_name(kind), *map(_power, values)])
    consequences = [
        [
            _name(kind),
            f"{100 * row['accuracy']:.2f} %",
            f"{row['changed']} of {TEST_IMAGES}",
            _power(row["divergence"]),
        ]
        for kind, row in found["consequences"].items()
    ]
    seconds = found["costs"]["seconds"]
    names = ("inference, for comparison", "`pooled`", "`exact`", '`exact`, `memory="64MiB"`')
    costs = [
        [name, f"{taken:.1f}", f"{taken / seconds['inference']:.2f}"]
        for name, taken in zip(names, seconds.values(), strict=True)
    ]
    return [
        _table(columns, rows),
        _table(
            ["statistics", "test accuracy", "predictions changed", "divergence, nats"], consequences
        ),
        _table(["what", "processor seconds", "of an inference pass"], costs),
    ]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(kind: str) -> str:
    if kind == "running":
        return "running averages, decay 0.9"
    method, size, *order = kind.split(" ")
    return f"`{method}`, batches of {size}" + (", sorted by class" if order else "")


def _power(value: float) -> str:
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def draw(found: dict) -> None:
    with matplotlib.rc_context(STYLE):
        for name, figure in (("layer-errors", by_layer), ("batch-size-errors", by_batch_size)):
            png = io.BytesIO()
            figure(found).savefig(png, format="png", dpi=150, facecolor="white")
            image = Image.open(png).convert("RGB").quantize(64)
            image.save(HERE / f"{name}.png", optimize=True)


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
