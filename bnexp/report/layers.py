"""Figures about single layers: how far their statistics are off, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bnexp.analysis.layers import LayerCost, worst_first
from bnexp.analysis.words import capital, count, signed, signed_interval
from bnexp.condition import compared_with, statistics_label
from bnexp.report.drawing import COLOUR, Panel, Plot, Table
from bnexp.report.mpl import Axes
from bnexp.report.parts import draw_interval, value_axis
from bnexp.report.run_data import RunData

MAX_LAYERS = 30


def layer_drift(run: RunData) -> Plot | None:
    """How far each layer's statistics are from the recomputed ones."""
    comparison = run.comparison
    condition = compared_with(comparison.baseline, comparison.layers) if comparison else None
    if not comparison or not condition or not comparison.layers[condition]:
        return None
    rows = comparison.layers[condition]
    shown = rows[:MAX_LAYERS]

    def drift(values: Sequence[tuple[float, float]]) -> Callable[[Axes, bool], None]:
        def draw(axes: Axes, narrow: bool) -> None:
            y = np.arange(len(values))
            low, high = np.array(values).T
            axes.hlines(y, low, high, color=COLOUR["orange"], linewidth=1, alpha=0.5)
            axes.plot(low, y, "o", color=COLOUR["orange"], markersize=4.5)
            axes.plot(high, y, "|", color=COLOUR["orange"], markersize=7)
            axes.set_xlim(left=0)
            axes.margins(x=0.06)
            value_axis(axes, narrow, percent_scale=False)

        return draw

    first, base = rows[0], statistics_label(comparison.baseline, run.made)
    other = statistics_label(condition, run.made)
    caption = (
        f"{capital(base)} against {other} in each BN layer, the furthest first. Means are compared "
        "in units of the layer's own standard deviation σ, variances by the logarithm of their "
        "ratio (0.1 is about 10 %). The dot is the root mean square over channels, the bar ends at "
        "the worst channel. Up to some hundredths are noise of the averages and do no harm; look "
        "for layers, often the last ones, that stand out by far. "
        f"Furthest here: {first.name}, means {first.mean_drift:.3f} σ off.{_shown(shown, rows)}"
    )
    table = [
        [
            row.name,
            f"{row.mean_drift:.4f}",
            f"{row.worst_mean_drift:.4f} (#{row.worst_mean_channel})",
            f"{row.log_var_drift:.4f}",
            f"{row.worst_log_var_drift:.4f} (#{row.worst_var_channel})",
        ]
        for row in rows
    ]
    columns = ["layer", "mean, σ", "worst channel", "variance, |log|", "worst channel"]
    return Plot(
        key="layers",
        title="Which layers' averages are off?",
        caption=caption,
        alt=(
            f"Distance of {base} from {other} in {len(rows)} layers; furthest is {first.name} with "
            f"its means {first.mean_drift:.3f} standard deviations off."
        ),
        panels=(
            Panel(
                "Means: distance in σ",
                drift([(row.mean_drift, row.worst_mean_drift) for row in shown]),
                0,
            ),
            Panel(
                "Variances: |log ratio|",
                drift([(row.log_var_drift, row.worst_log_var_drift) for row in shown]),
                0,
            ),
        ),
        tables=(Table("Drift by layer", columns, table),),
        rows=tuple(row.name for row in shown),
    )


def layer_costs(run: RunData) -> Plot | None:
    """What mending one layer alone gains, and what spoiling one layer alone costs."""
    comparison = run.comparison
    condition = compared_with(comparison.baseline, comparison.layers) if comparison else None
    if not comparison or not condition:
        return None
    all_rows = comparison.layers[condition]
    base, other = (statistics_label(c, run.made) for c in (comparison.baseline, condition))
    kinds = {
        "Mended alone, points": {row.name: row.mended for row in all_rows if row.mended},
        "Spoiled alone, points": {row.name: row.spoiled for row in all_rows if row.spoiled},
    }
    kinds = {title: costs for title, costs in kinds.items() if costs}
    if not kinds:
        return None
    mended, spoiled = kinds.get("Mended alone, points", {}), kinds.get("Spoiled alone, points", {})
    measured = [row.name for row in worst_first(all_rows) if row.mended or row.spoiled]
    shown = measured[:MAX_LAYERS]

    def draw_costs(costs: Mapping[str, LayerCost]) -> Callable[[Axes, bool], None]:
        def draw(axes: Axes, narrow: bool) -> None:
            axes.axvline(0, color=COLOUR["muted"], linewidth=0.9)
            for i, name in enumerate(shown):
                if name in costs:
                    draw_interval(axes, i, costs[name].difference, costs[name].interval, "orange")
            value_axis(axes, narrow)

        return draw

    caption = (
        "Both directions, with 95 % intervals on the same images. Mended alone: this layer gets "
        f"{other} while all others keep {base}. Spoiled alone: this layer keeps {base} while all "
        f"others have {other}. Where many layers are off, mending one changes nothing, as the rest "
        "still spoil the result, and the second plot tells which of them matter; single layers "
        "need not add up to the whole. "
    )
    if mended:
        caption += _extreme("Mended alone, most is gained by", mended, max)
    if spoiled:
        caption += _extreme("Spoiled alone, most is lost by", spoiled, min)
    caption += _images(comparison.samples, [*mended.values(), *spoiled.values()])
    if len(measured) < len(all_rows):
        caption += f" {count(len(measured))} of {count(len(all_rows))} layers were tried."
    caption += _shown(shown, measured)
    columns = ["layer"]
    for title in kinds:
        columns += [title, "95 % interval", "predictions changed"]
    table = [
        [name, *(cell for costs in kinds.values() for cell in _cost_cells(costs.get(name)))]
        for name in measured
    ]
    extremes = [
        f"{title.partition(',')[0]}: {signed(min(differences), 2)} to {signed(max(differences), 2)}"
        for title, costs in kinds.items()
        for differences in [[cost.difference for cost in costs.values()]]
    ]
    return Plot(
        key="costs",
        title="Which layers cost accuracy?",
        caption=caption.strip(),
        alt=f"Change of test accuracy by layer, points. {'; '.join(extremes)}.",
        panels=tuple(Panel(title, draw_costs(costs), 0) for title, costs in kinds.items()),
        tables=(Table("One layer exchanged", columns, table),),
        rows=tuple(shown),
    )


def _extreme(words: str, costs: Mapping[str, LayerCost], pick: Callable[..., str]) -> str:
    name = pick(costs, key=lambda layer: costs[layer].difference)
    cost = costs[name]
    return (
        f"{words} {name}: {signed(cost.difference, 2)} points "
        f"({signed_interval(cost.interval, 2)}). "
    )


def _images(samples: int, costs: Sequence[LayerCost]) -> str:
    """On how many images the costs of layers rest."""
    used = sorted({cost.samples for cost in costs if cost.samples})
    if not used:
        return f"The record does not say how many of the {count(samples)} test images were used."
    if used == [samples]:
        return f"Measured on all {count(samples)} test images."
    return f"Measured on {' or '.join(map(count, used))} of the {count(samples)} test images."


def _cost_cells(cost: LayerCost | None) -> list[str]:
    if cost is None:
        return ["", "", ""]
    return [signed(cost.difference, 2), signed_interval(cost.interval, 2), count(cost.changed)]


def _shown(shown: Sequence[Any], rows: Sequence[Any]) -> str:
    if len(shown) == len(rows):
        return ""
    return f" Shown are {count(len(shown))} of {count(len(rows))} layers."
