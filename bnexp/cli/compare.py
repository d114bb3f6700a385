"""bnexp compare"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from bnexp.analysis.results import Result
from bnexp.analysis.words import signed, signed_interval
from bnexp.cli.tables import Page, refuse_both
from bnexp.condition import weights_label
from bnexp.errors import UserError
from bnexp.records import find_run
from bnexp.report.run_data import Evaluation, RunData
from bnexp.report.several import SeedGroup, by_test_set, config_differences, seed_groups

CURVE_COLUMNS = 6


def run_compare(runs: list[str], runs_dir: Path, as_json: bool, as_markdown: bool = False) -> None:
    refuse_both(as_json, as_markdown)
    found = [find_run(name, runs_dir) for name in runs]
    if len({run.path.resolve() for run in found}) < len(found):
        raise UserError("a run is named twice")
    if len(found) < 2:
        raise UserError("name two runs or more; bnexp runs lists them")
    parsed = [RunData.read(run) for run in found]
    differences, groups = config_differences(parsed), seed_groups(parsed)
    if as_json:
        print(json.dumps(_tree(parsed, differences, groups), indent=2, allow_nan=False))
    else:
        _print(Page(as_markdown), parsed, differences, groups)


def _tree(runs: Sequence[RunData], differences, groups: Sequence[SeedGroup]) -> dict[str, Any]:
    return {
        "runs": [
            {"name": run.name, "path": run.path, "state": run.state["state"],
             "evals": [_evaluation(row) for row in run.evals],
             "comparison": run.comparison.to_dict() if run.comparison else None}
            for run in runs
        ],
        "config_differences": {
            key: dict(zip((run.name for run in runs), values, strict=True))
            for key, values in differences
        },
        "seeds": [
            {"config": group.config, "runs": [run.name for run in group.runs],
             "seeds": group.seeds, "repeated": group.repeated,
             "summary": [row.to_dict() for row in group.summary]}
            for group in groups
        ],
    }  # fmt: skip


def _evaluation(row: Evaluation) -> dict[str, Any]:
    """As in evals.csv; a loss that is no number is null."""
    found = {**asdict(row), "statistics": str(row.condition)}
    del found["condition"]
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()
    }


def _print(page: Page, runs: Sequence[RunData], differences, groups: Sequence[SeedGroup]) -> None:
    _print_differences(page, runs, differences)
    _print_curves(page, runs)
    _print_final(page, runs)
    for group in groups:
        _print_seeds(page, group)
    names = " ".join(run.path for run in runs)
    page.space()
    page.text(f"as a page with figures: bnexp report {names}", "dim")


def _table(page: Page, title: str, first: str, columns: Sequence[str]):
    """A table under the title, which is printed at once."""
    page.space()
    page.text(title, "bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_differences(page: Page, runs: Sequence[RunData], differences) -> None:
    if not differences:
        page.space()
        page.text("The configs are the same.")
        return
    table = _table(page, "where the configs differ", "key", [])
    table.add_column("value: runs")
    for key, values in differences:
        holders: dict[str, list[str]] = {}
        for run, value in zip(runs, values, strict=True):
            holders.setdefault("–" if value is None else str(value), []).append(run.name)
        table.add_row(key, "\n".join(f"{v}: {', '.join(names)}" for v, names in holders.items()))
    page.table(table)
    if len(sets := by_test_set(runs)) > 1:
        names = "; ".join(f"{name}: {', '.join(r.name for r in group)}" for name, group in sets)
        page.text(f"The runs were tested on different images. {names}.", style="yellow")


def _print_curves(page: Page, runs: Sequence[RunData]) -> None:
    curves = [dict(zip(*run.curve("test", run.baseline), strict=True)) for run in runs]
    steps = sorted(set().union(*curves))
    if len(steps) < 2:
        return
    if len(steps) > CURVE_COLUMNS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (CURVE_COLUMNS - 1))] for i in range(CURVE_COLUMNS)]
    table = _table(page, "test accuracy by step, %", "run", [f"{step:,.0f}" for step in steps])
    for run, curve in zip(runs, curves, strict=True):
        table.add_row(run.name, *(f"{100 * curve[t]:.2f}" if t in curve else "" for t in steps))
    page.table(table)


def _print_final(page: Page, runs: Sequence[RunData]) -> None:
    found = [
        {str(result.condition): result for result in run.comparison.results}
        if run.comparison
        else {}
        for run in runs
    ]
    names = list(dict.fromkeys(name for results in found for name in results))
    if not names:
        page.space()
        page.text("None of the runs has a final comparison yet.")
        return
    table = _table(
        page, "at the end, %, with the difference to the baseline in points", "run", names
    )
    for run, results in zip(runs, found, strict=True):
        table.add_row(run.name, *(_final_cell(results.get(name)) for name in names))
    page.table(table)
    bases = [(run.name, run.comparison.base.condition) for run in runs if run.comparison]
    chosen = [
        f"{name} ({weights_label(base)})" for name, base in bases if base.weights != "trained"
    ]
    if chosen:
        page.text(f"not the weights of the last step: {', '.join(chosen)}", style="dim")


def _final_cell(result: Result | None) -> str:
    if result is None:
        return "–"
    pair = result.versus_baseline
    return f"{100 * result.accuracy:.2f}" + (f" ({signed(pair.difference, 2)})" if pair else "")


def _print_seeds(page: Page, group: SeedGroup) -> None:
    columns = ("mean", "95 % interval", "std. dev.", "difference", "95 % interval")
    seeds = ", ".join(map(str, group.seeds))
    table = _table(
        page,
        f"{len(group.seeds)} seeds ({seeds}) of one config: {group.config}, %",
        "statistics",
        columns,
    )
    for row in group.summary:
        cells = [f"{100 * row.mean:.2f}", "", ""]
        if row.interval:
            cells[1] = f"{100 * row.interval[0]:.2f} to {100 * row.interval[1]:.2f}"
        if row.standard_deviation is not None:
            cells[2] = f"{100 * row.standard_deviation:.2f}"
        if row.difference is not None and row.difference_interval:
            cells += [signed(row.difference, 2), signed_interval(row.difference_interval, 2)]
        table.add_row(str(row.condition), *cells)
    page.table(table)
    page.text("t intervals of the mean over seeds; differences are paired by seed", style="dim")
    if group.repeated:
        page.text(
            f"left out, since their seed is there already: {', '.join(group.repeated)}",
            style="dim",
        )
