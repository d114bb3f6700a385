"""The figures of a run: what they show, what to look for in them, and their data.

Each function takes a `RunData` and returns a `Plot`, or None where the run has not measured what
the figure shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bnexp.analysis.words import capital, count, percent, points, signed
from bnexp.condition import Condition, statistics_label
from bnexp.report.curves import envelope, thin
from bnexp.report.drawing import (
    COLOUR,
    LOOKS,
    Look,
    Panel,
    Plot,
    Table,
    dashboard_png,
    end_of,
    save,
)
from bnexp.report.layers import layer_costs, layer_drift
from bnexp.report.mpl import Axes, FuncFormatter, LogLocator, NullLocator
from bnexp.report.parts import (
    TABLE_BINS,
    accuracy_limits,
    bins_for,
    draw_band,
    draw_interval,
    draw_line,
    step_axis,
    value_at,
    value_axis,
    write_value,
)
from bnexp.report.run_data import RunData
from bnexp.report.several import by_test_set, config_differences

MAIN = ("running", "recomputed", "batch")
# A plot of accuracies shows those within so much of the best; what is further off is written.
SHOWN = 0.25
SHOWN_ROWS = 14  # in a panel of the dashboard


def run_plots(run: RunData) -> list[Plot]:
    """All figures of one run, in the order of the report."""
    makers = (
        training_accuracy,
        test_accuracy,
        estimators,
        final_comparison,
        layer_drift,
        layer_costs,
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
        ("costs", 1),
        ("layers", 0),
        ("comparison", 1),
        ("accuracy", 1),
    )
    panels = [
        _named(plots[key], plots[key].panels[i])
        for key, i in wanted
        if key in plots and len(plots[key].panels) > i
    ]
    title = f"{run.name}: {run.setup.model} on {run.setup.data}"
    subtitle = run.comparison.verdict.text if run.comparison else unfinished(run)
    return dashboard_png(panels[:6], title, subtitle)


# ------------------------------------------------------------------------ accuracy in training


def training_accuracy(run: RunData) -> Plot | None:
    """EMA training accuracy, mini-batch, whole-train and test accuracy by step."""
    steps, batch, ema = (run.steps[k] for k in ("step", "accuracy", "ema_accuracy"))
    if len(steps) == 0:
        return None
    baseline, recomputed = run.baseline, run.recomputed
    train_steps, train = run.curve("train", baseline)
    test_steps, test = run.curve("test", baseline)
    val_steps, val = run.curve("val", baseline)
    mended_steps, mended = run.curve("test", recomputed) if recomputed else (steps[:0], steps[:0])
    distance = value_at(train_steps, steps, ema) - train

    def draw(axes: Axes, narrow: bool) -> None:
        draw_band(axes, steps, 100 * batch, COLOUR["purple"], "mini-batches", narrow)
        x, y = thin(steps, 100 * ema, bins_for(narrow))
        axes.plot(x, y, color=COLOUR["purple"], label="EMA of training", zorder=3)
        curves = [
            (train_steps, train, "whole training set", Look("green", (0, (6, 1.5, 1.3, 1.5)), "^")),
            (val_steps, val, "validation", Look("gold", (0, (10, 3)), "D")),
            (test_steps, test, f"test, {baseline}", _looks([baseline])[baseline]),
        ]
        if recomputed:
            look = _looks([recomputed])[recomputed]
            curves.append((mended_steps, mended, f"test, {recomputed}", look))
        for x, y, label, look in curves:
            draw_line(axes, x, 100 * y, look, label)
        low, _ = accuracy_limits([(steps, ema), *((x, y) for x, y, _, _ in curves)])
        axes.set_ylim(low, 100)
        step_axis(axes, steps, narrow)

    def draw_distance(axes: Axes, narrow: bool) -> None:
        axes.axhline(0, color=COLOUR["muted"], linewidth=0.9)
        x, y = train_steps, 100 * distance
        axes.vlines(x, 0, y, color=COLOUR["purple"], linewidth=1)
        axes.plot(x, y, "o", color=COLOUR["purple"], markersize=3.5)
        axes.margins(y=0.15)
        step_axis(axes, steps, narrow)

    decay = run.setup.ema_decay
    memory = count(round(1 / (1 - decay)))
    caption = (
        f"The EMA follows the accuracy of the mini-batches just trained on (decay {decay:g}, so it "
        f"remembers about {memory} steps), which are drawn faintly behind it"
        + (
            ". "
            if len(steps) <= 2 * bins_for(True)
            else ": the band spans the best and the worst. "
        )
    )
    panels = [Panel("Accuracy, %", draw, 2.7)]
    alt = f"Accuracy over {count(len(steps))} steps. The EMA training accuracy ends at " + percent(
        ema[-1]
    )
    if len(train):
        panels.append(Panel("EMA less whole training set, points", draw_distance, 1.1))
        off = float(np.abs(distance).mean())
        augmented = "augmented images and " if run.setup.augmented else ""
        caption += (
            "It stands in for the accuracy on the whole training set in inference mode, "
            "which is too dear to measure at every step. Look at the lower plot for how good a "
            f"stand-in it is: {_points(off)} off on average over {count(len(train))} "
            f"measurements, {signed(distance[-1], 2)} at the last one. It lags while the model "
            f"improves; it sees {augmented}each mini-batch's own statistics; and it knows only the "
            "images of its last steps. "
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
        alt += f". Test accuracy ends at {percent(test[-1])} under {baseline} statistics"
        caption += _distance_from_test(run, float(ema[-1]), int(steps[-1]))
    return Plot(
        key="accuracy",
        title="Is the moving average of training accuracy a good stand-in?",
        caption=caption.strip(),
        alt=f"{alt}.",
        panels=tuple(panels),
        tables=(_step_table(run), _eval_table(run, baseline)),
    )


def _distance_from_test(run: RunData, ema: float, step: int) -> str:
    """What lies between the EMA and the test accuracy, from the evaluations at the last step."""
    last = {
        row.condition: row.accuracy for row in run.evals if (row.split, row.step) == ("test", step)
    }
    found = [
        f"{percent(last[c], 2)} with {statistics_label(c, run.made)}, {signed(last[c] - ema, 2)} "
        "points from the EMA"
        for c in dict.fromkeys((run.baseline, run.recomputed))
        if c in last and c is not None
    ]
    augmented = ", with augmentation" if run.setup.augmented else ""
    return (f"At the end the test accuracy is {'; it is '.join(found)}. " if found else "") + (
        "The distance from the test accuracy is not the generalization gap: the EMA is measured "
        f"with mini-batch statistics{augmented} and with the weights of earlier steps. That gap is "
        "the accuracy on the whole training set less the accuracy on the test set, both with "
        "recomputed statistics."
    )


# ------------------------------------------------------------------------ statistics by step


def test_accuracy(run: RunData) -> Plot | None:
    """Test accuracy by step under running, recomputed and mini-batch statistics."""
    conditions = [c for c in run.trained if c.statistics in MAIN]
    baseline, recomputed = run.baseline, run.recomputed
    if baseline not in conditions:
        return None
    caption = (
        "One model, tested at the same steps under each kind of statistics: only what its BN "
        "layers normalize with differs, the weights are those that training had at that step. Look "
        "for where the curves part: early in training and at high learning rates the weights move "
        "faster than the averages can follow. "
    )
    if recomputed and (found := _shared(run, recomputed, baseline)):
        steps, better, base = found
        worst = int((better - base).argmax())
        cost = float(better[worst] - base[worst])
        names = [
            capital(statistics_label(baseline, run.made)),
            statistics_label(recomputed, run.made),
        ]
        caption += (
            f"{names[0]} cost most at step {count(int(steps[worst]))}: {points(cost, 2)} points, "
            f"{percent(base[worst], 2)} against {percent(better[worst], 2)} with {names[1]}."
            if cost > 0
            else f"At none of the {count(len(steps))} evaluations did {names[1]} do better than "
            f"{names[0][0].lower()}{names[0][1:]}."
        )
    return _by_step(
        run,
        conditions,
        baseline,
        "statistics",
        "When do the running averages cost accuracy?",
        caption,
    )


def estimators(run: RunData) -> Plot | None:
    """Test accuracy by step under every online estimator, held against recomputed statistics."""
    elsewhere = (*MAIN, "none", *run.config["statistics"].get("adapted", {}))
    further = [c for c in run.trained if c.statistics not in elsewhere]
    online = [run.baseline, *(c for c in further if c != run.baseline)]
    if len(online) < 2:
        return None
    recomputed = run.recomputed
    against = recomputed if recomputed and len(run.curve("test", recomputed)[0]) > 1 else None
    norm = run.config["model"].get("norm", "batch")
    reads = "of the first of them alone" if norm not in ("batch", "none") else "of none of them"
    caption = (
        f"All estimators watched the same training run, which took notice {reads}. A short "
        "memory follows quickly and is noisy; a long one is smooth and late. The best is the one "
        "that stays closest to recomputed statistics. "
    )
    distances: dict[Condition, tuple[float, float, int]] = {}
    for condition in online:
        if recomputed and (found := _shared(run, condition, recomputed)):
            steps, one, other = found
            distances[condition] = (
                float(np.abs(one - other).mean()),
                float(one[-1] - other[-1]),
                len(steps),
            )
    if distances:
        order = sorted(distances, key=lambda c: distances[c][0])
        (best, end, n), (worst, *_) = distances[order[0]], distances[order[-1]]
        when = f"on average over {count(n)} evaluations" if n > 1 else "at the only evaluation"
        caption += (
            f"Here that was {order[0]}, {points(best, 2)} points away {when}, {signed(end, 2)} at "
            f"the last; furthest was {order[-1]}, {points(worst, 2)} points away. This is one run: "
            "where distances are small, the next may order them otherwise."
        )
    else:
        caption += (
            "This run was tested with no recomputed statistics: name them in test.statistics to "
            "see which that was."
        )
    return _by_step(
        run,
        online + ([recomputed] if recomputed else []),
        against or run.baseline,
        "estimators",
        "Which moving average would have been better?",
        caption,
    )


def _shared(
    run: RunData, first: Condition, second: Condition
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The steps at which both were tested, and the accuracies of each; None if there are none."""
    (x, a), (y, b) = run.curve("test", first), run.curve("test", second)
    steps, i, j = np.intersect1d(x, y, return_indices=True)
    return (steps, a[i], b[j]) if len(steps) else None


