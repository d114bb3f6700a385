"""The picture of a score by the number of samples: plain SVG, told apart by shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from bnexp.analysis.sample_curve import CurvePoint

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 34
INK, MUTED, GRID = "var(--ink, #1c2126)", "var(--muted, #626b75)", "var(--grid, #e2e6ea)"
ASIDE = 5
"""How far the two halves, of as many samples, are set apart."""


def curve_picture(points: Sequence[CurvePoint], percent: bool) -> Markup:
    """Dots for nested parts, a square for the other half, a dashed line for all."""
    whole, parts = points[-1], points[:-1]
    low = min(whole.score + p.gain.low for p in points)
    high = max(whole.score + p.gain.high for p in points)
    margin = 0.05 * (high - low) or 0.01
    low, high = low - margin, high + margin
    first, last = math.log(points[0].samples), math.log(whole.samples)

    def x(samples: int) -> float:
        share = (math.log(samples) - first) / (last - first) if last > first else 0.5
        return LEFT + 10 + share * (WIDTH - LEFT - RIGHT - 20)

    def y(score: float) -> float:
        return TOP + (high - score) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" '
            f'fill="{MUTED}">{words}</text>'
        )

    def line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
        return (
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{colour}" {more}/>'
        )

    drawn = []
    for score in (low + margin, (low + high) / 2, high - margin):
        label = f"{100 * score:.1f} %" if percent else f"{score:.3g}"
        drawn.append(line(LEFT, y(score), WIDTH - RIGHT, y(score), GRID))
        drawn.append(text(LEFT - 4, y(score) + 4, label.replace("-", "−"), "end"))
    dashed = 'stroke-dasharray="5 4"'
    drawn.append(line(LEFT, y(whole.score), WIDTH - RIGHT, y(whole.score), INK, dashed))
    free = math.inf  # labels below the axis from the right, where there is room
    for point in reversed([p for p in points if p.part != "other half"]):
        label = f"{point.samples:,}"
        if x(point.samples) + 4 * len(label) < free:
            drawn.append(text(x(point.samples), HEIGHT - BOTTOM + 16, label))
            free = x(point.samples) - 4 * len(label)
    drawn.append(text((LEFT + WIDTH) / 2, HEIGHT - 3, "samples recomputed from"))
    half = max((p.samples for p in parts if p.part == "nested"), default=0)
    for p in parts:
        centre = x(p.samples)
        if p.part == "other half":
            centre += ASIDE
        elif p.samples == half:
            centre -= ASIDE
        top, bottom = y(whole.score + p.gain.high), y(whole.score + p.gain.low)
        drawn.append(line(centre, top, centre, bottom, INK))
        drawn += [line(centre - 3, end, centre + 3, end, INK) for end in (top, bottom)]
        drawn.append(
            f'<rect x="{centre - 3.5:.1f}" y="{y(p.score) - 3.5:.1f}" width="7" height="7" '
            f'fill="var(--paper, #ffffff)" stroke="{INK}"/>'
            if p.part == "other half"
            else f'<circle cx="{centre:.1f}" cy="{y(p.score):.1f}" r="3.5" fill="{INK}"/>'
        )
    return Markup(  # numbers alone
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" width="100%" '
        f'style="max-width: 34rem" aria-label="score by the number of samples">{"".join(drawn)}'
        "</svg>"
    )
