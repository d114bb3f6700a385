"""The tables that more than one command prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bnexp.evaluation.kinds import compared_kind
from bnexp.evaluation.verdict import p_value

if TYPE_CHECKING:
    from bnexp.evaluation.comparison import Comparison, KindResult

PIPE_WIDTH = 160
WIDE = 100


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
    with_loss = console.width >= WIDE
    table = _table(console, f"{comparison.samples:,} test images")
    columns = ["accuracy %", "95 % interval", "loss", "difference", "95 % interval", "changed", "p"]
    table.add_column("statistics", no_wrap=True)
    for column in columns:
        if column != "loss" or with_loss:
            table.add_column(column, justify="right", no_wrap=True)
    for kind in comparison.kinds:
        cells = _cells(kind)
        if not with_loss:
            del cells[3]
        table.add_row(*cells)
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


def _cells(kind: KindResult) -> list[str]:
    low, high = kind.accuracy_interval
    cells = [
        kind.name,
        f"{100 * kind.accuracy:.2f}",
        f"{100 * low:.2f} … {100 * high:.2f}",
        "–" if kind.loss is None else f"{kind.loss:.4f}",
    ]
    paired = kind.versus_baseline
    if paired is None:
        return [*cells, "", "", "", ""]
    low, high = paired.difference_interval
    return [
        *cells,
        f"{100 * paired.difference:+.2f}",
        f"{100 * low:+.2f} … {100 * high:+.2f}",
        f"{paired.changed}",
        p_value(paired.p_holm).removeprefix("p = ").removeprefix("p "),
    ]


def _print_drift(console: Console, kind: str, rows: list[dict], baseline: str) -> None:
    table = _table(console, f"\nlayers whose {baseline} statistics are furthest from {kind}")
    table.add_column("layer")
    columns = ["mean off by", "at worst", "log variance ratio", "at worst"]
    if "difference" in rows[0]:
        columns.append("points if exchanged alone")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column != columns[-1])
    for row in rows:
        cost = [f"{100 * row['difference']:+.2f}"] if "difference" in row else []
        table.add_row(
            row["name"],
            f"{row['mean_drift']:.3f} σ",
            f"{row['worst_mean_drift']:.3f} σ (channel {row['worst_mean_channel']})",
            f"{row['log_var_drift']:.3f}",
            f"{row['worst_log_var_drift']:.3f} (channel {row['worst_var_channel']})",
            *cost,
        )
    console.print(table)
