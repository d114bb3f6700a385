"""The figures of docs/moving-averages.md, from what measure.py found."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

INK, MUTED, GRID = "#1c2126", "#626b75", "#e2e6ea"
BLUE, ORANGE, GREEN, PURPLE = "#1f6fb5", "#c8501e", "#23836a", "#7d55b0"
DECAY_COLOUR = {"0.9": BLUE, "0.99": GREEN, "0.999": ORANGE}
STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
}


def save(figure: Figure, path: Path) -> None:
    """A PNG of at most 64 colours: a third of the size, and no difference to the eye."""
    raw = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(raw, format="png", dpi=150, facecolor="white")
    Image.open(raw).convert("RGB").quantize(64).save(path, optimize=True)


def _figure(width: float, height: float, rows: int, columns: int, **options):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def _styled(draw):
    def styled(*arguments):
        with matplotlib.rc_context(STYLE):
            return draw(*arguments)

    return styled


@_styled
def ema_accuracy(found: dict) -> Figure:
    """One panel per decay: the average against whole-train accuracy."""
    figure, axes = _figure(9.6, 3.7, 1, 3, sharey=True)
    steps, batch = np.array(found["steps"]), 100 * np.array(found["batch"])
    verdicts = ("nervous", "steady, a little low", "smooth, and late")
    windows = batch[: len(batch) // 150 * 150].reshape(-1, 150)
    low, high = np.percentile(windows, (10, 90), axis=1)
    centres = 75 + 150 * np.arange(len(windows))
    for ax, (decay, one), verdict in zip(axes[0], found["decays"].items(), verdicts, strict=True):
        ax.fill_between(
            centres,
            low,
            high,
            color="#d9dde2",
            linewidth=0,
            alpha=0.6,
            zorder=1,
            label="mini-batches (middle 80 %)",
        )
        ax.plot(
            steps,
            100 * np.array(one["curve"]),
            color=DECAY_COLOUR[decay],
            linewidth=1.3,
            label="their EMA (training accuracy)",
            zorder=3,
        )
        ax.plot(
            found["evaluated"],
            100 * np.array(found["train"]),
            "o",
            color=INK,
            markersize=3,
            label="whole training set, inference mode",
            zorder=4,
        )
        ax.set_title(f"decay {decay}: {verdict}", color=DECAY_COLOUR[decay])
        ax.text(
            0.97,
            0.06,
            f"{-100 * one['distance_mean']:.1f} points low, "
            f"give or take {100 * one['distance_sd']:.1f}",
            ha="right",
            transform=ax.transAxes,
            color=DECAY_COLOUR[decay],
        )
        ax.set_xlabel("step")
        ax.set_ylim(72, 96)
        ax.set_xlim(0, steps[-1])
    axes[0, 0].set_ylabel("training accuracy, %")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


KINDS = {
    "recomputed": ("recomputed", INK, "-", "", 4.2),
    "running": ("running, decay 0.9", BLUE, "-", "s", 1.5),
    "ema-0.99": ("running, decay 0.99", GREEN, (0, (5, 1.5)), "v", 1.5),
    "ema-0.999": ("running, decay 0.999", ORANGE, "-", "o", 1.5),
    "debiased-0.999": ("decay 0.999, debiased", ORANGE, (0, (1.5, 1.5)), "", 1.3),
}


@_styled
def statistics(*runs: dict) -> Figure:
    """Rows: batch sizes. Columns: the first steps and the last ones."""
    figure, axes = _figure(9.6, 6.2, len(runs), 2, gridspec_kw={"width_ratios": (1, 1)})
    for row, run in zip(axes, runs, strict=True):
        steps = np.array(run["steps"])
        late_values = []
        for ax, part in zip(row, (steps <= 300, steps > steps[-1] - 301), strict=True):
            for kind, (label, colour, dashes, marker, width) in KINDS.items():
                values = 100 * np.array(run["accuracy"][kind])
                black = kind == "recomputed"
                ax.plot(
                    steps[part],
                    values[part],
                    color=colour,
                    linestyle=dashes,
                    marker=marker,
                    markersize=3.5,
                    linewidth=width,
                    label=label,
                    alpha=0.25 if black else 1,
                    zorder=1 if black else 3,
                )
                if part[-1]:
                    late_values.append(values[part])
            ax.set_xlabel("step")
        size = run["batch_size"]
        row[0].set_ylim(0, 100)
        low, high = np.min(late_values), np.max(late_values)
        row[1].set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        row[0].set_title(f"mini-batches of {size}: the first 300 steps")
        row[1].set_title(f"mini-batches of {size}: the last 300 of 3,000 (magnified)")
        row[0].set_ylabel("test accuracy, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    for handle in handles:
        handle.set_label(None)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, columnspacing=1.2)
    return figure


@_styled
def weights(found: dict) -> Figure:
    """EMA weights on the left, SWA weights on the right."""
    figure, axes = _figure(9.6, 3.9, 1, 2, sharey=True)
    curves = found["accuracy"]

    def line(ax, kind, label, colour, **options):
        curve = curves[kind]
        values = 100 * np.array(curve["values"])
        ax.plot(curve["steps"], values, markersize=4, color=colour, label=label, **options)

    titles = {"ema": "EMA of the weights, decay 0.99", "swa": "SWA: mean of the weights so far"}
    for ax, (name, title) in zip(axes[0], titles.items(), strict=True):
        line(
            ax,
            "last/running",
            "trained weights, running statistics",
            "#9aa2ab",
            linewidth=1.2,
            marker=".",
        )
        stale, recomputed = (
            "averaged weights, stale statistics",
            "averaged weights, recomputed statistics",
        )
        line(ax, f"{name}/stale", stale, ORANGE, marker="s", linestyle=(0, (5, 1.5)))
        line(ax, f"{name}/recomputed", recomputed, BLUE, marker="o")
        ax.set_title(title)
        ax.set_xlabel("step")
    axes[0, 0].set_ylabel("test accuracy, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.2)
    return figure


@_styled
def paper(with_bn: dict, without: dict) -> Figure:
    """Figure 1 of the paper: test accuracy; percentiles without and with BN."""
    figure, axes = _figure(9.6, 3.5, 1, 3)
    a, b, c = axes[0]
    labels = ((with_bn, BLUE, "with BN:", (3, 91)), (without, ORANGE, "without BN:", (1100, 60)))
    for found, colour, label, at in labels:
        values = 100 * np.array(found["test"])
        a.plot(found["tested"], values, color=colour, linewidth=1.5)
        a.text(*at, f"{label}\n{values[-1]:.1f} % at the end", color=colour, fontsize=8.5)
    a.set_ylim(0, 100)
    a.set_title("(a) test accuracy, %")
    for ax, found, colour, title in (
        (b, without, ORANGE, "(b) input of a sigmoid, without BN"),
        (c, with_bn, BLUE, "(c) input of a sigmoid, with BN"),
    ):
        low, middle, high = found["percentiles"]
        ax.fill_between(found["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
        for curve, name in ((high, "85th"), (middle, "50th"), (low, "15th")):
            ax.plot(found["steps"], curve, color=colour, linewidth=1.5)
            ax.annotate(
                name,
                (found["steps"][-1], curve[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=8.5,
            )
        ax.set_title(title)
    low = min(min(map(min, f["percentiles"])) for f in (with_bn, without))
    high = max(max(map(max, f["percentiles"])) for f in (with_bn, without))
    for ax in (b, c):
        ax.set_ylim(low - 0.3, high + 0.3)
    for ax in axes[0]:
        ax.set_xscale("symlog", linthresh=20, linscale=0.4)
        ax.set_xticks([0, 100, 1000, 10_000], ["0", "100", "1,000", "10,000"])
        ax.minorticks_off()
        ax.set_xlim(0, 50_000)
        ax.set_xlabel("step (logarithmic)")
    return figure
