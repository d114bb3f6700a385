"""The page about one or several runs: no script, no network, no other file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup, escape

from bnexp.analysis import words
from bnexp.analysis.comparison import Comparison
from bnexp.analysis.results import Paired, Result, class_p_values
from bnexp.analysis.seeds import SeedSummary
from bnexp.analysis.verdict import ABOUT_P_VALUES, THESE_WEIGHTS, Outcome
from bnexp.atomic import write_atomically
from bnexp.condition import weights_label
from bnexp.errors import UserError
from bnexp.records import Run
from bnexp.report.drawing import PALETTE, Plot, Table, to_svg
from bnexp.report.figures import run_plots, runs_plots, unfinished
from bnexp.report.run_data import RunData
from bnexp.report.several import SeedGroup, by_test_set, config_differences, seed_groups
from bnexp.report.templates import template

# The colour beside a verdict: orange where the baseline loses, green where the two agree.
MOODS: dict[Outcome, str] = {
    "baseline-at-chance": "orange",
    "baseline-worse": "orange",
    "agree": "green",
    "identical": "green",
}


@dataclass(frozen=True)
class Figure:
    plot: Plot
    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Cell:
    """What stands in a cell of a table, and the small print below it."""

    text: str = ""
    small: str = ""


@dataclass(frozen=True)
class Section:
    """What the template shows of one run."""

    run: RunData
    anchor: str
    headline: str
    mood: str
    remarks: Sequence[str]
    tiles: Sequence[tuple[str, str, str]]
    rows: Sequence[Sequence[Cell]]
    classes: Table | None
    figures: Sequence[Figure]
    config: str
    environment: Sequence[tuple[str, str]]
    commands: str


@dataclass(frozen=True)
class Seeds:
    """What the template shows of several seeds of one config."""

    group: SeedGroup
    rows: Sequence[Sequence[Cell]]
    single: Sequence[Sequence[Cell]]
    compared: str


@dataclass(frozen=True)
class Overview:
    """What the template shows of several runs together. `differences`: key, and the value of each
    run or of several that share it."""

    rows: Sequence[Sequence[Cell]]
    test_sets: int
    differences: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    seeds: Sequence[Seeds]
    figures: Sequence[Figure]


def write_report(runs: Sequence[Run], path: Path, follow_links: bool = True) -> None:
    """Write the page about `runs` to `path`, atomically; `follow_links` as in `replacing`."""
    write_atomically(path, render([RunData.read(run) for run in runs]), follow_links)


def render(runs: Sequence[RunData]) -> str:
    """The page as text. Raises UserError if there is no run or a run is given twice."""
    if not runs:
        raise UserError("there is no run to report on")
    if len({run.path for run in runs}) < len(runs):
        raise UserError("a run is named twice")
    sections = [_section(run, f"run-{i + 1}") for i, run in enumerate(runs)]
    return template("page.html.j2", count=words.count, tidy=tidy).render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        palette=PALETTE,
        these_weights=THESE_WEIGHTS,
        about_p_values=ABOUT_P_VALUES,
        sections=sections,
        overview=_overview(runs) if len(runs) > 1 else None,
    )


def _section(run: RunData, anchor: str) -> Section:
    comparison = run.comparison
    return Section(
        run=run,
        anchor=anchor,
        headline=comparison.verdict.text if comparison else unfinished(run),
        mood=MOODS.get(comparison.verdict.outcome, "blue") if comparison else "blue",
        remarks=comparison.verdict.remarks if comparison else (),
        tiles=_tiles(run),
        rows=_rows(run, comparison) if comparison and comparison.others else (),
        classes=_classes(comparison) if comparison else None,
        figures=[figure_of(plot, anchor) for plot in run_plots(run)],
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True),
        environment=[(k, v) for k, v in _flat(run.environment) if v not in ("", "None", "[]")],
        commands=_commands(run),
    )


def figure_of(plot: Plot, prefix: str) -> Figure:
    """The plot drawn for wide and for narrow screens, its ids beginning with `prefix`."""
    plot = replace(plot, key=f"{prefix}-{plot.key}")
    return Figure(plot, Markup(to_svg(plot)), Markup(to_svg(plot, narrow=True)))


# ------------------------------------------------------------------------ one run


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the few numbers to see first."""
    tiles = []
    if comparison := run.comparison:
        shown = [comparison.base, *([comparison.compared[0]] if comparison.compared else [])]
        for result in shown:
            low, high = result.accuracy_interval
            remark = f"{weights_label(result.condition)}; 95 %: {100 * low:.2f} to {100 * high:.2f}"
            value = words.percent(result.accuracy, 2)
            tiles.append((f"test, {result.condition}", value, remark))
        if comparison.compared:
            changed = words.count(comparison.compared[1].changed)
            of = f"of {words.count(comparison.samples)}"
            tiles.append(("predictions changed", changed, of))
    elif len(found := run.curve("test", run.baseline)[1]):
        value = words.percent(float(found[-1]), 2)
        tiles.append((f"test, {run.baseline}", value, "trained weights, so far"))
    if len(run.steps["step"]):
        value = words.percent(float(run.steps["ema_accuracy"][-1]), 2)
        tiles.append(("training, EMA", value, f"decay {run.setup.ema_decay:g}"))
        steps, train = run.curve("train", run.baseline)
        if len(steps):
            value = words.percent(float(train[-1]), 2)
            tiles.append(("training, whole set", value, f"at step {words.count(int(steps[-1]))}"))
    return tiles


