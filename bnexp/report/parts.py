"""What figures are put together from: lines, bands, intervals and axes."""

from __future__ import annotations

import numpy as np

from bnexp.report.curves import envelope
from bnexp.report.drawing import COLOUR, Look
from bnexp.report.mpl import Axes, FuncFormatter, MaxNLocator

TABLE_BINS = 60


def draw_band(
    axes: Axes, x, y, colour: str, label: str, narrow: bool, mean: str | None = None
) -> None:
    """A noisy curve: whole where it fits, else the span of each bin; optionally means over it."""
    bins = bins_for(narrow)
    if len(x) <= 2 * bins:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.5, label=label)
    else:
        start, end, _, low, high = envelope(x, y, bins)
        axes.fill_between(
            (start + end) / 2, low, high, color=colour, alpha=0.22, linewidth=0, label=label
        )
    if mean is not None:
        start, end, middle, _, _ = envelope(x, y, TABLE_BINS)
        axes.plot((start + end) / 2, middle, color=colour, label=mean)


def draw_line(axes: Axes, x, y, look: Look, label: str) -> None:
    """Nothing where there is no point; some ten markers however many points there are."""
    if len(x) == 0:
        return
    every = max(1, len(x) // 10)
    axes.plot(
        x,
        y,
        linestyle=look.dash if len(x) > 1 else "",
        marker=look.marker,
        markevery=slice(len(x) - 1, None, -every) if every > 1 else None,
        markersize=3.8,
        markerfacecolor="none" if look.hollow else COLOUR[look.colour],
        color=COLOUR[look.colour],
        label=label,
        zorder=4,
    )


def draw_interval(axes: Axes, row: int, value: float, interval, colour: str) -> None:
    axes.hlines(row, 100 * interval[0], 100 * interval[1], color=COLOUR[colour], linewidth=2)
    axes.plot(100 * value, row, "o", color=COLOUR[colour], markersize=5)


def write_value(axes: Axes, row: int, text: str) -> None:
    axes.text(0.02, row, text, va="center", size=8, transform=axes.get_yaxis_transform())


def step_axis(axes: Axes, steps, narrow: bool) -> None:
    last = steps[-1]
    axes.set_xlim(0, last * 1.01)
    axes.xaxis.set_major_locator(
        MaxNLocator(4 if narrow else 7, integer=True, steps=[1, 2, 2.5, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.set_xlabel("step", loc="right", labelpad=1)


def value_axis(axes: Axes, narrow: bool, percent_scale: bool = True) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 5, steps=[1, 2, 2.5, 5, 10]))
    if percent_scale:
        axes.margins(x=0.08)


def accuracy_limits(curves) -> tuple[float, float]:
    """Limits in per cent that hold all (steps, shares) after the first twentieth of the run."""
    last = max((x[-1] for x, _ in curves if len(x)), default=0)
    late = [y[(x > last / 20) & np.isfinite(y)] for x, y in curves]
    values = np.concatenate([*late, np.empty(0)])
    if len(values) == 0:
        return 0.0, 100.0
    low, high = 100 * values.min(), 100 * values.max()
    step = 10 if high - low > 20 else 2 if high - low > 4 else 0.5
    bottom = max(0.0, step * np.floor((low - 0.5) / step))
    return bottom, min(100.0, high + 0.08 * (high - bottom))


def bins_for(narrow: bool) -> int:
    return 160 if narrow else 360


def value_at(wanted: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y at each wanted x, or at the last x before it."""
    if len(wanted) == 0:
        return np.empty(0)
    return y[np.clip(np.searchsorted(x, wanted, side="right") - 1, 0, len(y) - 1)]
