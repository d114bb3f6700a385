"""Statistics of BN layers: what they are, estimated online, recomputed, compared.

Stands on `bnexp.nn`, and knows nothing of configs or runs. Imports are lazy: the estimators' rules
need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnexp.statistics.drift import LayerDrift, layer_drift
    from bnexp.statistics.probe import MemoryEstimate
    from bnexp.statistics.recompute import (
        METHODS,
        batch_statistics,
        estimate_memory,
        recompute_statistics,
    )
    from bnexp.statistics.rules import Cumulative, Ema, Pooled
    from bnexp.statistics.statistics import Statistics, running_statistics
    from bnexp.statistics.tracker import StatisticsTracker

_HOME = {
    "LayerDrift": "drift",
    "layer_drift": "drift",
    "MemoryEstimate": "probe",
    "METHODS": "recompute",
    "batch_statistics": "recompute",
    "estimate_memory": "recompute",
    "recompute_statistics": "recompute",
    "Cumulative": "rules",
    "Ema": "rules",
    "Pooled": "rules",
    "Statistics": "statistics",
    "running_statistics": "statistics",
    "StatisticsTracker": "tracker",
}

__all__ = [
    "METHODS",
    "Cumulative",
    "Ema",
    "LayerDrift",
    "MemoryEstimate",
    "Pooled",
    "Statistics",
    "StatisticsTracker",
    "batch_statistics",
    "estimate_memory",
    "layer_drift",
    "recompute_statistics",
    "running_statistics",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