def _by_step(
    run: RunData,
    conditions: list[Condition],
    against: Condition,
    key: str,
    title: str,
    caption: str,
) -> Plot | None:
    """Accuracies by step, and below their differences to those under `against`."""
    curves = {c: run.curve("test", c) for c in conditions}
    base_steps = run.curve("test", run.baseline)[0]
    if len(base_steps) < 2 or len(curves) < 2:
        return None
    looks = _looks(conditions)
    differences = {
        c: (found[0], found[1] - found[2])
        for c in conditions
        if c != against and (found := _shared(run, c, against)) and len(found[0]) > 1
    }
    last = max(base_steps.max(), run.steps["step"].max(initial=0))

    def draw(axes: Axes, narrow: bool) -> None:
        for c, (x, y) in curves.items():
            draw_line(axes, x, 100 * y, looks[c], str(c))
        axes.set_ylim(*accuracy_limits(list(curves.values())))
        step_axis(axes, [0, last], narrow)

    def draw_difference(axes: Axes, narrow: bool) -> None:
        axes.axhline(0, color=COLOUR["muted"], linewidth=0.9)
        for c, (x, y) in differences.items():
            draw_line(axes, x, 100 * y, looks[c], str(c))
        axes.margins(y=0.15)
        step_axis(axes, [0, last], narrow)

    panels = [Panel("Test accuracy of the trained weights, %", draw, 2.4)]
    if differences:
        panels.append(Panel(f"Difference to {against}, points", draw_difference, 1.4))
    ends = [f"{c} ends at {percent(y[-1], 2)}" for c, (_, y) in curves.items() if len(y)]
    at = {c: dict(zip(*curve, strict=True)) for c, curve in curves.items()}
    rows = [
        [count(int(step)), *(percent(at[c][step], 2) if step in at[c] else "" for c in conditions)]
        for step in base_steps
    ]
    return Plot(
        key=key,
        title=title,
        caption=caption.strip(),
        alt=f"Test accuracy at {count(len(base_steps))} steps. {'. '.join(ends)}.",
        panels=tuple(panels),
        tables=(Table("Test accuracy", ["step", *map(str, conditions)], _at_most(rows)),),
    )


