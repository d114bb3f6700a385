"""Numbers as sentences and tables show them."""

from __future__ import annotations

import math


def percent(share: float, digits: int = 1) -> str:
    """0.917 -> 91.7 %"""
    return f"{100 * share:.{digits}f} %"


def count(n: int) -> str:
    """10000 -> 10,000"""
    return f"{n:,}"


def points(difference: float, digits: int) -> str:
    """A difference of shares in percentage points: -0.021 -> −2.10"""
    text = f"{100 * difference:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def signed(difference: float, digits: int | None = None) -> str:
    """A difference of shares in percentage points: 0.021 -> +2.10, -0.021 -> −2.10"""
    text = points(difference, decimals(difference) if digits is None else digits)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def signed_interval(interval: tuple[float, float], digits: int | None = None) -> str:
    """(-0.00023, 0.0209) -> −0.02 to +2.09, in percentage points"""
    digits = decimals(max(interval, key=abs)) if digits is None else digits
    return f"{signed(interval[0], digits)} to {signed(interval[1], digits)}"


def interval_percent(interval: tuple[float, float]) -> str:
    """(0.911, 0.922) -> 95 % interval 91.1 to 92.2 %"""
    return f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def p_value(p: float) -> str:
    """0.0002 -> p < 0.001; 0.0312 -> p = 0.031; 0.6171 -> p = 0.62"""
    if p < 0.001:
        return "p < 0.001"
    if p >= 0.995:
        return "p = 1"
    text = f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"
    return f"p = {text}"


def decimals(difference: float) -> int:
    """Decimals of a percentage that show two digits of the difference; from two to six."""
    if difference == 0:
        return 2
    return min(max(2, 1 - math.floor(math.log10(abs(100 * difference)))), 6)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]
