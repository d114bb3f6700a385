"""What the figures show, read back from matplotlib's artists, and what they say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from example import LAYERS, make_run

from bnexp.report import write_results_png
from bnexp.report.drawing import COLOUR, Panel, Plot, build, to_svg
from bnexp.report.figures import run_plots, runs_accuracy, save_plots
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
    for kind, label in (
        ("running", "running"),
        ("recomputed", "recomputed"),
        ("batch", "mini-batch"),
    ):
        rows = [r for r in run.evals if r["split"] == "test" and r["statistics"] == kind]
        x, y = lines[label].get_data()
        assert list(x) == [r["step"] for r in rows]
        assert list(y) == pytest.approx([100 * r["accuracy"] for r in rows])


def test_the_ema_is_compared_with_what_it_stands_in_for(run, plots):
    distances = []
    for row in run.evals:
        if row["split"] == "train":
            ema = run.steps["ema_accuracy"][row["step"] - 1]
            distances.append(ema - row["accuracy"])
    caption = plots["accuracy"].caption
    assert f"{100 * np.abs(distances).mean():.2f} points off on average over 20" in caption
    drawn = build(plots["accuracy"]).axes[1].lines[-1].get_ydata()
    assert list(drawn) == pytest.approx([100 * d for d in distances])


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


def test_costs_of_layers_get_a_panel_of_their_own(folder):
    run = RunData.read(make_run(folder, name="costs-1"))
    for rows in run.comparison["layers"].values():
        for i, row in enumerate(rows):
            row |= {"difference": 0.01 * i, "interval": [0.01 * i - 0.005, 0.01 * i + 0.005]}
    layers = next(plot for plot in run_plots(run) if plot.key == "layers")
    assert len(layers.panels) == 3
    points = [line.get_xdata()[0] for line in build(layers).axes[2].lines[1:]]
    assert points == pytest.approx([0.0, 1.0, 2.0])


def test_a_kind_at_chance_does_not_flatten_the_others(folder):
    run = RunData.read(make_run(folder, name="chance-1", cost=1.0))
    plot = next(plot for plot in run_plots(run) if plot.key == "comparison")
    axes = build(plot).axes[0]
    assert axes.get_xlim()[0] > 50
    assert any("at chance" in text.get_text() for text in axes.texts)
    assert "at chance" in plot.caption


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
    plot = runs_accuracy(runs)
    labels = build(plot).axes[0].get_legend_handles_labels()[1]
    assert labels == ["many-0", "many-1", "many-2"]
    assert len(plot.tables[0].rows) == 6


def test_long_layer_names_are_whole_where_narrow_and_keep_their_end_where_wide(folder):
    run = RunData.read(make_run(folder, name="deep-1"))
    name = "features.denseblock4.denselayer16.norm2"
    for rows in run.comparison["layers"].values():
        rows[0]["name"] = name
    plot = next(plot for plot in run_plots(run) if plot.key == "layers")
    assert any(text.get_text() == name for text in build(plot, narrow=True).axes[0].texts)
    (shown, *_) = [label.get_text() for label in build(plot).axes[0].get_yticklabels()]
    assert shown == "…enseblock4.denselayer16.norm2"