# ------------------------------------------------------------------------ the final comparison


def final_comparison(run: RunData) -> Plot | None:
    """Accuracies with their intervals, and the paired differences to the baseline."""
    comparison = run.comparison
    if not comparison or not comparison.others:
        return None
    results = comparison.results
    best = max(result.accuracy for result in results)
    far = [best - result.accuracy > SHOWN for result in results]
    base = str(comparison.baseline)

    def draw_accuracy(axes: Axes, narrow: bool) -> None:
        for i, result in enumerate(results):
            if far[i]:
                write_value(axes, i, percent(result.accuracy, 2))
            else:
                draw_interval(axes, i, result.accuracy, result.accuracy_interval, "blue")
        value_axis(axes, narrow)
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, 0), min(high, 100.5))

    def draw_difference(axes: Axes, narrow: bool) -> None:
        axes.axvline(0, color=COLOUR["muted"], linewidth=0.9)
        for i, result in enumerate(results):
            pair = result.versus_baseline
            if pair and far[i] and not far[0]:
                write_value(axes, i, signed(pair.difference, 2))
            elif pair:
                draw_interval(axes, i, pair.difference, pair.difference_interval, "blue")
        value_axis(axes, narrow)

    caption = (
        "Each condition on the whole test set, with 95 % intervals. The first plot asks how good "
        f"the model is, the second what the condition changes against {base}: both see the same "
        "images, so its intervals are the narrower the fewer predictions change, and overlap in "
        "the first says nothing about a difference. An interval that reaches over the zero line is "
        "compatible with no difference. Names are as in the table above."
    )
    if any(far):
        caption += " What would be far outside of the plots is given as a number."
    alt = "; ".join(f"{result.condition} {percent(result.accuracy, 2)}" for result in results)
    return Plot(
        key="comparison",
        title="All conditions at the end of the run",
        caption=caption,
        alt=f"Test accuracy with 95 % intervals: {alt}. The comparison table has all numbers.",
        panels=(
            Panel("Accuracy, %", draw_accuracy, 0),
            Panel(f"Difference to {base}, points", draw_difference, 0),
        ),
        rows=tuple(str(result.condition) for result in results),
    )


