"""bnexp: what are batch normalization's moving averages worth?

Heavy imports are lazy: `import bnexp` does not import torch; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bnexp.analysis.comparison import compare
    from bnexp.auditing import Audit, audit
    from bnexp.errors import UserError
    from bnexp.evaluation.evaluate import evaluate
    from bnexp.experiment import run_experiment
    from bnexp.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert_batchnorm
    from bnexp.ranks import Alone, TorchRanks
    from bnexp.statistics import (
        Cumulative,
        Ema,
        Pooled,
        Statistics,
        StatisticsTracker,
        layer_drift,
        recompute_statistics,
        running_statistics,
    )
    from bnexp.statistics.blend import blend

_HOME = {
    "Alone": "bnexp.ranks",
    "TorchRanks": "bnexp.ranks",
    "Audit": "bnexp.auditing",
    "audit": "bnexp.auditing",
    "blend": "bnexp.statistics.blend",
    "compare": "bnexp.analysis.comparison",
    "evaluate": "bnexp.evaluation.evaluate",
    "layer_drift": "bnexp.statistics",
    "BatchNorm1d": "bnexp.nn",
    "BatchNorm2d": "bnexp.nn",
    "BatchNorm3d": "bnexp.nn",
    "convert_batchnorm": "bnexp.nn",
    "Cumulative": "bnexp.statistics",
    "Ema": "bnexp.statistics",
    "Pooled": "bnexp.statistics",
    "Statistics": "bnexp.statistics",
    "StatisticsTracker": "bnexp.statistics",
    "recompute_statistics": "bnexp.statistics",
    "running_statistics": "bnexp.statistics",
    "run_experiment": "bnexp.experiment",
    "UserError": "bnexp.errors",
}

__all__ = [
    "Alone",
    "Audit",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Cumulative",
    "Ema",
    "Pooled",
    "Statistics",
    "StatisticsTracker",
    "TorchRanks",
    "UserError",
    "__version__",
    "audit",
    "blend",
    "compare",
    "convert_batchnorm",
    "evaluate",
    "layer_drift",
    "recompute_statistics",
    "run_experiment",
    "running_statistics",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'bnexp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
