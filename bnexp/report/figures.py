"""The figures of a run: what they show, what to look for in them, and their data.

Each function takes a `RunData` and returns a `Plot`, or None where the run has not measured what
the figure shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bnexp.analysis.words import count, percent, signed
from bnexp.report.curves import envelope, thin
from bnexp.report.drawing import (
    COLOUR,
    CYCLE,
    DASHES,
    Panel,
    Plot,
    Table,
    dashboard_png,
    end_of,
    save,
)
from bnexp.report.run_data import RunData, compared_kind, is_recomputed

TABLE_BINS = 60
MAX_LAYERS = 30
MAIN_KINDS = ("running", "recomputed", "batch")


def run_plots(run: RunData) -> list[Plot]:
    """All figures of one run, in the order of the report."""
    makers = (
        training_accuracy,
        test_accuracy,
        estimators,
        final_comparison,
        layer_drift,
        loss_and_rate,
    )
    return [plot for make in makers if (plot := make(run)) is not None]


def save_plots(run: RunData, folder: Path, file_format: str) -> list[Path]:
    """Write every figure of the run as <key>.png or .svg into `folder`; the paths."""
    paths = []
    for plot in run_plots(run):
        paths.append(folder / f"{plot.key}.{file_format}")
        save(plot, paths[-1])
    return paths


def results_png(run: RunData) -> bytes:
    """The dashboard results.png of a run: up to six of its plots, and the verdict."""
    plots = {plot.key: plot for plot in run_plots(run)}
    wanted = (
        ("accuracy", 0),
        ("statistics", 0),
        ("statistics", 1),
        ("rate", 0),
        ("rate", 1),
        ("layers", 0),
        ("comparison", 1),
        ("accuracy", 1),
    )
    panels = [
        _named(plots[key], plots[key].panels[i])
        for key, i in wanted
        if key in plots and len(plots[key].panels) > i
    ]
    title = f"{run.name}: {run.config['model']['name']} on {run.config['data']['name']}"
    subtitle = run.comparison["verdict"] if run.comparison else _state(run)
    return dashboard_png(panels[:6], title, subtitle)


# ------------------------------------------------------------------------ accuracy in training


def training_accuracy(run: RunData) -> Plot | None:
    """EMA training accuracy, mini-batch, whole-train and test accuracy by step."""
    steps, batch, ema = (run.steps[k] for k in ("step", "accuracy", "ema_accuracy"))
    if len(steps) == 0:
        return None
    baseline = run.baseline
    train_steps, train = run.curve("train", baseline)
    test_steps, test = run.curve("test", baseline)
    val_steps, val = run.curve("val", baseline)
    distance = _at(train_steps, steps, ema) - train

    def draw(axes: Axes, narrow: bool) -> None:
        _band(axes, steps, 100 * batch, COLOUR["purple"], "mini-batches", narrow)
        x, y = thin(steps, 100 * ema, _bins(narrow))
        axes.plot(x, y, color=COLOUR["purple"], label="EMA of training", zorder=3)
        points = [
            (train_steps, train, "whole training set", "green", "o"),
            (val_steps, val, "validation", "gold", "D"),
            (test_steps, test, "test", "blue", "s"),
        ]
        for x, y, label, colour, marker in points:
            if len(x):
                _line(axes, x, 100 * y, colour, label, marker)
        low, _ = _accuracy_limits([(steps, ema), *(p[:2] for p in points)])
        axes.set_ylim(low, 100)
        _step_axis(axes, steps, narrow)

    def draw_distance(axes: Axes, narrow: bool) -> None:
        axes.axhline(0, color=COLOUR["muted"], linewidth=0.9)
        x, y = train_steps, 100 * distance
        axes.vlines(x, 0, y, color=COLOUR["purple"], linewidth=1)
        axes.plot(x, y, "o", color=COLOUR["purple"], markersize=3.5)
        axes.margins(y=0.15)
        _step_axis(axes, steps, narrow)

    decay = run.config["training"]["ema_accuracy_decay"]
    memory = count(round(1 / (1 - decay)))
    caption = (
        f"The EMA follows the accuracy of the mini-batches just trained on (decay {decay:g}, so it "
        f"remembers about {memory} steps), which are drawn faintly behind it"
        + (". " if len(steps) <= 2 * _bins(True) else ": the band spans the best and the worst. ")
    )
    panels = [Panel("Accuracy, %", draw, 2.7)]
    alt = f"Accuracy over {count(len(steps))} steps. The EMA training accuracy ends at " + percent(
        ema[-1]
    )
    if len(train):
        panels.append(Panel("EMA less whole training set, points", draw_distance, 1.1))
        off = float(np.abs(distance).mean())
        caption += (
            "It stands in for the accuracy on the whole training set in inference mode (green), "
            "which is too dear to measure at every step. Look at the lower plot for how good a "
            f"stand-in it is: {_points(off)} off on average over {count(len(train))} "
            f"measurements, {signed(distance[-1])} at the last one. It lags while the model "
            "improves; it sees augmented images and each mini-batch's own statistics; and it knows "
            "only the images of its last steps. "
        )
        alt += (
            f", the accuracy on the whole training set at {percent(train[-1])}; the EMA was "
            f"{_points(off)} off on average"
        )
    else:
        caption += (
            "It stands in for the accuracy on the whole training set, which this run did not "
            "measure: set test.train_accuracy to see how good a stand-in it is. "
        )
    if len(test):
        alt += f". Test accuracy ends at {percent(test[-1])}"
        caption += "Its distance from the test accuracy is the generalization gap."
    return Plot(
        key="accuracy",
        title="Is the moving average of training accuracy a good stand-in?",
        caption=caption.strip(),
        alt=f"{alt}.",
        panels=tuple(panels),
        tables=(_step_table(run), _eval_table(run, baseline)),
    )


# ------------------------------------------------------------------------ statistics by step


def test_accuracy(run: RunData) -> Plot | None:
    """Test accuracy by step under running, recomputed and mini-batch statistics."""
    kinds = [kind for kind in run.kinds("test") if _main(kind)]
    return _by_step(
        run,
        kinds,
        key="statistics",
        title="When do the running averages cost accuracy?",
        caption=(
            "One model, tested at the same steps under each kind of statistics: only what its BN "
            "layers normalize with differs. Look for where the curves part: early in training and "
            "at high learning rates the weights move faster than the averages can follow. "
        ),
    )


def estimators(run: RunData) -> Plot | None:
    """Test accuracy by step under every online estimator."""
    further = [k for k in run.kinds("test") if not _main(k) and "/" not in k and k != "none"]
    if not further:
        return None
    kinds = [k for k in run.kinds("test") if k == run.baseline or k in further]
    recomputed = [k for k in run.kinds("test") if is_recomputed(k)][:1]
    return _by_step(
        run,
        kinds + recomputed,
        key="estimators",
        title="Which moving average would have been better?",
        caption=(
            "All estimators watched the same training run, which does not depend on them. A short "
            "memory follows quickly and is noisy; a long one is smooth and late. Look for the one "
            "that stays closest to the recomputed statistics throughout. "
        ),
    )


def _by_step(run: RunData, kinds: list[str], key: str, title: str, caption: str) -> Plot | None:
    base_steps, base = run.curve("test", run.baseline)
    if len(base_steps) < 2 or len(kinds) < 2:
        return None
    curves = {kind: run.curve("test", kind) for kind in kinds}
    styles = _styles(kinds)
    differences = {}
    for kind in kinds:
        common, i, j = np.intersect1d(base_steps, curves[kind][0], return_indices=True)
        if kind != run.baseline and len(common) > 1:
            differences[kind] = (common, curves[kind][1][j] - base[i])
    last = max(base_steps.max(), run.steps["step"].max(initial=0))

    def draw(axes: Axes, narrow: bool) -> None:
        for kind in kinds:
            colour, dash, marker = styles[kind]
            _line(axes, curves[kind][0], 100 * curves[kind][1], colour, _short(kind), marker, dash)
        axes.set_ylim(*_accuracy_limits(list(curves.values())))
        _step_axis(axes, [0, last], narrow)

    def draw_difference(axes: Axes, narrow: bool) -> None:
        axes.axhline(0, color=COLOUR["muted"], linewidth=0.9)
        for kind, (x, y) in differences.items():
            colour, dash, marker = styles[kind]
            _line(axes, x, 100 * y, colour, None, marker, dash)
        axes.margins(y=0.15)
        _step_axis(axes, [0, last], narrow)

    panels = [Panel("Test accuracy, %", draw, 2.4)]
    alt = f"Test accuracy at {count(len(base_steps))} steps. "
    for kind in kinds:
        alt += f"{_short(kind)} ends at {percent(curves[kind][1][-1])}. "
    if differences:
        panels.append(Panel(f"Difference to {_short(run.baseline)}, points", draw_difference, 1.4))
        furthest = max(differences, key=lambda kind: np.abs(differences[kind][1]).max())
        x, y = differences[furthest]
        worst = np.abs(y).argmax()
        caption += (
            f"Here {_label(run, furthest)} are furthest from the {_short(run.baseline)} ones, at "
            f"step {count(int(x[worst]))}: {signed(y[worst])} points."
        )
    rows = []
    for i, step in enumerate(base_steps):
        row = [count(int(step)), percent(base[i], 2)]
        for kind in kinds:
            if kind != run.baseline:
                at = np.flatnonzero(curves[kind][0] == step)
                row.append(percent(curves[kind][1][at[0]], 2) if len(at) else "")
        rows.append(row)
    columns = ["step", run.baseline, *(k for k in kinds if k != run.baseline)]
    return Plot(
        key=key,
        title=title,
        caption=caption.strip(),
        alt=alt.strip(),
        panels=tuple(panels),
        tables=(Table("Test accuracy", columns, _at_most(rows)),),
    )


# ------------------------------------------------------------------------ the final comparison


def final_comparison(run: RunData) -> Plot | None:
    """Accuracy of every kind with its interval, and the paired difference to the baseline."""
    if not run.comparison or len(run.comparison["kinds"]) < 2:
        return None
    found, chance = run.comparison["kinds"], run.comparison["chance"]
    styles = _styles([kind["name"] for kind in found])
    colours = [styles[kind["name"]][0] for kind in found]
    at_chance = [kind["accuracy_interval"][0] <= chance for kind in found]
    at_chance = [flag and not all(at_chance) for flag in at_chance]
    accuracies = [(kind["accuracy"], kind["accuracy_interval"]) for kind in found]
    paired = [kind["versus_baseline"] for kind in found]
    differences = [p and (p["difference"], p["difference_interval"]) for p in paired]

    def draw(values: list, text: Callable[[float], str]) -> Callable[[Axes, bool], None]:
        def draw(axes: Axes, narrow: bool) -> None:
            for i, value in enumerate(values):
                if value and at_chance[i]:
                    note = f"{text(value[0])}, at chance"
                    where = axes.get_yaxis_transform()
                    axes.text(0.02, i, note, va="center", size=8, transform=where)
                elif value:
                    _interval(axes, i, *value, colours[i])
            if values is differences:
                axes.axvline(0, color=COLOUR["muted"], linewidth=0.9)
            _value_axis(axes, narrow)

        return draw

    base = _short(run.comparison["baseline"])
    caption = (
        "Each kind of statistics on the whole test set, with 95 % intervals. The first plot asks "
        f"how good the model is, the second what the kind changes against {base}: both see the "
        "same images, so its intervals are far narrower, and overlap in the first says nothing "
        "about a difference. An interval that reaches over the zero line is compatible with no "
        "difference."
    )
    if any(at_chance):
        caption += " A kind at chance would be far outside the plots; its number is given instead."
    alt = "; ".join(f"{_short(k['name'])} {percent(k['accuracy'], 2)}" for k in found)
    return Plot(
        key="comparison",
        title="All kinds of statistics at the end of the run",
        caption=caption,
        alt=f"Test accuracy with 95 % intervals: {alt}. The comparison table has all numbers.",
        panels=(
            Panel("Accuracy, %", draw(accuracies, percent), 0),
            Panel(f"Difference to {base}, points", draw(differences, signed), 0),
        ),
        rows=tuple(_short(kind["name"]) for kind in found),
    )


# ------------------------------------------------------------------------ layers


def layer_drift(run: RunData) -> Plot | None:
    """How far each layer's statistics are from the recomputed ones, and what that costs."""
    layers = (run.comparison or {}).get("layers") or {}
    kind = compared_kind(layers)
    if kind is None or not layers[kind]:
        return None
    rows = layers[kind]
    shown = rows[:MAX_LAYERS]
    colour = COLOUR[_styles([kind])[kind][0]]

    def drift(value: str, worst: str) -> Callable[[Axes, bool], None]:
        def draw(axes: Axes, narrow: bool) -> None:
            y = np.arange(len(shown))
            low, high = (np.array([row[k] for row in shown]) for k in (value, worst))
            axes.hlines(y, low, high, color=colour, linewidth=1, alpha=0.5)
            axes.plot(low, y, "o", color=colour, markersize=4.5)
            axes.plot(high, y, "|", color=colour, markersize=7)
            axes.set_xlim(left=0)
            axes.margins(x=0.06)
            _value_axis(axes, narrow, percent_scale=False)

        return draw

    panels = [
        Panel("Means: distance in σ", drift("mean_drift", "worst_mean_drift"), 0),
        Panel("Variances: |log ratio|", drift("log_var_drift", "worst_log_var_drift"), 0),
    ]
    with_costs = all("difference" in row for row in shown)
    if with_costs:

        def draw_costs(axes: Axes, narrow: bool) -> None:
            axes.axvline(0, color=COLOUR["muted"], linewidth=0.9)
            for i, row in enumerate(shown):
                _interval(axes, i, row["difference"], row["interval"], "orange")
            _value_axis(axes, narrow)

        panels.append(Panel("Exchanged alone, points", draw_costs, 0))
    first = rows[0]
    base = _short(run.comparison["baseline"])
    caption = (
        f"{_capital(base)} against {_short(kind)} statistics in each BN layer, the furthest "
        "first. Means are compared in units of the layer's own standard deviation σ, variances "
        "by the logarithm of their ratio (0.1 is about 10 %). The dot is the root mean square over "
        "channels, the bar ends at the worst channel. Up to some hundredths are noise of the "
        "averages and do no harm; look for layers, often the last ones, that stand out by far. "
        f"Furthest here: {first['name']}, means {first['mean_drift']:.3f} σ off."
    )
    if with_costs:
        caption += (
            f" Last, what the test accuracy gains if this layer alone gets {_short(kind)} "
            "statistics; these need not add up."
        )
    if len(rows) > len(shown):
        caption += f" Shown are {len(shown)} of {len(rows)} layers; the table has them all."
    columns = ["layer", "mean, σ", "worst channel", "variance, |log|", "worst channel"]
    table = [
        [
            row["name"],
            f"{row['mean_drift']:.4f}",
            f"{row['worst_mean_drift']:.4f} (#{row['worst_mean_channel']})",
            f"{row['log_var_drift']:.4f}",
            f"{row['worst_log_var_drift']:.4f} (#{row['worst_var_channel']})",
            *([f"{signed(row['difference'])}"] if with_costs else []),
        ]
        for row in rows
    ]
    return Plot(
        key="layers",
        title="Which layers' averages are off?",
        caption=caption,
        alt=(
            f"Distance of {base} from {_short(kind)} statistics in {len(rows)} layers; furthest is "
            f"{first['name']} with its means {first['mean_drift']:.3f} standard deviations off."
        ),
        panels=tuple(panels),
        tables=(
            Table(
                "Drift by layer", [*columns, *(["accuracy, points"] if with_costs else [])], table
            ),
        ),
        rows=tuple(row["name"] for row in shown),
    )


