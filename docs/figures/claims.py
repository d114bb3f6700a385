"""The tables and the picture of docs/claims.md, from the records of the studies.

    python docs/figures/claims.py RECORD ...     keeps what the studies found, in claims.json
    python docs/figures/claims.py                writes the page's tables anew from claims.json

A study that claims.json holds already is replaced by a record of the same study.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "claims.md"
NUMBERS = HERE / "claims.json"
PICTURE = HERE / "claims.png"
TABLE = re.compile(r"(<!-- table ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.S)
SUMMARY = re.compile(r"(<!-- summary -->\n).*?(<!-- end -->)", re.S)


def collect(records: list[Path]) -> dict[str, Any]:
    """What claims.json holds, with these records' claims in place of the former ones."""
    found = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    for record in records:
        name = re.sub(r"-\d+$", "", record.name)
        state = json.loads((record / "state.json").read_text())
        if state["state"] != "finished":
            sys.exit(f"{record} is {state['state']}: let it finish first")
        environments = [
            json.loads(p.read_text()) for p in record.glob("experiments/*/environment.json")
        ]
        claims = json.loads((record / "claims.json").read_text())["claims"]
        found[name] = {
            "experiments": state["experiments"],
            "trainings": state["trainings"],
            "torch": sorted({e["packages"]["torch"] for e in environments}),
            "device": sorted({e["device"] for e in environments}),
            "claims": claims,
        }
    return dict(sorted(found.items()))


def label(study: str, number: int) -> str:
    """0a, 0b, ..., 10c: the study's number and the claim's letter."""
    return f"{int(study.split('-')[0])}{'abcdefghijklmnop'[number]}"


def table(study: str, claims: list[dict[str, Any]]) -> str:
    lines = [
        "| | claim | first | second | second − first (95 % interval) | p | expected | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, claim in enumerate(claims):
        first, second = (side(claim, which) for which in ("first", "second"))
        cells = [
            label(study, number),
            claim["says"],
            first,
            second,
            difference(claim),
            p_value(claim["p"]),
            claim["expect"],
            f"**{claim['verdict']}**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def side(claim: dict[str, Any], which: str) -> str:
    values = claim[f"{which}_values"]
    name = f"`{claim[which]}`"
    known = [v for v in values or [] if v is not None]
    if not known:
        return name
    if "diverges" in claim["expect"]:
        return f"{name}: {sum(known):.0f} of {len(known)} diverged"
    mean = sum(known) / len(known)
    return f"{name}: {amount(mean, claim['unit'])}"


def amount(value: float, unit: str) -> str:
    if unit == "points":
        return f"{100 * value:.1f} %"
    return f"{value:.0f} steps" if unit == "steps" else f"{value:.3g}"


def difference(claim: dict[str, Any]) -> str:
    if "diverges" in claim["expect"]:
        return "–"
    if claim["difference"] is None or claim["interval"] is None:
        return claim["text"]
    scale, digits = (100, 2) if claim["unit"] == "points" else (1, 0)
    low, high = (signed(scale * v, digits) for v in claim["interval"])
    unit = {"points": " points", "steps": " steps"}.get(claim["unit"], "")
    return f"{signed(scale * claim['difference'], digits)}{unit} ({low} to {high})"


def signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def summary(found: dict[str, Any], anchors: dict[str, str]) -> str:
    verdicts = ("supported", "contradicted", "undecided")
    lines = [f"| study | {' | '.join(verdicts)} |", "| --- | --- | --- | --- |"]
    for study, content in found.items():
        of: dict[str, list[str]] = {}
        for number, claim in enumerate(content["claims"]):
            of.setdefault(claim["verdict"], []).append(label(study, number))
        cells = (", ".join(of.get(verdict, [])) or "–" for verdict in verdicts)
        lines.append(f"| [{study}](#{anchors[study]}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def anchors_of(text: str) -> dict[str, str]:
    """Study -> the anchor of the heading above its table."""
    anchors, heading = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = re.sub(r"[^\w\- ]", "", line[3:].lower()).replace(" ", "-")
        elif match := re.match(r"<!-- table ([a-z0-9-]+) -->", line):
            anchors[match[1]] = heading
    return anchors


def page(text: str, found: dict[str, Any]) -> str:
    """The page's text with its tables made from what was found."""

    def made(match: re.Match[str]) -> str:
        content = found.get(match[2])
        return match[1] + (table(match[2], content["claims"]) if content else "") + match[3]

    anchors = anchors_of(text)
    text = TABLE.sub(made, text)
    return SUMMARY.sub(lambda match: match[1] + summary(found, anchors) + match[2], text)


def draw(found: dict[str, Any]) -> None:
    """Every difference in points with its interval, one line a claim."""
    import io

    import matplotlib
    from draw import BLUE, INK, MUTED, ORANGE, STYLE
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rows = [
        (label(study, number), claim)
        for study, content in found.items()
        for number, claim in enumerate(content["claims"])
        if claim["unit"] == "points" and claim["interval"] and "diverges" not in claim["expect"]
    ]
    marks = {"supported": ("o", BLUE, BLUE), "contradicted": ("X", ORANGE, ORANGE)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.17 * len(rows) + 0.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        seen = set()
        for y, (_, claim) in enumerate(rows):
            marker, face, edge = marks.get(claim["verdict"], ("o", "white", MUTED))
            low, high = (100 * v for v in claim["interval"])
            axes.plot([low, high], [y, y], color=edge, linewidth=1.2)
            name = None if claim["verdict"] in seen else claim["verdict"]
            seen.add(claim["verdict"])
            axes.plot(
                [100 * claim["difference"]], [y], marker, markerfacecolor=face,
                markeredgecolor=edge, markersize=5.5, linestyle="none", label=name,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xscale("symlog", linthresh=1, linscale=0.8)
        ticks = [-100, -10, -1, 0, 1, 10, 100]
        axes.set_xticks(ticks, [str(t).replace("-", "−") for t in ticks])
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(
            "second less first, points of accuracy (linear from −1 to 1, then by decades)"
        )
        figure.legend(loc="outside upper center", ncols=3, fontsize=8)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
    image = Image.open(content).convert("RGB").quantize(64)
    image.save(PICTURE, optimize=True)


if __name__ == "__main__":
    records = [Path(argument) for argument in sys.argv[1:]]
    found = collect(records)
    NUMBERS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    draw(found)
