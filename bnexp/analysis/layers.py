"""What is known about single BN layers: how far their statistics are off, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bnexp.analysis.intervals import Interval, finite, paired_counts, paired_interval
from bnexp.analysis.predictions import Predictions
from bnexp.reading import read


@dataclass(frozen=True)
class LayerCost:
    """What exchanging one layer's statistics alone does, on `samples` samples.

    `difference` is the accuracy with this layer's statistics exchanged less the accuracy without,
    `interval` its 95 % interval, `changed` the number of predictions that differ. `samples` is
    None in records that do not say it.
    """

    difference: float
    interval: Interval
    changed: int
    loss_difference: float | None
    samples: int | None = None


@dataclass(frozen=True)
class LayerRow:
    """One layer. The drifts are those of `bnexp.statistics.LayerDrift`: the baseline's distance
    from the other statistics. `mended`: this layer alone gets the other statistics, the rest have
    the baseline's; `spoiled`: this layer alone gets the baseline's, the rest have the others."""

    name: str
    channels: int
    mean_drift: float
    worst_mean_drift: float
    worst_mean_channel: int
    log_var_drift: float
    worst_log_var_drift: float
    worst_var_channel: int
    mended: LayerCost | None = None
    spoiled: LayerCost | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in comparison.json: what mending does stands beside the drift, if it was measured."""
        row = asdict(self)
        mended = row.pop("mended") or {}
        if row["spoiled"] is None:
            del row["spoiled"]
        return row | mended

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> LayerRow:
        mended = read(LayerCost, row) if "difference" in row else None
        return replace(read(cls, row), mended=mended)


def worst_first(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Those first that alone, mended or spoiled, are seen to change the accuracy, by how much;
    the others as they were, which is by drift."""

    def seen(row: LayerRow) -> float:
        costs = [cost for cost in (row.mended, row.spoiled) if cost]
        return max(
            (abs(c.difference) for c in costs if c.interval[0] * c.interval[1] > 0), default=0
        )

    return sorted(rows, key=seen, reverse=True)


def layer_cost(reference: Predictions, exchanged: Predictions) -> LayerCost:
    """From the predictions of the same samples without and with one layer exchanged."""
    gained, lost = paired_counts(reference.correct, exchanged.correct)
    return LayerCost(
        difference=(gained - lost) / len(reference),
        interval=paired_interval(gained, lost, len(reference)),
        changed=int(np.count_nonzero(exchanged.predicted != reference.predicted)),
        loss_difference=finite(exchanged.mean_loss - reference.mean_loss),
        samples=len(reference),
    )