# ------------------------------------------------------------------------ loss and learning rate


def loss_and_rate(run: RunData) -> Plot | None:
    steps, loss, rate = (run.steps[k] for k in ("step", "loss", "lr"))
    if len(steps) == 0:
        return None
    test_steps, test = run.curve("test", run.baseline, "loss")

    def draw_loss(axes: Axes, narrow: bool) -> None:
        _band(axes, steps, loss, COLOUR["purple"], "mini-batches", narrow, mean="their mean")
        finite = np.isfinite(test)
        if finite.any():
            _line(axes, test_steps[finite], test[finite], "blue", "test", "s")
        if np.isfinite(loss).any() and np.nanmin(loss) > 0:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            subs = (1, 2, 5) if high < 200 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        _step_axis(axes, steps, narrow)

    def draw_rate(axes: Axes, narrow: bool) -> None:
        x, y = thin(steps, rate, _bins(narrow))
        axes.plot(x, y, color=COLOUR["teal"])
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
        _step_axis(axes, steps, narrow)

    broken = np.flatnonzero(~np.isfinite(loss))
    caption = (
        "The averages lag behind weights that move fast: compare where this rate is high with "
        "where the curves above part. The loss of training is on its mini-batches"
        + (", label smoothing included." if run.config["training"]["label_smoothing"] else ".")
    )
    if len(broken):
        caption += f" From step {count(int(steps[broken[0]]))} on the loss is not finite."
    return Plot(
        key="rate",
        title="Loss and learning rate",
        caption=caption,
        alt=(
            f"The training loss falls from {loss[0]:.3g} to {loss[-1]:.3g}; the learning rate goes "
            f"from {rate[0]:.3g} over at most {rate.max():.3g} to {rate[-1]:.3g}."
        ),
        panels=(
            Panel("Loss, nats", draw_loss, 1.7),
            Panel("Learning rate", draw_rate, 1.1),
        ),
        tables=(_step_table(run),),
    )