def _rows(run: RunData, comparison: Comparison) -> list[list[Cell]]:
    """The rows of the comparison table, the baseline's first."""
    digits = _digits(comparison.samples)
    rows = []
    for result in comparison.results:
        low, high = result.accuracy_interval
        how = result.condition.method or run.made.get(result.condition.statistics)
        label = weights_label(result.condition) + (f"; {how}" if how else "")
        name = str(result.condition) + (" (baseline)" if result is comparison.base else "")
        accuracy = words.percent(result.accuracy, digits)
        interval = f"{100 * low:.{digits}f} to {100 * high:.{digits}f}"
        rows.append(
            [
                Cell(name, label),
                Cell(accuracy, interval),
                *_paired_cells(result.versus_baseline, digits),
                _loss_cell(result),
                Cell("–" if result.ece is None else words.percent(result.ece, 2)),
            ]
        )
    return rows


def _paired_cells(pair: Paired | None, digits: int) -> list[Cell]:
    """Difference, changed predictions and p of one row."""
    if pair is None:
        return [Cell(), Cell(), Cell()]
    return [
        Cell(
            words.signed(pair.difference, digits),
            words.signed_interval(pair.difference_interval, digits),
        ),
        Cell(
            words.count(pair.changed),
            f"{words.count(pair.gained)} better, {words.count(pair.lost)} worse",
        ),
        Cell(_p(pair.p_holm)),
    ]


