"""One self-contained HTML page about one or several runs: no script, no network, no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from bnexp.analysis import words
from bnexp.analysis.verdict import AGREEMENT, SIGNIFICANT
from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.records import Run
from bnexp.report.drawing import PALETTE, Plot, to_svg
from bnexp.report.figures import run_plots, runs_accuracy
from bnexp.report.run_data import RunData, compared_kind
from bnexp.report.several import SeedGroup, config_differences, seed_groups


@dataclass(frozen=True)
class Figure:
    plot: Plot
    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Section:
    """What the template shows of one run."""

    run: RunData
    anchor: str
    headline: str
    mood: str
    remarks: Sequence[str]
    tiles: Sequence[tuple[str, str, str]]
    kinds: Sequence[Mapping[str, Any]]
    classes: Sequence[Sequence[str]]
    classes_title: str
    figures: Sequence[Figure]
    config: str
    environment: Sequence[tuple[str, str]]
    commands: str


@dataclass(frozen=True)
class Overview:
    """What the template shows of several runs together."""

    rows: Sequence[Sequence[str]]
    differences: Sequence[tuple[str, Sequence[str]]]
    groups: Sequence[SeedGroup]
    figures: Sequence[Figure]


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page about `runs` to `path`, atomically."""
    write_atomically(path, render([RunData.read(run) for run in runs]))


def render(runs: Sequence[RunData]) -> str:
    """The page as text. Raises UserError if there is no run or a run is given twice."""
    if not runs:
        raise UserError("there is no run to report on")
    if len({run.path for run in runs}) < len(runs):
        raise UserError("a run is named twice")
    environment = Environment(
        loader=PackageLoader("bnexp.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "signed": words.signed,
        "signed_interval": words.signed_interval,
        "count": words.count,
        "p_value": words.p_value,
        "tidy": _tidy,
    }
    sections = [_section(run, f"run-{i + 1}") for i, run in enumerate(runs)]
    return environment.get_template("page.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        palette=PALETTE,
        sections=sections,
        overview=_overview(runs) if len(runs) > 1 else None,
    )


def _section(run: RunData, anchor: str) -> Section:
    comparison = run.comparison
    return Section(
        run=run,
        anchor=anchor,
        headline=comparison["verdict"] if comparison else _unfinished(run),
        mood=_mood(comparison),
        remarks=comparison["remarks"] if comparison else [],
        tiles=_tiles(run),
        kinds=comparison["kinds"] if comparison else [],
        classes=_class_rows(comparison),
        classes_title=_compared_kind(comparison),
        figures=[_figure(plot, anchor) for plot in run_plots(run)],
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True),
        environment=[(k, v) for k, v in _flat(run.environment) if v not in ("", "None", "[]")],
        commands=_commands(run),
    )


def _overview(runs: Sequence[RunData]) -> Overview:
    rows = []
    for run in runs:
        kinds = {k["name"]: k for k in run.comparison["kinds"]} if run.comparison else {}
        base = kinds.get(run.baseline)
        recomputed = kinds.get("recomputed")
        rows.append(
            [
                run.name,
                run.config["model"]["name"],
                run.config["data"]["name"],
                words.count(int(run.state.get("step") or 0)),
                words.percent(base["accuracy"], 2) if base else "–",
                words.percent(recomputed["accuracy"], 2) if recomputed else "–",
                words.signed(recomputed["versus_baseline"]["difference"])
                if recomputed and recomputed["versus_baseline"]
                else "–",
            ]
        )
    plot = runs_accuracy(runs)
    return Overview(
        rows=rows,
        differences=[
            (key, [_value(value) for value in values]) for key, values in config_differences(runs)
        ],
        groups=seed_groups(runs),
        figures=[_figure(plot, "overview")] if plot else [],
    )


def _figure(plot: Plot, prefix: str) -> Figure:
    plot = replace(plot, key=f"{prefix}-{plot.key}")
    return Figure(plot, Markup(to_svg(plot)), Markup(to_svg(plot, narrow=True)))


