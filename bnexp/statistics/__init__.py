"""Statistics of BN layers: what they are, estimated online, recomputed, compared.

Stands on `bnexp.nn.batchnorm` and `bnexp.nn.convert`, and knows nothing of configs or runs.
"""

from __future__ import annotations

from bnexp.nn.layers import batchnorm_layers
from bnexp.statistics.drift import LayerDrift, layer_drift
from bnexp.statistics.exact import MemoryEstimate
from bnexp.statistics.moments import Moments, moments
from bnexp.statistics.recompute import (
    METHODS,
    batch_statistics,
    estimate_memory,
    recompute_statistics,
)
from bnexp.statistics.rules import Cumulative, Ema, Pooled
from bnexp.statistics.statistics import Statistics, running_statistics
from bnexp.statistics.tracker import StatisticsTracker

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
