"""The tables that more than one command prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from bnexp import markdown
from bnexp.analysis.layers import LayerCost, worst_first
from bnexp.analysis.verdict import THESE_WEIGHTS, advice
from bnexp.analysis.words import count, p_value, signed
from bnexp.cli.terminal import output
from bnexp.condition import Condition, weights_label
from bnexp.errors import UserError
from bnexp.printable import printable

if TYPE_CHECKING:
    from bnexp.analysis.comparison import Comparison
    from bnexp.analysis.results import Result

WIDE = 100
WITH_CHANNELS = 140
MARKDOWN_WIDTH = 1000
# The columns of the main table, and how wide a terminal each of them needs.
RESULT_COLUMNS = (
    ("accuracy %", 0),
    ("95 % interval", 90),
    ("loss", WIDE),
    ("difference", 0),
    (" 95 % interval", 0),
    ("changed", 76),
    ("p", 0),
)


def refuse_both(as_json: bool, as_markdown: bool) -> None:
    if as_json and as_markdown:
        raise UserError("choose --json or --markdown")


class Page:
    """Standard output: paragraphs and tables for a terminal, or as Markdown, all columns shown."""

    def __init__(self, as_markdown: bool = False) -> None:
        self._console = output()
        self._as_markdown = as_markdown
        self.width = MARKDOWN_WIDTH if as_markdown else self._console.width

    def text(self, text: str, style: str | None = None) -> None:
        """A paragraph, or a title above a table; `style` bold, dim or a colour."""
        if self._as_markdown:
            print(f"{markdown.paragraph(text, bold=style == 'bold')}\n")
        else:
            wrap = not self._console.is_terminal
            lines = (printable(line) for line in text.split("\n"))
            self._console.print(Text("\n".join(lines), style=style or ""), soft_wrap=wrap)

    def table(self, table: Table) -> None:
        if not self._as_markdown:
            self._console.print(table)
            return
        if table.title:
            self.text(str(table.title), "bold")
        columns = [[str(cell) for cell in column.cells] for column in table.columns]
        head = [str(column.header) for column in table.columns]
        print(f"{markdown.table(head, list(zip(*columns, strict=True)))}\n")

    def space(self) -> None:
        if not self._as_markdown:
            self._console.print()


def print_comparison(comparison: Comparison, layers: int = 0, page: Page | None = None) -> None:
    """Print the verdict, one row per condition, and the furthest layers, to stdout."""
    page = page or Page()
    page.space()
    page.text(comparison.verdict.text, "bold")
    page.space()
    if todo := advice(comparison.verdict, comparison.results):
        page.text(todo)
        page.space()
    _print_results(page, comparison)
    if layers and comparison.compared:
        compared = comparison.compared[0].condition
        if comparison.layers.get(compared):
            _print_layers(page, comparison, compared, layers)
    page.space()


def _print_results(page: Page, comparison: Comparison) -> None:
    shown = [column for column, width in RESULT_COLUMNS if page.width >= width]
    table = _table(page, f"{count(comparison.samples)} test images{_weights(comparison)}")
    table.add_column("statistics", no_wrap=True)
    for column in shown:
        table.add_column(column.strip(), justify="right", no_wrap=True)
    for result in comparison.results:
        cells = _cells(result)
        table.add_row(str(result.condition), *(cells[column] for column in shown))
    page.table(table)
    if comparison.others:
        corrected = ", corrected for testing several conditions (Holm)"
        several = corrected if len(comparison.others) > 1 else ""
        page.text(
            f"difference to {comparison.baseline}, in points; changed: predictions that differ "
            f"from its; p: exact McNemar test{several}. {THESE_WEIGHTS}",
            style="dim",
        )


def _weights(comparison: Comparison) -> str:
    """Whose weights the rows are about that do not say it."""
    named = ("ema", "swa")
    unnamed = [r.condition for r in comparison.results if r.condition.weights not in named]
    if not unnamed:
        return ""
    others = len(unnamed) < len(comparison.results)
    return f", {weights_label(unnamed[0])}{' where none are named' if others else ''}"


def _table(page: Page, title: str) -> Table:
    gap = 2 if page.width >= WIDE else 1
    return Table(
        title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), pad_edge=False
    )


def _cells(result: Result) -> dict[str, str]:
    low, high = result.accuracy_interval
    cells = dict.fromkeys((column for column, _ in RESULT_COLUMNS), "")
    cells |= {
        "accuracy %": f"{100 * result.accuracy:.2f}",
        "95 % interval": f"{100 * low:.2f} … {100 * high:.2f}",
        "loss": "–" if result.loss is None else f"{result.loss:.4f}",
    }
    if paired := result.versus_baseline:
        low, high = paired.difference_interval
        cells |= {
            "difference": signed(paired.difference, 2),
            " 95 % interval": f"{signed(low, 2)} … {signed(high, 2)}",
            "changed": count(paired.changed),
            "p": p_value(paired.p_holm).removeprefix("p = ").removeprefix("p "),
        }
    return cells


def _print_layers(page: Page, comparison: Comparison, other: Condition, shown: int) -> None:
    rows, baseline = worst_first(comparison.layers[other]), comparison.baseline
    of = f"{shown} of {len(rows)} " if shown < len(rows) else ""
    title = f"{of}layers, those first that cost most alone, then those furthest from {other}"
    page.space()
    table = _table(page, title)
    table.add_column("layer", overflow="fold")
    wide, channels = page.width >= WIDE, page.width >= WITH_CHANNELS
    columns = ["mean off by", "at worst", "log variance ratio", "at worst"]
    for column in [*(columns if channels else columns[::2]), "mended alone", "spoiled alone"]:
        table.add_column(column, justify="right", no_wrap=channels)
    for row in rows[:shown]:
        cells = [
            f"{row.mean_drift:.3f} σ",
            f"{row.worst_mean_drift:.3f} σ (channel {row.worst_mean_channel})",
            f"{row.log_var_drift:.3f}",
            f"{row.worst_log_var_drift:.3f} (channel {row.worst_var_channel})",
        ]
        costs = (_cost(cost, wide) for cost in (row.mended, row.spoiled))
        table.add_row(row.name, *(cells if channels else cells[::2]), *costs)
    page.table(table)
    tried = [row.spoiled for row in rows if row.spoiled]
    if tried:
        page.text(
            f"points of accuracy on {count(tried[0].samples or 0)} test images"
            f"{', with 95 % intervals' if wide else ''}. mended alone: this layer gets {other} "
            f"statistics and the others keep {baseline}; spoiled alone: this layer keeps "
            f"{baseline} and the others get {other}. Tried for {len(tried)} of {len(rows)} layers.",
            style="dim",
        )


def _cost(cost: LayerCost | None, wide: bool) -> str:
    if cost is None:
        return "–"
    low, high = (signed(end, 2) for end in cost.interval)
    return f"{signed(cost.difference, 2)}{f' ({low} … {high})' if wide else ''}"
