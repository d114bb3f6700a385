"""The page about a study: its claims, its factors, its experiments."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnexp.analysis import words
from bnexp.analysis.factors import Contrast, Levels, Score, cell_contrasts, level_contrasts
from bnexp.analysis.judged import Judged
from bnexp.analysis.paired import Verdict
from bnexp.errors import UserError
from bnexp.printable import all_printable, printable
from bnexp.reading import naming, read
from bnexp.records.study import StudyRecord
from bnexp.report.drawing import COLOUR, LOOKS, PALETTE, Panel, Plot, Table
from bnexp.report.mpl import Axes
from bnexp.report.page import Cell, Figure, figure_of, tidy
from bnexp.report.templates import template

MARKS: dict[Verdict, str] = {"supported": "✓", "contradicted": "✗", "undecided": "?"}
MAX_CELLS = 200
MAX_PANELS = 8
MAX_LINES = 5


@dataclass(frozen=True)
class Claim(Judged):
    """A claim as the page shows it."""

    @property
    def mark(self) -> str:
        return MARKS[self.verdict]

    @property
    def about(self) -> str:
        """What was compared, where, and what was expected."""
        where = f" where {self.where}" if self.where else ""
        p = "" if self.p is None else f"; {words.p_value(self.p)}"
        return (
            f"First: {self.first}; second: {self.second}; {self.measure}{where}. "
            f"Expected: {self.expect}{p}."
        )

    @property
    def values(self) -> Table | None:
        rows = [
            [str(seed), self._value(a), self._value(b)]
            for seed, a, b in zip(self.seeds, self.first_values, self.second_values, strict=False)
        ]
        return Table(self.says, ["seed", self.first, self.second], rows) if rows else None

    def _value(self, value: float | None) -> str:
        if value is None:
            return "–"
        return words.percent(value, 2) if self.unit == "points" else f"{value:.6g}"


@dataclass(frozen=True)
class Factor:
    name: str
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class ExperimentRow:
    key: str
    link: str
    cells: Sequence[str]


def render_study(record: StudyRecord) -> str:
    """The page as text. UserError where a file of the record is damaged."""
    columns, rows = record.results()
    axes = _axes(record, columns)
    scores = _scores(record, axes, rows)
    baseline = _baseline(scores)
    cells = [c for c in cell_contrasts(scores, baseline) if c.condition != baseline]
    experiments = _experiments(axes, rows)
    state = record.state
    return template("study.html.j2", count=words.count, tidy=tidy).render(
        title=printable(record.name),
        path=printable(record.path),
        palette=PALETTE,
        state=_state(state),
        claims=[_claim(record, claim) for claim in record.claims()],
        figures=_figures(axes, scores),
        factors=_factors(axes, scores),
        left_out=_left_out(experiments),
        baseline=baseline,
        cells=[_row(c, _combination(axes, c.levels)) for c in cells[:MAX_CELLS]],
        cells_left=max(0, len(cells) - MAX_CELLS),
        columns=["record", *axes, "seed", "state"],
        experiments=experiments,
        study=_printable_lines(record.text),
    )


def _axes(record: StudyRecord, columns: Sequence[str]) -> list[str]:
    if not columns:
        return []
    needed = {"experiment", "seed", "state", "condition", "accuracy"}
    if columns[0] != "experiment" or not needed <= set(columns):
        raise UserError(f"{record.path / 'results.csv'} is damaged: a column is missing")
    return list(columns[1 : columns.index("seed")])


def _scores(
    record: StudyRecord, axes: Sequence[str], rows: Sequence[Mapping[str, str]]
) -> list[Score]:
    scores = []
    for row in rows:
        if row["condition"] and row["accuracy"]:
            try:
                seed, accuracy = int(row["seed"]), float(row["accuracy"])
                if not 0 <= accuracy <= 1:
                    raise ValueError(f"{accuracy} is no accuracy")
            except ValueError as error:
                path = record.path / "results.csv"
                raise UserError(f"{path} is damaged: {printable(error)[:200]}") from None
            levels = tuple(printable(row[axis]) for axis in axes)
            scores.append(Score(levels, seed, printable(row["condition"]), accuracy))
    return scores


def _baseline(scores: Sequence[Score]) -> str:
    conditions = [score.condition for score in scores]
    return "running" if "running" in conditions or not conditions else conditions[0]


def _claim(record: StudyRecord, content: Mapping[str, Any]) -> Claim:
    with naming(record.path / "claims.json"):
        return read(Claim, all_printable(content))


def _state(state: Mapping[str, Any]) -> str:
    failed = f", {len(state['failed'])} failed" if state["failed"] else ""
    created = f", begun {printable(state['created'])[:16].replace('T', ' ')}"
    return (
        f"{printable(state['state'])}: {words.count(state['done'])} of "
        f"{words.count(state['trainings'])} trainings{failed}, which answer "
        f"{words.count(state['experiments'])} experiment{'s' * (state['experiments'] != 1)}"
        f"{created if state['created'] else ''}"
    )


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.splitlines()))


# ------------------------------------------------------------------------ tables


def _factors(axes: Sequence[str], scores: Sequence[Score]) -> list[Factor]:
    factors = []
    for i, axis in enumerate(axes):
        rows = [_row(contrast, contrast.levels[0]) for contrast in level_contrasts(scores, i)]
        if rows:
            factors.append(Factor(printable(axis), rows))
    return factors


def _combination(axes: Sequence[str], levels: Levels) -> str:
    pairs = (f"{axis.rpartition('.')[2]} {v}" for axis, v in zip(axes, levels, strict=True))
    return ", ".join(map(printable, pairs)) or "base"


def _row(contrast: Contrast, name: str) -> list[Cell]:
    interval = contrast.interval
    small = interval and f"{_percent(interval[0])} to {_percent(interval[1])}"
    difference = Cell()
    if contrast.difference is not None:
        between = contrast.difference_interval
        text = between and words.signed_interval(between, 2)
        difference = Cell(words.signed(contrast.difference, 2), text or "")
    p = contrast.p_holm
    cells = f"{contrast.cells} combinations each" if contrast.cells > 1 else ""
    return [
        Cell(name),
        Cell(contrast.condition),
        Cell(words.percent(contrast.mean, 2), small or ""),
        difference,
        Cell("" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"),
        Cell(str(contrast.seeds), cells),
    ]


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}"


def _experiments(axes: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[ExperimentRow]:
    found: dict[tuple[str, ...], ExperimentRow] = {}
    for row in rows:
        key = row["experiment"]
        cells = tuple(printable(row[name]) for name in (*axes, "seed", "state"))
        plain = key.isalnum() and key.isascii()
        link = f"experiments/{key}/" if plain else ""
        found.setdefault((key, *cells), ExperimentRow(printable(key)[:16], link, cells))
    return list(found.values())


def _left_out(experiments: Sequence[ExperimentRow]) -> str:
    """How many experiments are in no mean, for want of an accuracy; nothing where all have one."""
    states = [row.cells[-1] for row in experiments]
    found = Counter(state for state in states if state != "finished")
    if not found:
        return ""
    listed = ", ".join(f"{words.count(n)} {state}" for state, n in found.items())
    return (
        f"Without a final accuracy, and so in no mean: {words.count(found.total())} of "
        f"{words.count(len(states))} experiments ({listed})"
    )


# ------------------------------------------------------------------------ small multiples


def _figures(axes: Sequence[str], scores: Sequence[Score]) -> list[Figure]:
    """Accuracy along the axis with most levels, a line per condition, a panel per combination of
    the other axes."""
    counts = [len({score.levels[i] for score in scores}) for i in range(len(axes))]
    if not counts or max(counts) < 2:
        return []
    along = counts.index(max(counts))
    names = list(dict.fromkeys(score.levels[along] for score in scores))
    others = list(
        dict.fromkeys(score.levels[:along] + score.levels[along + 1 :] for score in scores)
    )
    conditions = list(dict.fromkeys(score.condition for score in scores))[:MAX_LINES]
    contrasts = {(c.levels, c.condition): c for c in cell_contrasts(scores, conditions[0])}
    axis, rest = axes[along], [*axes[:along], *axes[along + 1 :]]

    def find(other: Levels, level: str, condition: str) -> Contrast | None:
        return contrasts.get(((*other[:along], level, *other[along:]), condition))

    panels, tables = [], []
    for other in others[:MAX_PANELS]:
        title = _combination(rest, other) if rest else ""
        lines = {
            condition: [find(other, level, condition) for level in names]
            for condition in conditions
        }
        panels.append(_panel(title or "accuracy, %", names, lines, axis))
        columns = [axis, *itertools.chain(*((c, "95 % interval") for c in conditions))]
        tables.append(Table(title or axis, columns, _table(names, lines)))
    left = len(others) - len(panels)
    cut = f" {left} further combinations are in results.csv." if left > 0 else ""
    plot = Plot(
        key="grid",
        title=f"Test accuracy by {axis}",
        caption=(
            f"Test accuracy in per cent by {axis}: means over seeds, with 95 % t intervals where "
            f"there are several seeds. Each panel is a combination of the other axes; lines are "
            f"told apart by dash and marker.{cut}"
        ),
        alt=f"Small multiples of test accuracy by {axis}, a line per condition.",
        panels=tuple(panels),
        tables=tuple(tables),
    )
    return [figure_of(plot, "study")]


def _panel(
    title: str, names: Sequence[str], lines: Mapping[str, Sequence[Contrast | None]], axis: str
) -> Panel:
    def draw(axes: Axes, narrow: bool) -> None:
        width = 0.36 / max(1, len(lines) - 1)
        for i, (condition, contrasts) in enumerate(lines.items()):
            look = LOOKS[i]
            there = [(x, c) for x, c in enumerate(contrasts) if c is not None]
            xs = np.array([x for x, _ in there]) + (i * width - 0.18 if len(lines) > 1 else 0)
            means = np.array([100 * c.mean for _, c in there])
            colour = COLOUR[look.colour]
            axes.plot(
                xs,
                means,
                linestyle=look.dash,
                marker=look.marker,
                markersize=4.5,
                color=colour,
                markerfacecolor="none" if look.hollow else colour,
                label=condition,
            )
            for x, (_, contrast) in zip(xs, there, strict=True):
                if contrast.interval:
                    low, high = (100 * min(1.0, max(0.0, end)) for end in contrast.interval)
                    axes.vlines(x, low, high, color=colour, linewidth=1)
        shown = [name if len(name) <= 12 else f"{name[:11]}…" for name in names]
        every = max(1, -(-len(names) // (6 if narrow else 12)))
        axes.set_xticks(range(0, len(names), every), shown[::every])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(axis, loc="right", labelpad=1)

    return Panel(title, draw, height=1.5)


def _table(names: Sequence[str], lines: Mapping[str, Sequence[Contrast | None]]) -> list[list[str]]:
    rows = []
    for i, name in enumerate(names):
        row = [name]
        for contrasts in lines.values():
            contrast = contrasts[i]
            between = contrast.interval if contrast else None
            row += [
                words.percent(contrast.mean, 2) if contrast else "–",
                f"{_percent(between[0])} to {_percent(between[1])}" if between else "–",
            ]
        rows.append(row)
    return rows