# ------------------------------------------------------------------------ loss and learning rate


def loss_and_rate(run: RunData) -> Plot | None:
    steps, loss, rate = (run.steps[k] for k in ("step", "loss", "lr"))
    if len(steps) == 0:
        return None
    test_steps, test = run.curve("test", run.baseline, "loss")

    def draw_loss(axes: Axes, narrow: bool) -> None:
        draw_band(axes, steps, loss, COLOUR["purple"], "mini-batches", narrow, mean="their mean")
        finite = np.isfinite(test)
        if finite.any():
            look = _looks([run.baseline])[run.baseline]
            draw_line(axes, test_steps[finite], test[finite], look, f"test, {run.baseline}")
        if np.isfinite(loss).any() and np.nanmin(loss) > 0:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            subs = (1, 2, 5) if high < 200 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        step_axis(axes, steps, narrow)

    def draw_rate(axes: Axes, narrow: bool) -> None:
        x, y = thin(steps, rate, bins_for(narrow))
        axes.plot(x, y, color=COLOUR["teal"])
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        step_axis(axes, steps, narrow)

    broken = np.flatnonzero(~np.isfinite(loss))
    caption = (
        "The averages lag behind weights that move fast: compare where this rate is high with "
        "where the curves above part. The loss of training is on its mini-batches"
        + (", label smoothing included." if run.setup.label_smoothing else ".")
    )
    if len(broken):
        caption += f" From step {count(int(steps[broken[0]]))} on the loss is not finite."
    return Plot(
        key="rate",
        title="Loss and learning rate",
        caption=caption,
        alt=(
            f"The training loss goes from {loss[0]:.3g} to {loss[-1]:.3g}; the learning rate goes "
            f"from {rate[0]:.3g} over at most {rate.max():.3g} to {rate[-1]:.3g}."
        ),
        panels=(
            Panel("Loss, nats", draw_loss, 1.7),
            Panel("Learning rate", draw_rate, 1.1),
        ),
        tables=(_step_table(run),),
    )


# ------------------------------------------------------------------------ several runs


def runs_plots(runs: Sequence[RunData]) -> list[Plot]:
    """Test accuracy by step of several runs; a plot for each set of test images."""
    groups = by_test_set(runs)
    plots = [_runs_accuracy(*group, i, len(groups)) for i, group in enumerate(groups)]
    return [plot for plot in plots if plot]


