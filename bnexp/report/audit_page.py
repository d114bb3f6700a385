"""One self-contained HTML page about an audit: no script, no network, no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from jinja2 import Template
from markupsafe import Markup
from pydantic import Field

from bnexp.analysis import words
from bnexp.analysis.comparison import Comparison
from bnexp.analysis.findings import Finding, Gain, Halves
from bnexp.analysis.sample_curve import CurvePoint, enough
from bnexp.printable import all_printable, printable
from bnexp.reading import naming, read
from bnexp.records.audit import AuditRecord
from bnexp.report.audit_curve import curve_picture
from bnexp.report.audit_table import in_two_parts
from bnexp.report.drawing import PALETTE
from bnexp.report.templates import template

CHANNELS = 200
"""Bars in a picture of a layer's channels; of more, those with the largest shares."""


@dataclass(frozen=True)
class _Attribution:
    difference: float
    explained: float
    samples: int
    layers: dict[str, float]
    channels: dict[str, Annotated[list[float], Field(min_length=1)]]


@dataclass(frozen=True)
class _Findings:
    """What findings.json holds: that of others is held to it before it is shown."""

    summary: str
    findings: list[Finding]
    population_samples: int
    attribution: _Attribution | None
    halves: Halves | None
    seconds: dict[str, float]
    curve: list[CurvePoint] = field(default_factory=list)


def render_record(record: AuditRecord) -> str:
    """The page about an audit's folder. UserError, naming the file, where it is damaged."""
    findings = all_printable(record.findings)
    with naming(record.path / "findings.json"):
        findings |= asdict(read(_Findings, findings))
    with naming(record.path / "comparison.json"):
        comparison = Comparison.from_dict(all_printable(record.comparison))
    return render(
        comparison,
        findings,
        title=printable(record.path.name),
        config="\n".join(map(printable, record.config.split("\n"))),
        environment=all_printable(record.environment),
    )


def render(
    comparison: Comparison,
    findings: Mapping[str, Any],
    *,
    title: str = "audit",
    config: str = "",
    environment: Mapping[str, Any] | None = None,
) -> str:
    """The page as text. `findings` as `Audit.to_dict` gives them."""
    return _template("audit.html.j2").render(
        title=title,
        palette=PALETTE,
        config=config,
        environment=json.dumps(environment, indent=2) if environment else "",
        **_content(comparison, findings),
    )


def render_part(comparison: Comparison, findings: Mapping[str, Any]) -> str:
    """What the page shows, to be set into another (a notebook's)."""
    return _template("audit_part.html.j2").render(**_content(comparison, findings))


def _template(name: str) -> Template:
    return template(name, p_value=words.p_value, count=words.count)


def _content(comparison: Comparison, findings: Mapping[str, Any]) -> dict[str, Any]:
    top1 = comparison.score == "accuracy"
    attribution, halves = findings["attribution"], findings["halves"]
    if halves is not None:
        halves = Halves(**{**halves, "gain": Gain(**halves["gain"])})
    curve = [CurvePoint.from_dict(point) for point in findings["curve"]]
    return {
        "summary": findings["summary"],
        "mood": "orange" if any(not f["harmless"] for f in findings["findings"]) else "green",
        "comparison": comparison,
        "top1": top1,
        "findings": findings["findings"],
        "population_samples": findings["population_samples"],
        "halves": halves and in_two_parts(comparison, halves, findings["population_samples"]),
        "curve": curve,
        "curve_picture": curve_picture(curve, top1) if curve else "",
        "enough": enough(curve) if curve else "",
        "attribution": attribution,
        "explained": attribution and attribution["difference"]
        and attribution["explained"] / attribution["difference"],
        "shares": _shares(attribution),
        "channels": _channels(attribution),
        "rows": next(iter(comparison.layers.values()), []),
        "value": lambda x: f"{100 * x:.2f} %" if top1 else f"{x:.4g}",
        "change": lambda x: (f"{100 * x:+.2f}" if top1 else f"{x:+.3g}").replace("-", "−"),
        "unit": "points" if top1 else comparison.score,
        "seconds": sum(findings["seconds"].values()),
    }  # fmt: skip


def _shares(attribution: Mapping[str, Any] | None) -> list[tuple[str, float, float]]:
    """(layer, share of the loss, its length from -1 to 1), in the layers' order."""
    if attribution is None:
        return []
    largest = max((abs(v) for v in attribution["layers"].values()), default=0) or 1
    return [(name, v, v / largest) for name, v in attribution["layers"].items()]


def _channels(attribution: Mapping[str, Any] | None) -> list[tuple[str, Markup, str]]:
    """(layer, a bar per channel, what the picture is of) for the worst layers."""
    if attribution is None:
        return []
    pictures = []
    for name, values in attribution["channels"].items():
        order = list(range(len(values)))
        what = f"{len(values):,} channels in order"
        if len(values) > CHANNELS:
            order = sorted(order, key=lambda i: -abs(values[i]))[:CHANNELS]
            what = f"the {CHANNELS} channels of {len(values):,} with the largest shares"
        worst = max(range(len(values)), key=lambda i: abs(values[i]))
        what += f"; most channel {worst} with {values[worst]:+.4g}"
        pictures.append((name, _bars([values[i] for i in order]), what.replace("-", "−")))
    return pictures


def _bars(values: list[float]) -> Markup:
    largest = max(map(abs, values), default=0) or 1
    bars = []
    for i, value in enumerate(values):
        height = 20 * abs(value) / largest
        top = 20 - height if value > 0 else 20
        colour = "var(--orange, #c8501e)" if value > 0 else "var(--blue, #1f6fb5)"
        bars.append(
            f'<rect x="{i}" y="{top:.2f}" width="0.8" height="{max(height, 0.15):.2f}" '
            f'fill="{colour}"/>'
        )
    return Markup(  # numbers alone
        f'<svg viewBox="0 0 {len(values)} 40" preserveAspectRatio="none" role="img" '
        f'width="100%" height="60">{"".join(bars)}</svg>'
    )