def _p(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _loss_cell(result: Result) -> Cell:
    pair = result.versus_baseline
    loss = "–" if result.loss is None else f"{result.loss:.4f}"
    if pair is None or pair.loss_difference is None:
        return Cell(loss)
    difference = f"{pair.loss_difference:+.4f}"
    zero = float(difference) == 0
    return Cell(loss, difference[1:] if zero else difference.replace("-", "−"))


def _digits(samples: int) -> int:
    """Decimals of a percentage that tell single ones of so many samples apart; two or more."""
    return max(2, len(str(samples - 1)) - 2)


def _classes(comparison: Comparison) -> Table | None:
    """Class, samples, accuracy under the baseline and the compared condition, changes."""
    if comparison.compared is None:
        return None
    base, (other, pair) = comparison.base, comparison.compared
    p_values = class_p_values(comparison.results)[other.condition]
    rows = []
    for i, name in enumerate(comparison.classes):
        first, second = base.class_accuracy[i], other.class_accuracy[i]
        difference = pair.class_difference[i]
        if first is None or second is None or difference is None:
            continue
        rows.append(
            [
                name,
                words.count(comparison.class_samples[i]),
                words.percent(first, 2),
                words.percent(second, 2),
                words.signed(difference, 2),
                words.count(pair.class_gained[i]),
                words.count(pair.class_lost[i]),
                _p(p_values[i]),
            ]
        )
    columns = ["class", "images", str(base.condition), str(other.condition), "difference, points"]
    return Table(
        f"{words.capital(base.label)} against {other.label}",
        [*columns, "now right", "now wrong", "p"],
        rows,
    )


def _commands(run: RunData) -> str:
    path = run.path
    lines = [
        f"bnexp train {shlex.quote(f'{path}/config.yaml')}",
        f"bnexp eval {shlex.quote(path)} --recompute-stats",
        f"bnexp report {shlex.quote(path)}",
    ]
    commit = run.environment.get("git_commit")
    return "\n".join([f"git checkout {shlex.quote(str(commit))}"] * bool(commit) + lines)


# ------------------------------------------------------------------------ several runs


def _overview(runs: Sequence[RunData]) -> Overview:
    sets = by_test_set(runs)
    differences = []
    for key, values in config_differences(runs):
        holders: dict[str, list[str]] = {}
        for run, value in zip(runs, values, strict=True):
            holders.setdefault(_value(value), []).append(run.name)
        shared = [(value, ", ".join(names)) for value, names in holders.items()]
        differences.append((key, shared))
    return Overview(
        rows=[_overview_row(run, name) for name, members in sets for run in members],
        test_sets=len(sets),
        differences=differences,
        seeds=[_seeds(group) for group in seed_groups(runs)],
        figures=[figure_of(plot, "overview") for plot in runs_plots(runs)],
    )


def _overview_row(run: RunData, test_set: str) -> list[Cell]:
    comparison = run.comparison
    row = [
        Cell(run.name, f"{run.setup.model}, seed {run.setup.seed}"),
        Cell(run.setup.data, test_set.removeprefix(run.setup.data).strip(" ()")),
        Cell(words.count(run.step), "" if comparison else run.state["state"]),
    ]
    if comparison is None:
        return [*row, *[Cell("–")] * 4]
    base = comparison.base
    row += [Cell(base.condition.weights), _accuracy_cell(base)]
    if comparison.compared is None:
        return [*row, Cell("–"), Cell("–")]
    other, pair = comparison.compared
    interval = words.signed_interval(pair.difference_interval, 2)
    return [*row, _accuracy_cell(other), Cell(words.signed(pair.difference, 2), interval)]


def _accuracy_cell(result: Result) -> Cell:
    return Cell(words.percent(result.accuracy, 2), str(result.condition))


def _seeds(group: SeedGroup) -> Seeds:
    single = []
    compared = ""
    for run in group.runs:
        if run.comparison and run.comparison.compared:
            other, pair = run.comparison.compared
            compared = f"{other.condition} less {run.comparison.baseline}"
            interval = words.signed_interval(pair.difference_interval, 2)
            p = _paired_cells(pair, 2)[-1]
            difference = Cell(words.signed(pair.difference, 2), interval)
            single.append([Cell(f"seed {run.setup.seed}", run.name), difference, p])
    return Seeds(group, [_seed_row(row) for row in group.summary], single, compared)


def _seed_row(row: SeedSummary) -> list[Cell]:
    interval = row.interval and f"{100 * row.interval[0]:.2f} to {100 * row.interval[1]:.2f}"
    deviation = row.standard_deviation
    difference = Cell()
    if row.difference is not None:
        t = row.difference_interval and words.signed_interval(row.difference_interval, 2)
        difference = Cell(words.signed(row.difference, 2), t or "")
    return [
        Cell(str(row.condition), weights_label(row.condition)),
        Cell(words.percent(row.mean, 2), interval or ""),
        Cell("" if deviation is None else f"{100 * deviation:.2f}"),
        difference,
    ]


# ------------------------------------------------------------------------ texts


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            rows.append((f"{prefix}{key}".replace("_", " "), str(value)))
    return rows


def _value(value: Any) -> str:
    return "–" if value is None else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def tidy(text: str) -> Markup:
    """Keep numbers together with their units: 91.7 %, p = 0.6."""
    text = re.sub(r"(?<=\d) (?=%)", "\u00a0", text)
    text = re.sub(r"p ([=<]) ", "p\u00a0\\1\u00a0", text)
    return Markup(escape(text))