# ------------------------------------------------------------------------ several runs


def runs_accuracy(runs: Sequence[RunData]) -> Plot | None:
    """Test accuracy by step of several runs, under their baseline and, dashed, recomputed."""
    curves = [(run, kind, *run.curve("test", kind)) for run in runs for kind in _pair(run)]
    curves = [curve for curve in curves if len(curve[2])]
    if not curves:
        return None
    colours = {run.name: CYCLE[i % len(CYCLE)] for i, run in enumerate(runs)}
    dashes = {run.name: i // len(CYCLE) for i, run in enumerate(runs)}

    def draw(axes: Axes, narrow: bool) -> None:
        for run, kind, x, y in curves:
            first = kind == run.baseline
            dash = DASHES[dashes[run.name] % len(DASHES)] if first else (0, (1.5, 1.5))
            label = run.name if first else None
            _line(axes, x, 100 * y, colours[run.name], label, "s" if first else "o", dash)
        axes.set_ylim(*_accuracy_limits([curve[2:] for curve in curves]))
        _step_axis(axes, [0, max(x.max() for _, _, x, _ in curves)], narrow)

    rows = [
        [run.name, kind, count(int(x[-1])), percent(y[-1], 2), percent(y.max(), 2)]
        for run, kind, x, y in curves
    ]
    return Plot(
        key="runs",
        title="Test accuracy of the runs",
        caption=(
            "Solid lines with squares: under each run's own running averages. Dotted lines with "
            "dots: under recomputed statistics. Where the two of one colour part, that run's "
            "averages cost accuracy."
        ),
        alt="; ".join(f"{row[0]} ({row[1]}) ends at {row[3]}" for row in rows),
        panels=(Panel("Test accuracy, %", draw, 3.0),),
        tables=(Table("Test accuracy", ["run", "statistics", "last step", "last", "best"], rows),),
    )


def _pair(run: RunData) -> list[str]:
    kinds = run.kinds("test")
    return [k for k in (run.baseline, "recomputed") if k in kinds]


# ------------------------------------------------------------------------ parts of figures


def _band(axes: Axes, x, y, colour: str, label: str, narrow: bool, mean: str | None = None) -> None:
    """A noisy curve: whole where it fits, else the span of each bin; optionally means over it."""
    bins = _bins(narrow)
    if len(x) <= 2 * bins:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.5, label=label)
    else:
        start, end, _, low, high = envelope(x, y, bins)
        axes.fill_between(
            (start + end) / 2, low, high, color=colour, alpha=0.22, linewidth=0, label=label
        )
    if mean is not None:
        start, end, middle, _, _ = envelope(x, y, TABLE_BINS)
        axes.plot((start + end) / 2, middle, color=colour, label=mean)


