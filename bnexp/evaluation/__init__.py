"""What a model predicts under each kind of statistics, and what the difference is worth.

`comparison` and `verdict` need no torch, so names are looked up on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Predictions": "predictions",
    "predict": "predictions",
    "evaluate": "predictions",
    "LayerCost": "predictions",
    "layer_costs": "predictions",
    "Comparison": "comparison",
    "compare": "comparison",
    "summarize_seeds": "comparison",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
