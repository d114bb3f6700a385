"""Statistics of BN layers: what they are, estimated online, recomputed, compared."""

from __future__ import annotations

from .drift import LayerDrift, layer_drift
from .estimators import Cumulative, Ema, Pooled
from .layers import batchnorm_layers
from .moments import Moments, moments
from .recompute import (
    METHODS,
    MemoryEstimate,
    batch_statistics,
    estimate_memory,
    recompute_statistics,
)
from .statistics import Statistics, running_statistics
from .tracker import StatisticsTracker

__all__ = [
    "METHODS",
    "Cumulative",
    "Ema",
    "LayerDrift",
    "MemoryEstimate",
    "Moments",
    "Pooled",
    "Statistics",
    "StatisticsTracker",
    "batch_statistics",
    "batchnorm_layers",
    "estimate_memory",
    "layer_drift",
    "moments",
    "recompute_statistics",
    "running_statistics",
]
