"""bnexp runs"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bnexp.cli.terminal import output
from bnexp.errors import UserError
from bnexp.printable import printable
from bnexp.records import Run, all_runs
from bnexp.records.experiment import described_data
from bnexp.records.study import StudyRecord, all_studies


def run_runs(folder: Path, as_json: bool) -> None:
    rows = [_describe_or_damaged(run) for run in all_runs(folder)]
    studies = [_describe_study(record) for record in all_studies(folder)]
    if as_json:
        print(json.dumps([*rows, *studies], indent=2, allow_nan=False))
        return
    if not rows and not studies:
        print(f"no runs in {folder}/ yet; train one: bnexp train digits")
        return
    if rows:
        _print(rows)
    if studies:
        _print_studies(studies)


def _describe_study(record: StudyRecord) -> dict[str, Any]:
    """`step` of `total_steps` are trainings that have an answer."""
    found = {"name": record.name, "path": str(record.path), "study": True}
    try:
        state = record.state
    except UserError:
        unknown = dict.fromkeys(("experiments", "step", "total_steps", "failed", "created"))
        return {**found, "state": "damaged", **unknown}
    return {
        **found,
        "state": state["state"],
        "experiments": state["experiments"],
        "step": state["done"],
        "total_steps": state["trainings"],
        "failed": len(state["failed"]),
        "created": state["created"],
    }


def _print_studies(studies: list[dict[str, Any]]) -> None:
    console = output()
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("study", "experiments", "trainings", "state", "when"):
        table.add_column(column, justify="right" if column.endswith("s") else "left")
    for row in studies:
        failed = f", {row['failed']} failed" if row["failed"] else ""
        cells = (
            row["name"],
            "–" if row["experiments"] is None else f"{row['experiments']:,}",
            _steps(row["step"], row["total_steps"]),
            f"{row['state']}{failed}",
            (row["created"] or "–")[:16].replace("T", " "),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)


def _describe_or_damaged(run: Run) -> dict[str, Any]:
    try:
        return describe(run)
    except (UserError, LookupError, TypeError):
        fields = ("data", "model", "step", "total_steps", "test_accuracy", "created")
        unknown = dict.fromkeys(fields)
        return {"name": run.name, "path": str(run.path), "state": "damaged", **unknown}


def describe(run: Run) -> dict[str, Any]:
    """What `bnexp runs` says of a run; `test_accuracy` is None before the first evaluation."""
    config, state = run.config, run.state
    return {
        "name": run.name,
        "path": str(run.path),
        "data": described_data(config["data"]),
        "model": config["model"]["name"],
        "step": state.get("step"),
        "total_steps": state.get("total_steps"),
        "state": state["state"],
        "test_accuracy": _test_accuracy(run),
        "created": run.environment.get("created"),
    }


def _test_accuracy(run: Run) -> float | None:
    """Under the baseline, at the last evaluation."""
    if comparison := run.comparison():
        return comparison["kinds"][0]["accuracy"]
    rows = [row for row in run.evals() if row["split"] == "test"]
    if not rows:
        return None
    last = rows[-1]["step"]
    return next(row["accuracy"] for row in rows if row["step"] == last)


def _print(rows: list[dict[str, Any]]) -> None:
    console = output()
    with_time = console.width >= 90
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run", no_wrap=True)
    for column in ("data", "model"):
        table.add_column(column, overflow="fold", min_width=8)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("state")
    table.add_column("test", justify="right", no_wrap=True)
    if with_time:
        table.add_column("when", no_wrap=True)
    for row in rows:
        accuracy = row["test_accuracy"]
        cells = (
            row["name"],
            row["data"] or "–",
            row["model"] or "–",
            _steps(row["step"], row["total_steps"]),
            row["state"],
            "–" if accuracy is None else f"{accuracy:.2%}",
            *[(row["created"] or "–")[:16].replace("T", " ")] * with_time,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))  # a stranger's, no markup
    console.print(table)


def _steps(step: int | None, total: int | None) -> str:
    if step is None:
        return "–"
    return f"{step}" if total in (None, step) else f"{step}/{total}"