def _unfinished(run: RunData) -> str:
    state, step = run.state.get("state", "unknown"), int(run.state.get("step") or 0)
    tests = [row for row in run.evals if row["split"] == "test"]
    text = f"This run is {state} at step {words.count(step)} and has no final comparison yet."
    if tests:
        last = [row for row in tests if row["statistics"] == run.baseline][-1]
        text += (
            f" Its last test accuracy is {words.percent(last['accuracy'], 2)}, at step "
            f"{words.count(last['step'])}."
        )
    return text


def _mood(comparison: Mapping[str, Any] | None) -> str:
    """The colour of the verdict: orange for a cost of the baseline, green for an agreement."""
    name = _compared_kind(comparison)
    if not name:
        return "blue"
    paired = next(k for k in comparison["kinds"] if k["name"] == name)["versus_baseline"]
    if paired["p_holm"] < SIGNIFICANT:
        return "orange" if paired["difference"] > 0 else "blue"
    agree = max(map(abs, paired["difference_interval"])) <= AGREEMENT
    return "green" if agree else "blue"


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the few numbers to see first."""
    tiles = []
    if run.comparison:
        for kind in run.comparison["kinds"]:
            if kind["name"] in (run.baseline, "recomputed"):
                low, high = kind["accuracy_interval"]
                value = words.percent(kind["accuracy"], 2)
                interval = f"95 %: {100 * low:.2f} to {100 * high:.2f}"
                tiles.append((f"test, {kind['name']}", value, interval))
                if paired := kind["versus_baseline"]:
                    changed = sum(paired[k] for k in ("gained", "lost", "wrong_to_other_wrong"))
                    of = f"of {words.count(run.comparison['samples'])}"
                    tiles.append(("predictions changed", words.count(changed), of))
    elif len(found := run.curve("test", run.baseline)[1]):
        tiles.append((f"test, {run.baseline}", words.percent(float(found[-1]), 2), "so far"))
    if len(run.steps["step"]):
        decay = run.config["training"]["ema_accuracy_decay"]
        value = words.percent(float(run.steps["ema_accuracy"][-1]), 2)
        tiles.append(("training, EMA", value, f"decay {decay:g}"))
        steps, train = run.curve("train", run.baseline)
        if len(steps):
            value = words.percent(float(train[-1]), 2)
            tiles.append(("training, whole set", value, f"at step {words.count(int(steps[-1]))}"))
    return tiles


def _compared_kind(comparison: Mapping[str, Any] | None) -> str | None:
    return compared_kind(k["name"] for k in comparison["kinds"][1:]) if comparison else None


def _class_rows(comparison: Mapping[str, Any] | None) -> list[list[str]]:
    """Class, samples, accuracy under the baseline and the compared kind, changes."""
    name = _compared_kind(comparison)
    if not name:
        return []
    base = comparison["kinds"][0]
    other = next(kind for kind in comparison["kinds"] if kind["name"] == name)
    paired = other["versus_baseline"]
    rows = []
    for i, label in enumerate(comparison["classes"]):
        if comparison["class_samples"][i]:
            rows.append(
                [
                    label,
                    words.count(comparison["class_samples"][i]),
                    words.percent(base["class_accuracy"][i]),
                    words.percent(other["class_accuracy"][i]),
                    words.signed(paired["class_difference"][i]),
                    str(paired["class_gained"][i]),
                    str(paired["class_lost"][i]),
                ]
            )
    return rows


def _commands(run: RunData) -> str:
    lines = []
    if commit := run.environment.get("git_commit"):
        lines.append(f"git checkout {commit}")
    lines.append(f"bnexp train {run.path}/config.yaml")
    lines.append(f"bnexp eval {run.path} --recompute-stats")
    lines.append(f"bnexp report {run.path}")
    return "\n".join(lines)


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


def _tidy(text: str) -> Markup:
    """Keep numbers together with their units: 10 000, 91.7 %, p = 0.6."""
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d)|%)", "\u00a0", text)
    text = re.sub(r"p ([=<]) ", "p\u00a0\\1\u00a0", text)
    return Markup(escape(text))