def _line(axes: Axes, x, y, colour: str, label: str | None, marker: str, dash="-") -> None:
    many = len(x) > 40
    axes.plot(
        x,
        y,
        linestyle=dash if len(x) > 1 else "",
        marker="" if many else marker,
        markersize=3.4,
        color=COLOUR[colour],
        label=label,
        zorder=4,
    )


def _interval(axes: Axes, row: int, value: float, interval, colour: str) -> None:
    axes.hlines(row, 100 * interval[0], 100 * interval[1], color=COLOUR[colour], linewidth=2)
    axes.plot(100 * value, row, "o", color=COLOUR[colour], markersize=5)


def _step_axis(axes: Axes, steps, narrow: bool) -> None:
    last = steps[-1]
    axes.set_xlim(0, last * 1.01)
    axes.xaxis.set_major_locator(
        MaxNLocator(4 if narrow else 7, integer=True, steps=[1, 2, 2.5, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}".replace(",", " ")))
    axes.set_xlabel("step", loc="right", labelpad=1)


def _value_axis(axes: Axes, narrow: bool, percent_scale: bool = True) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 5, steps=[1, 2, 2.5, 5, 10]))
    if percent_scale:
        axes.margins(x=0.08)


def _accuracy_limits(curves) -> tuple[float, float]:
    """Limits in per cent that hold all (steps, shares) after the first twentieth of the run."""
    last = max((x[-1] for x, _ in curves if len(x)), default=0)
    values = [y[(x > last / 20) & np.isfinite(y)] for x, y in curves]
    values = np.concatenate([*values, np.empty(0)])
    if len(values) == 0:
        return 0.0, 100.0
    low, high = 100 * values.min(), 100 * values.max()
    step = 10 if high - low > 20 else 2 if high - low > 4 else 0.5
    bottom = max(0.0, step * np.floor((low - 0.5) / step))
    return bottom, min(100.0, high + 0.08 * (high - bottom))


