"""What the figures show, read back from matplotlib's artists, and what they say."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from example import LAYERS, make_run
from hypothesis import given
from hypothesis import strategies as st

from bnexp.condition import Condition
from bnexp.report import write_results_png
from bnexp.report.drawing import COLOUR, LOOKS, NARROW, WIDE, Panel, Plot, build, spread, to_svg
from bnexp.report.figures import run_plots, runs_plots, save_plots
from bnexp.report.layers import MAX_LAYERS
from bnexp.report.run_data import RunData


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder):
    return RunData.read(make_run(folder, steps=3000, cost=0.03))


@pytest.fixture(scope="module")
def plots(run):
    return {plot.key: plot for plot in run_plots(run)}


def test_a_full_run_has_every_figure(plots):
    keys = ["accuracy", "statistics", "estimators", "comparison", "layers", "rate"]
    assert list(plots) == keys
    for plot in plots.values():
        assert plot.title
        assert len(plot.caption) > 60
        assert len(plot.alt) > 30


@pytest.mark.parametrize("narrow", [False, True])
def test_curves_hold_the_logged_numbers(run, plots, narrow):
    axes = build(plots["statistics"], narrow).axes[0]
    lines = dict(zip(axes.get_legend_handles_labels()[1], axes.lines, strict=True))
    assert list(lines) == ["running", "recomputed", "batch"]
    for kind, line in lines.items():
        rows = [r for r in run.evals if r.split == "test" and r.condition == Condition(kind)]
        x, y = line.get_data()
        assert list(x) == [r.step for r in rows]
        assert list(y) == pytest.approx([100 * r.accuracy for r in rows])


def test_the_ema_is_compared_with_what_it_stands_in_for(run, plots):
    distances = []
    for row in run.evals:
        if row.split == "train":
            distances.append(run.steps["ema_accuracy"][row.step - 1] - row.accuracy)
    caption = plots["accuracy"].caption
    assert f"{100 * np.abs(distances).mean():.2f} points off on average over 20" in caption
    drawn = build(plots["accuracy"]).axes[1].lines[-1].get_ydata()
    assert list(drawn) == pytest.approx([100 * d for d in distances])


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_augmentation_is_told_of_runs_that_have_it(folder, augmented, train):
    data = {
        "name": "digits",
        "val_fraction": 0.0,
        "augment": {"crop_padding": 0, "flip": augmented},
    }
    name = f"augmented-{augmented}-{train}"
    run = RunData.read(make_run(folder, name, steps=300, train=train, data=data))
    caption = run_plots(run)[0].caption
    assert ("augmented images" in caption) == (augmented and train)
    assert ("with augmentation" in caption) == augmented


def test_captions_hold_of_runs_that_go_wrong_too(folder):
    run = make_run(folder, "wrong", steps=300, samples=20)
    rows = (run.path / "steps.csv").read_text().splitlines()
    *first, _, accuracy, ema = rows[-1].split(",")
    rows[-1] = ",".join([*first, "1000", accuracy, ema])
    (run.path / "steps.csv").write_text("\n".join(rows) + "\n")
    plots = {plot.key: plot for plot in run_plots(RunData.read(run))}
    assert "to 1e+03" in plots["rate"].alt and "falls" not in plots["rate"].alt
    assert "far narrower" not in plots["comparison"].caption


@pytest.mark.parametrize(("scale", "top"), [(1e7, 1e6), (1e-8, 1e-9)])
def test_the_axis_of_the_learning_rate_has_its_power_of_ten_at_each_number(folder, scale, top):
    run = RunData.read(make_run(folder, f"rate-{scale}", steps=300))
    run = dataclasses.replace(run, steps={**run.steps, "lr": run.steps["lr"] * scale})
    (plot,) = (plot for plot in run_plots(run) if plot.key == "rate")
    figure = build(plot)
    figure.canvas.draw()
    axis = figure.axes[1].yaxis
    assert axis.get_offset_text().get_text() == ""
    numbers = [float(label.get_text()) for label in axis.get_majorticklabels()]
    assert numbers == pytest.approx(list(axis.get_majorticklocs()))
    assert max(numbers) == pytest.approx(top, rel=0.5)


def test_without_whole_train_accuracy_the_caption_says_how_to_get_it(folder):
    run = RunData.read(make_run(folder, name="no-train-1", train=False))
    plot = run_plots(run)[0]
    assert len(plot.panels) == 1
    assert "set test.train_accuracy" in plot.caption


def test_extremes_of_a_long_run_are_drawn(folder):
    made = make_run(folder, name="spike-1", steps=5000)
    run = RunData.read(made)
    run.steps["accuracy"][3210] = 0.123
    plot = run_plots(run)[0]
    band = build(plot).axes[0].collections[0]
    lowest = band.get_paths()[0].vertices[:, 1]
    assert np.isclose(lowest, 12.3).any()


def test_every_layer_has_its_row(plots):
    figure = build(plots["layers"])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == list(reversed(LAYERS))  # the furthest first
    x = figure.axes[0].lines[0].get_xdata()
    assert list(x) == pytest.approx([0.06, 0.04, 0.02])
    assert "classifier.norm" in plots["layers"].caption


def at_the_end(run, kind):
    rows = [r for r in run.evals if (r.split, r.condition) == ("test", Condition(kind))]
    return rows[-1].accuracy


def test_the_distance_from_the_test_accuracy_is_said_against_recomputed_statistics(
    run, plots, folder
):
    ema = run.steps["ema_accuracy"][-1]
    caption = plots["accuracy"].caption
    for kind, name in (("running", "averages (decay 0.9)"), ("recomputed", "statistics (exact)")):
        value = at_the_end(run, kind)
        distance = f"{100 * (value - ema):+.2f}".replace("-", "−")
        assert f"{100 * value:.2f} % with {kind} {name}, {distance} points from the EMA" in caption
    assert "is not the generalization gap" in caption


def test_the_better_average_is_the_one_closest_to_recomputed_statistics(run, plots):
    away = {}
    _, recomputed = run.curve("test", Condition("recomputed"))
    for kind in ("running", "ema-0.99"):
        away[kind] = 100 * np.abs(run.curve("test", Condition(kind))[1] - recomputed).mean()
    assert away["running"] < away["ema-0.99"]  # as the example has it
    caption = plots["estimators"].caption
    assert f"Here that was running, {away['running']:.2f} points away on average" in caption
    assert f"furthest was ema-0.99, {away['ema-0.99']:.2f} points away" in caption
    assert plots["estimators"].panels[1].title == "Difference to recomputed, points"
    lower = build(plots["estimators"]).axes[1]
    lines = {line.get_label(): line.get_ydata() for line in lower.lines}
    _, slow = run.curve("test", Condition("ema-0.99"))
    assert list(lines["ema-0.99"]) == pytest.approx(list(100 * (slow - recomputed)))


def test_the_worst_moment_of_the_running_averages_is_named(run, plots):
    cost = run.curve("test", Condition("recomputed"))[1] - run.curve("test", run.baseline)[1]
    steps = run.curve("test", run.baseline)[0]
    words = f"at step {steps[cost.argmax()]:,.0f}: {100 * cost.max():.2f} points"
    assert words in plots["statistics"].caption


def test_costs_of_layers_are_shown_in_both_directions(folder):
    run = RunData.read(make_run(folder, name="costs-1", costs=True))
    plot = next(plot for plot in run_plots(run) if plot.key == "costs")
    mended, spoiled = build(plot).axes
    assert plot.rows == ("classifier.norm", "features.norm1", "features.norm0")  # dearest first
    assert [line.get_xdata()[0] for line in mended.lines[1:]] == pytest.approx([2.0, 1.0, 0.0])
    assert [line.get_xdata()[0] for line in spoiled.lines[1:]] == pytest.approx([-20, -10, 0])
    assert "most is lost by classifier.norm: −20.00 points (−20.50 to −19.50)" in plot.caption
    assert "most is gained by classifier.norm: +2.00 points" in plot.caption
    assert "on 500 of the 2,000 test images" in plot.caption
    assert "Shown are" not in plot.caption
    assert plot.tables[0].rows[0][1:] == [
        "+2.00", "+1.50 to +2.50", "40", "−20.00", "−20.50 to −19.50", "40"
    ]  # fmt: skip


def test_how_many_of_all_layers_are_shown_is_said(folder):
    run = RunData.read(make_run(folder, name="many-layers-1", costs=True))
    rows = run.comparison.layers[Condition("recomputed")]
    rows *= 15
    rows += [
        dataclasses.replace(rows[0], name=f"free{i}", mended=None, spoiled=None) for i in (1, 2)
    ]
    plots = {plot.key: plot for plot in run_plots(run)}
    assert f"Shown are {MAX_LAYERS} of 47 layers" in plots["layers"].caption
    assert f"45 of 47 layers were tried. Shown are {MAX_LAYERS} of 45" in plots["costs"].caption
    del rows[5:-2]
    costs = next(plot for plot in run_plots(run) if plot.key == "costs")
    assert "5 of 7 layers were tried." in costs.caption
    assert "Shown" not in costs.caption


def test_a_condition_far_below_does_not_flatten_the_others(folder):
    run = RunData.read(make_run(folder, name="chance-1", cost=1.0))
    plot = next(plot for plot in run_plots(run) if plot.key == "comparison")
    axes = build(plot).axes[0]
    assert axes.get_xlim()[0] > 50
    assert axes.get_xlim()[1] <= 100.5
    written = [text.get_text() for text in axes.texts]
    assert written == [f"{100 * run.comparison.base.accuracy:.2f} %"]
    assert "given as a number" in plot.caption


def test_a_run_without_batch_normalization_and_one_just_begun(folder):
    plain = RunData.read(make_run(folder, name="plain-1", kinds=("running",)))
    assert [plot.key for plot in run_plots(plain)] == ["accuracy", "rate"]
    empty = RunData.read(make_run(folder, name="empty-1", steps=0, evaluations=0, finished=False))
    assert run_plots(empty) == []


def test_a_diverged_run_is_drawn_and_said(folder):
    run = RunData.read(make_run(folder, name="nan-1", finished=False))
    run.steps["loss"][700:] = np.nan
    plot = run_plots(run)[-1]
    assert "From step 701 on the loss is not finite" in plot.caption
    build(plot)


@pytest.mark.parametrize("narrow", [False, True])
def test_svg_follows_the_theme_and_keeps_its_numbers(plots, narrow):
    ids = []
    for plot in plots.values():
        svg = to_svg(plot, narrow)
        root = ET.fromstring(svg.replace("xlink:", ""))
        for colour in COLOUR.values():
            assert colour not in svg
        assert "var(--ink)" in svg
        assert not re.search(r"https?://(?!www\.w3\.org)", svg)
        assert "DejaVu" not in svg
        texts = {element.text for element in root.iter() if element.tag.endswith("text")}
        figure = build(plot, narrow)
        for axes in figure.axes:
            low, high = sorted(axes.get_ylim())
            ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
            wanted = {label.get_text() for tick, label in ticks if low <= tick <= high} - {""}
            assert wanted <= texts
        found = re.findall(r' id="([^"]+)"', svg)
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert used == set(found)
        ids += found
    assert len(ids) == len(set(ids))


def test_small_numbers_on_an_axis_are_not_cut():
    def draw(axes, narrow):
        axes.plot([0, 1], [0, 0.0045])

    svg = to_svg(Plot("small", "", "", "", (Panel("Small", draw),)))
    assert ">0.004<" in svg


def test_names_with_dollars_and_markup_stay_as_they_are():
    def draw(axes, narrow):
        axes.plot([0], [0], label="$x_1$ <b>&")

    svg = to_svg(Plot("odd", "", "", "", (Panel("a $ b $", draw),)))
    texts = [element.text for element in ET.fromstring(svg).iter() if element.text]
    assert any("$x_1$ <b>&" in text for text in texts)
    assert any("a $ b $" in text for text in texts)


def test_files_and_dashboard(run, folder, tmp_path):
    for file_format, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        paths = save_plots(run, tmp_path, file_format)
        assert len(paths) == 6
        assert all(path.read_bytes().startswith(start) for path in paths)
    made = make_run(folder, name="dashboard-1", steps=300)
    write_results_png(made)
    assert (made.path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_left_as_it_was(plots):
    before = dict(matplotlib.rcParams)
    to_svg(plots["rate"])
    assert dict(matplotlib.rcParams) == before


def test_several_runs_share_a_plot(folder):
    runs = [
        RunData.read(make_run(folder, name=f"many-{i}", seed=i, kinds=("running", "recomputed")))
        for i in range(3)
    ]
    (plot,) = runs_plots(runs)
    labels = build(plot).axes[0].get_legend_handles_labels()[1]
    kinds = ("running", "recomputed")
    assert labels == [f"many-{i}, {kind}" for i in range(3) for kind in kinds]
    assert len(plot.tables[0].rows) == 6


def test_runs_tested_on_different_images_are_never_on_one_axis(folder):
    base = {"name": "fashion-mnist", "val_fraction": 0.0, "limit": {"train": None, "test": None}}
    data = [
        base,
        {**base, "limit": {"train": None, "test": 500}},
        {**base, "val_fraction": 0.1},
        {**base, "name": "mnist"},
    ]
    runs = [
        RunData.read(make_run(folder, name=f"data-{i}", steps=50, evaluations=3, data=changes))
        for i, changes in enumerate(data)
    ]
    plots = runs_plots(runs)
    assert [plot.title.removeprefix("Test accuracy on ") for plot in plots] == [
        "fashion-mnist (data.limit.test all)",
        "fashion-mnist (data.limit.test 500)",
        "mnist",
    ]
    together = build(plots[0]).axes[0].get_legend_handles_labels()[1]
    assert {label.partition(",")[0] for label in together} == {"data-0", "data-2"}
    assert "What they were trained on differs: data.val_fraction" in plots[0].caption
    assert "the others do not" in plots[1].caption


def test_images_that_changed_between_runs_are_other_images(folder):
    made = [make_run(folder, name=f"images-{i}", steps=50, evaluations=3) for i in range(3)]
    assert len(runs_plots([RunData.read(run) for run in made])) == 1
    for run, hashes in zip(made, (["a"], ["a"], ["b"]), strict=True):
        run.write_json("data.json", {"splits": {"test": {"hashes": hashes}}})
    plots = runs_plots([RunData.read(run) for run in made])
    assert [plot.title for plot in plots] == [
        "Test accuracy on fashion-mnist (the images of images-0)",
        "Test accuracy on fashion-mnist (the images of images-2)",
    ]


# ------------------------------------------------------------------------ without colour


def test_any_two_looks_differ_in_dash_or_marker():
    assert len({(look.dash, look.marker) for look in LOOKS}) == len(LOOKS)


@pytest.mark.parametrize("narrow", [False, True])
def test_lines_are_told_apart_without_colour(folder, narrow):
    """By dash, marker, fill or width, in every axes of every figure."""
    estimators = tuple(f"e{i}" for i in range(12))
    kinds = ("running", *estimators, "recomputed", "batch", "swa/recomputed", "swa/running")
    run = RunData.read(make_run(folder, name=f"kinds-{narrow}", steps=300, kinds=kinds))
    others = [RunData.read(make_run(folder, f"o{i}-{narrow}", 60, evaluations=3)) for i in range(9)]
    for plot in [*run_plots(run), *runs_plots(others)]:
        for axes in build(plot, narrow).axes:
            lines = [line for line in axes.lines if not line.get_label().startswith("_")]
            looks = {
                (
                    str(line._dash_pattern),
                    line.get_marker(),
                    line.get_markerfacecolor() == "none",
                    line.get_linewidth(),
                )
                for line in lines
            }
            assert len(looks) == len(lines), plot.key


def test_lines_bear_their_names_at_their_ends_in_the_order_they_end(plots):
    figure = build(plots["statistics"])
    upper, lower = figure.axes
    assert upper.get_legend() is None
    assert lower.get_legend() is None
    for axes in (upper, lower):
        box = axes.get_position()
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        ends = sorted((line.get_ydata()[-1], line.get_label()) for line in lines)
        names = {label for _, label in ends}
        inches = figure.get_size_inches()[1]
        texts = [
            text for text in figure.texts
            if text.get_text() in names
            and box.y0 * inches <= text.get_position()[1] <= box.y1 * inches
        ]  # fmt: skip
        texts.sort(key=lambda text: text.get_position()[1])
        assert [text.get_text() for text in texts] == [label for _, label in ends]
    assert build(plots["statistics"], narrow=True).axes[0].get_legend() is not None


@given(st.lists(st.floats(0, 2), min_size=1, max_size=12), st.floats(0.05, 0.15))
def test_names_are_spread_in_order_apart_and_within(wanted, apart):
    wanted = sorted(wanted)
    found = spread(wanted, apart, 0.0, 2.0)
    assert all(b - a >= apart - 1e-9 for a, b in itertools.pairwise(found))
    assert found[0] >= -1e-9
    assert found[-1] <= 2 + 1e-9
    if all(b - a >= apart for a, b in itertools.pairwise(wanted)):
        assert found == pytest.approx(wanted)


@pytest.mark.parametrize("narrow", [False, True])
def test_nothing_reaches_beyond_the_picture(folder, narrow):
    kinds = (
        "running",
        "a-rather-long-name-of-an-estimator-someone-chose",
        "ema-0.99",
        "recomputed",
    )
    run = RunData.read(make_run(folder, f"a-run-with-quite-a-long-name-{narrow}", 60, kinds=kinds))
    for plot in [*run_plots(run), *runs_plots([run, run])]:
        figure = build(plot, narrow)
        figure.canvas.draw()
        texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
        for legend in filter(None, (axes.get_legend() for axes in figure.axes)):
            texts += legend.get_texts()
        for text in texts:
            box = text.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
            assert box.x1 < (NARROW if narrow else WIDE) + 0.05, (plot.key, text.get_text())


@pytest.mark.parametrize("backend", ["module://no_such.backend", "nonsense", "agg"])
def test_someones_backend_does_not_matter(backend):
    code = "import bnexp.report.page, os; print(os.environ['MPLBACKEND'])"
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == backend


def test_pictures_do_not_depend_on_someones_matplotlibrc(plots):
    svg = to_svg(plots["rate"])
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.grid": False}):
        assert to_svg(plots["rate"]) == svg


def test_long_layer_names_are_whole_where_narrow_and_keep_their_end_where_wide(folder):
    run = RunData.read(make_run(folder, name="deep-1"))
    name = "features.denseblock4.denselayer16.norm2"
    for rows in run.comparison.layers.values():
        rows[0] = dataclasses.replace(rows[0], name=name)
    plot = next(plot for plot in run_plots(run) if plot.key == "layers")
    assert any(text.get_text() == name for text in build(plot, narrow=True).axes[0].texts)
    (shown, *_) = [label.get_text() for label in build(plot).axes[0].get_yticklabels()]
    assert shown == "…enseblock4.denselayer16.norm2"
