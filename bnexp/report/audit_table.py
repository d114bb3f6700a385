"""An audit as plain text, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnexp import markdown
from bnexp.analysis.comparison import Comparison
from bnexp.analysis.findings import BY_THE_WAY, Finding, Halves
from bnexp.analysis.sample_curve import CurvePoint, enough
from bnexp.analysis.words import p_value

if TYPE_CHECKING:
    from bnexp.evaluation.attribution import Attribution

WIDTH = 96


@dataclass(frozen=True)
class Form:
    """What paragraphs and tables (a head and rows of cells) look like, and a remark in a list."""

    paragraph: Callable[[str], str]
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
    item: Callable[[int, str, Sequence[str]], str]


def as_text(
    comparison: Comparison,
    findings: Sequence[Finding],
    summary: str,
    attribution: Attribution | None,
    halves: Halves | None,
    population_samples: int,
    curve: Sequence[CurvePoint],
    form: Form,
) -> str:
    """Everything an audit found."""
    parts = [
        form.paragraph(summary),
        form.paragraph(comparison.verdict.text),
        *map(form.paragraph, comparison.verdict.remarks),
        form.table(*_conditions(comparison)),
        *(_finding(i, finding, form) for i, finding in enumerate(findings, start=1)),
    ]
    if attribution is not None:
        parts += _attribution(comparison, attribution, form)
    if halves is not None:
        text = in_two_parts(comparison, halves, population_samples)
        parts.append(form.paragraph(f"How many samples? {text}"))
    if curve:
        parts += [form.paragraph(enough(curve)), form.table(*_curve(comparison, curve))]
    return "\n\n".join(parts)


def _conditions(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    top1 = comparison.score == "accuracy"
    head = ["statistics", "accuracy %" if top1 else comparison.score, "95 % interval"]
    head += ["loss"] * top1 + ["difference", "95 % interval", "changed", "p"]
    scale, spec = (100, ".2f") if top1 else (1, ".4g")
    rows = []
    for result in comparison.results:
        low, high = result.accuracy_interval
        row = [
            str(result.condition),
            format(scale * result.accuracy, spec),
            f"{scale * low:{spec}} … {scale * high:{spec}}",
        ]
        if top1:
            row.append("–" if result.loss is None else f"{result.loss:.4f}")
        if pair := result.versus_baseline:
            low, high = pair.difference_interval
            row += [
                _signed(scale * pair.difference, spec),
                f"{_signed(scale * low, spec)} … {_signed(scale * high, spec)}",
                f"{pair.changed:,}",
                p_value(pair.p_holm).removeprefix("p = ").removeprefix("p "),
            ]
        rows.append([*row, *[""] * (len(head) - len(row))])
    return head, rows


def _finding(number: int, finding: Finding, form: Form) -> str:
    about = ""
    if finding.layers:
        shown = ", ".join(finding.layers[:3])
        more = len(finding.layers) - 3
        about = f"  ({shown}{f' and {more} more' if more > 0 else ''})"
    head = f"{finding.code}{' (harmless)' if finding.harmless else ''}{about}"
    return form.item(number, head, [finding.evidence, finding.effect, f"-> {finding.remedy}"])


def _attribution(comparison: Comparison, attribution: Attribution, form: Form) -> list[str]:
    share = ""
    if attribution.difference:
        share = f", {100 * attribution.explained / attribution.difference:.0f} % of it"
    head = (
        f"Running averages change the loss by {_signed(attribution.difference)} on "
        f"{attribution.samples:,} test samples; by gradients the layers account for "
        f"{_signed(attribution.explained)}{share}. The layers that matter most, and what "
        "exchanging one alone does:"
    )
    exchanged = {
        row.name: row for rows in list(comparison.layers.values())[:1] for row in rows if row.mended
    }
    scale, spec = (100, ".2f") if comparison.score == "accuracy" else (1, ".3g")
    rows = []
    for layer in attribution.worst(len(exchanged) or 5):
        row = exchanged.get(layer.name)
        worst = int(layer.channels.abs().argmax())
        rows.append(
            [
                layer.name,
                _signed(layer.loss),
                f"{worst} ({_signed(float(layer.channels[worst]), '.3g')})",
                "" if row is None or row.mended is None
                else _signed(scale * row.mended.difference, spec),
                "" if row is None or row.spoiled is None
                else _signed(scale * row.spoiled.difference, spec),
            ]
        )  # fmt: skip
    columns = ["layer", "loss", "worst channel", "mended alone", "spoiled alone"]
    return [form.paragraph(head), form.table(columns, rows)]


def in_two_parts(comparison: Comparison, halves: Halves, population_samples: int) -> str:
    """How far statistics of two parts of the population are apart, in a sentence or two."""
    top1 = comparison.score == "accuracy"
    first, second = (f"{100 * s:.2f} %" if top1 else f"{s:.4g}" for s in halves.scores)
    parts = "halves" if 2 * halves.samples >= 0.9 * population_samples else "parts"
    text = (
        f"Statistics from two disjoint {parts} of {halves.samples:,} samples of the population "
        f"score {first} and {second} on {halves.test_samples:,} test samples, {halves.changed:,} "
        f"of which fare otherwise; furthest apart is {halves.worst_layer}, by "
        f"{halves.worst_distance:.3f} standard deviations."
    )
    if parts == "halves" or halves.gain.matters(BY_THE_WAY):
        return text
    return f"{text} All {population_samples:,} samples leave less to chance than such a part."


def _curve(
    comparison: Comparison, curve: Sequence[CurvePoint]
) -> tuple[list[str], list[list[str]]]:
    scale, spec = (100, ".2f") if comparison.score == "accuracy" else (1, ".4g")
    rows = [
        [
            f"{point.samples:,}{' (all)' if point.part == 'all' else ''}"
            f"{' (the other half)' if point.part == 'other half' else ''}",
            f"{scale * point.score:{spec}}",
            *(
                []
                if point.part == "all"
                else [
                    _signed(scale * point.gain.difference, spec),
                    f"{_signed(scale * point.gain.low, spec)} … "
                    f"{_signed(scale * point.gain.high, spec)}",
                    f"{point.changed:,}",
                ]
            ),
        ]
        for point in curve
    ]
    score = "accuracy %" if comparison.score == "accuracy" else comparison.score
    head = ["samples", score, "less all", "95 % interval", "changed"]
    return head, [[*row, *[""] * (len(head) - len(row))] for row in rows]


def _signed(value: float, spec: str = ".4g") -> str:
    return format(value, f"+{spec}").replace("-", "−")


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = []
    for row in table:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def _item(number: int, head: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{number}. {head}", *(_wrapped(line, "   ") for line in lines)])


def _markdown_item(number: int, head: str, lines: Sequence[str]) -> str:
    texts = [f"**{markdown.escaped(head)}**", *(markdown.paragraph(line) for line in lines)]
    return f"{number}. " + "  \n   ".join(texts)


PLAIN = Form(_wrapped, _table, _item)
MARKDOWN = Form(markdown.paragraph, markdown.table, _markdown_item)