def _bins(narrow: bool) -> int:
    return 160 if narrow else 360


def _at(wanted: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y at each wanted x, or at the last x before it."""
    if len(wanted) == 0:
        return np.empty(0)
    return y[np.clip(np.searchsorted(x, wanted, side="right") - 1, 0, len(y) - 1)]


def _styles(kinds: Sequence[str]) -> dict[str, tuple[str, Any, str]]:
    """(colour, dash, marker) by kind: the same kind looks the same in every figure."""
    fixed = {
        "running": ("blue", "-", "s"),
        "recomputed": ("orange", "-", "o"),
        "batch": ("green", "-", "^"),
    }
    styles, free = {}, [c for c in CYCLE if c not in ("blue", "orange", "green")]
    for kind in kinds:
        if kind in fixed:
            styles[kind] = fixed[kind]
        else:
            i = sum(k not in fixed for k in styles)
            styles[kind] = (free[i % len(free)], DASHES[(i // len(free)) % len(DASHES)], "v")
    return styles


def _main(kind: str) -> bool:
    return kind in MAIN_KINDS or is_recomputed(kind)


def _state(run: RunData) -> str:
    state, step = run.state.get("state", "unknown"), run.state.get("step", 0)
    return f"{state} at step {count(step)}; there is no final comparison yet"


def _short(kind: str) -> str:
    return {"batch": "mini-batch", "none": "without BN"}.get(kind, kind)


def _label(run: RunData, kind: str) -> str:
    return run.labels.get(kind, f"{kind} statistics")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _points(difference: float) -> str:
    return f"{100 * difference:.2f} points"


def _named(plot: Plot, panel: Panel) -> Panel:
    """The panel for a dashboard, with the names of its rows."""
    if not plot.rows:
        return panel

    def draw(axes: Axes, narrow: bool) -> None:
        panel.draw(axes, narrow)
        shown = plot.rows[:14]
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_yticks(range(len(shown)), [end_of(name, 18) for name in shown])
        axes.grid(axis="y", visible=False)

    return Panel(panel.title, draw, panel.height)


# ------------------------------------------------------------------------ tables


def _step_table(run: RunData) -> Table:
    steps = run.steps
    x = steps["step"]
    start, end, mean, low, high = envelope(x, steps["accuracy"], TABLE_BINS)
    ema = _at(end, x, steps["ema_accuracy"])
    loss, rate = _at(end, x, steps["loss"]), _at(end, x, steps["lr"])
    rows = [
        [
            f"{count(int(a))}–{count(int(b))}" if a != b else count(int(a)),
            percent(m, 2),
            percent(lo, 2),
            percent(hi, 2),
            percent(e, 2),
            f"{ls:.4f}",
            f"{r:.3g}",
        ]
        for a, b, m, lo, hi, e, ls, r in zip(
            start, end, mean, low, high, ema, loss, rate, strict=True
        )
    ]
    columns = ["steps", "batch mean", "least", "greatest", "EMA at end", "loss at end", "rate"]
    return Table("Training, in stretches of steps (every step: steps.csv)", columns, rows)


def _eval_table(run: RunData, kind: str) -> Table:
    splits = [s for s in ("train", "val", "test") if len(run.curve(s, kind)[0])]
    curves = {s: dict(zip(*run.curve(s, kind), strict=True)) for s in splits}
    steps = sorted(set().union(*curves.values())) if curves else []
    rows = [
        [count(int(t)), *(percent(curves[s][t], 2) if t in curves[s] else "" for s in splits)]
        for t in steps
    ]
    names = {"train": "whole training set", "val": "validation", "test": "test"}
    columns = ["step", *(names[s] for s in splits)]
    return Table(f"Accuracy under {_short(kind)} statistics", columns, _at_most(rows))


def _at_most(rows: list[list[str]], limit: int = 200) -> list[list[str]]:
    """Evenly chosen rows, the last one among them."""
    if len(rows) <= limit:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, limit).round().astype(int)]
