"""matplotlib, for figures that are written to files and never shown."""

from __future__ import annotations

import contextlib
import os

# One that is not installed, as a notebook leaves it to its subprocesses, would keep matplotlib from
# being imported at all.
_backend = os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402

__all__ = [
    "Axes",
    "Figure",
    "FigureCanvasAgg",
    "FuncFormatter",
    "Line2D",
    "LogLocator",
    "MaxNLocator",
    "NullLocator",
    "matplotlib",
]
