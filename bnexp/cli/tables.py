"""The tables that more than one command prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bnexp.analysis.verdict import p_value
from bnexp.condition import compared_kind

if TYPE_CHECKING:
    from bnexp.analysis.comparison import Comparison, KindResult

PIPE_WIDTH = 160
WIDE = 100
# The columns of the main table, and how wide a terminal each of them needs.
KIND_COLUMNS = (
    ("accuracy %", 0),
    ("95 % interval", 90),
    ("loss", WIDE),
    ("difference", 0),
    (" 95 % interval", 0),
    ("changed", 76),
    ("p", 0),
)


def output() -> Console:
    """Standard output; wide where nobody looks at it in a terminal, so that no cell is cut."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def print_comparison(comparison: Comparison, layers: int = 0) -> None:
    """Print the verdict, one row per kind of statistics, and the furthest layers, to stdout."""
    console = output()
    console.print(f"\n[bold]{comparison.verdict}[/bold]\n", soft_wrap=not console.is_terminal)
    _print_kinds(console, comparison)
    if layers and (kind := compared_kind(comparison.layers)):
        _print_drift(console, kind, comparison.layers[kind][:layers], comparison.baseline)
    console.print()


def _print_kinds(console: Console, comparison: Comparison) -> None:
    shown = [column for column, width in KIND_COLUMNS if console.width >= width]
    table = _table(console, f"{comparison.samples:,} test images")
    table.add_column("statistics", no_wrap=True)
    for column in shown:
        table.add_column(column.strip(), justify="right", no_wrap=True)
    for kind in comparison.kinds:
        cells = _cells(kind)
        table.add_row(kind.name, *(cells[column] for column in shown))
    console.print(table)
    if len(comparison.kinds) > 1:
        corrected = ", corrected for testing several kinds (Holm)"
        several = corrected if len(comparison.kinds) > 2 else ""
        console.print(
            f"difference to {comparison.baseline}, in points; changed: predictions that differ "
            f"from its; p: exact McNemar test{several}.",
            style="dim",
        )


def _table(console: Console, title: str) -> Table:
    gap = 2 if console.width >= WIDE else 1
    return Table(
        title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), pad_edge=False
    )


def _cells(kind: KindResult) -> dict[str, str]:
    low, high = kind.accuracy_interval
    cells = dict.fromkeys((column for column, _ in KIND_COLUMNS), "")
    cells |= {
        "accuracy %": f"{100 * kind.accuracy:.2f}",
        "95 % interval": f"{100 * low:.2f} … {100 * high:.2f}",
        "loss": "–" if kind.loss is None else f"{kind.loss:.4f}",
    }
    if paired := kind.versus_baseline:
        low, high = paired.difference_interval
        cells |= {
            "difference": f"{100 * paired.difference:+.2f}",
            " 95 % interval": f"{100 * low:+.2f} … {100 * high:+.2f}",
            "changed": f"{paired.changed}",
            "p": p_value(paired.p_holm).removeprefix("p = ").removeprefix("p "),
        }
    return cells


def _print_drift(console: Console, kind: str, rows: list[dict], baseline: str) -> None:
    table = _table(console, f"\nlayers whose {baseline} statistics are furthest from {kind}")
    table.add_column("layer", overflow="fold")
    columns = {
        "mean off by": lambda row: f"{row['mean_drift']:.3f} σ",
        "at worst": lambda row: (
            f"{row['worst_mean_drift']:.3f} σ (channel {row['worst_mean_channel']})"
        ),
        "log variance ratio": lambda row: f"{row['log_var_drift']:.3f}",
        " at worst": lambda row: (
            f"{row['worst_log_var_drift']:.3f} (channel {row['worst_var_channel']})"
        ),
    }
    if console.width < WIDE:
        columns = {name: cell for name, cell in columns.items() if "worst" not in name}
    if "difference" in rows[0]:
        columns["points if exchanged alone"] = lambda row: f"{100 * row['difference']:+.2f}"
    for column in columns:
        table.add_column(column.strip(), justify="right")
    for row in rows:
        table.add_row(row["name"], *(cell(row) for cell in columns.values()))
    console.print(table)