def _runs_accuracy(data: str, runs: Sequence[RunData], number: int, of: int) -> Plot | None:
    """Runs on the same test images, under their baseline and, dotted, recomputed statistics."""
    curves = []
    for i, run in enumerate(runs):
        look = replace(LOOKS[i % len(LOOKS)], dash="-")
        curves.append((run, run.baseline, look))
        if run.recomputed and run.recomputed != run.baseline:
            dotted = replace(look, dash=(0, (1.3, 1.3)), hollow=True)
            curves.append((run, run.recomputed, dotted))
    curves = [c for c in curves if len(c[0].curve("test", c[1])[0])]
    if not curves:
        return None
    named = [(f"{run.name}, {c}", *run.curve("test", c), look) for run, c, look in curves]

    def draw(axes: Axes, narrow: bool) -> None:
        for name, x, y, look in named:
            draw_line(axes, x, 100 * y, look, name)
        axes.set_ylim(*accuracy_limits([(x, y) for _, x, y, _ in named]))
        step_axis(axes, [0, max(x.max() for _, x, _, _ in named)], narrow)

    rows = [
        [run.name, str(c), count(int(x[-1])), percent(y[-1], 2), percent(y.max(), 2)]
        for (run, c, _), (_, x, y, _) in zip(curves, named, strict=True)
    ]
    caption = (
        "Solid lines: the trained weights under each run's baseline statistics. Dotted lines with "
        "the same marker, hollow: under recomputed statistics. Where the two of one run part, its "
        "averages cost accuracy."
    )
    if of > 1 and len(runs) == 1:
        caption += f" Only {runs[0].name} has these test images: the others do not share them."
    elif of > 1:
        names = ", ".join(run.name for run in runs)
        caption += f" The runs of this plot ({names}) share their test images; the others do not."
    if different := [key for key, _ in config_differences(runs) if key.startswith("data.")]:
        caption += f" What they were trained on differs: {', '.join(different)}."
    return Plot(
        key=f"runs-{number + 1}",
        title=f"Test accuracy on {data}",
        caption=caption,
        alt="; ".join(f"{row[0]} ({row[1]}) ends at {row[3]}" for row in rows),
        panels=(Panel("Test accuracy of the trained weights, %", draw, 3.0),),
        tables=(Table("Test accuracy", ["run", "statistics", "last step", "last", "best"], rows),),
    )


# ------------------------------------------------------------------------ small parts


def _looks(conditions: Sequence[Condition]) -> dict[Condition, Look]:
    """How each condition is drawn: the best known alike in every figure."""
    known = {name: LOOKS[i] for i, name in enumerate(MAIN)}
    free = iter(LOOKS[len(MAIN) :] * 9)
    return {c: known.get(str(c)) or next(free) for c in conditions}


def unfinished(run: RunData) -> str:
    """What to say of a run instead of a verdict."""
    text = f"This run is {run.state['state']} at step {count(run.step)} and has no final comparison"
    steps, accuracy = run.curve("test", run.baseline)
    if not len(steps):
        return f"{text} yet."
    return (
        f"{text} yet. Its last test accuracy is {percent(accuracy[-1], 2)}, at step "
        f"{count(int(steps[-1]))}, for {run.label(run.baseline)}."
    )


def _points(difference: float) -> str:
    return f"{points(difference, 2)} points"


def _named(plot: Plot, panel: Panel) -> Panel:
    """The panel for a dashboard, with the names of its rows."""
    if not plot.rows:
        return panel

    def draw(axes: Axes, narrow: bool) -> None:
        panel.draw(axes, narrow)
        shown = plot.rows[:SHOWN_ROWS]
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_yticks(range(len(shown)), [end_of(name, 18) for name in shown])
        axes.grid(axis="y", visible=False)

    part = f" ({SHOWN_ROWS} of {len(plot.rows)})" if len(plot.rows) > SHOWN_ROWS else ""
    return Panel(panel.title + part, draw, panel.height)


# ------------------------------------------------------------------------ tables


def _step_table(run: RunData) -> Table:
    steps = run.steps
    x = steps["step"]
    start, end, mean, low, high = envelope(x, steps["accuracy"], TABLE_BINS)
    ema = value_at(end, x, steps["ema_accuracy"])
    loss, rate = value_at(end, x, steps["loss"]), value_at(end, x, steps["lr"])
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


def _eval_table(run: RunData, condition: Condition) -> Table:
    splits = [s for s in ("train", "val", "test") if len(run.curve(s, condition)[0])]
    curves = {s: dict(zip(*run.curve(s, condition), strict=True)) for s in splits}
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = [
        [count(int(t)), *(percent(curves[s][t], 2) if t in curves[s] else "" for s in splits)]
        for t in steps
    ]
    names = {"train": "whole training set", "val": "validation", "test": "test"}
    columns = ["step", *(names[s] for s in splits)]
    return Table(f"Accuracy of {run.label(condition)}", columns, _at_most(rows))


def _at_most(rows: list[list[str]], limit: int = 200) -> list[list[str]]:
    """Evenly chosen rows, the last one among them."""
    if len(rows) <= limit:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, limit).round().astype(int)]
