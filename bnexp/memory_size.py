"""Amounts of memory as people write them: "2GiB", "500MB", "50%"."""

from __future__ import annotations

import re

from bnexp.errors import UserError, shown

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_NUMBER = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*"
_SIZE = re.compile(_NUMBER + r"([KMGT]I?)?B?\s*", re.IGNORECASE)
_SHARE = re.compile(_NUMBER + r"%\s*")


def parse_memory(memory: int | float | str) -> int | float:
    """An int, bytes, or a float in (0, 1], a share of what is free.

    An int or a string such as "2GiB" means bytes, a float or a string such as "30%" a share.
    Raises UserError for anything else, and for nothing or less.
    """
    amount: int | float | None = None
    if isinstance(memory, str):
        if share := _SHARE.fullmatch(memory):
            amount = float(share[1]) / 100
        elif size := _SIZE.fullmatch(memory):
            amount = int(min(float(size[1]) * _UNITS[(size[2] or "").upper()], 2.0**63))
    elif not isinstance(memory, bool) and isinstance(memory, int | float):
        amount = memory
    if amount is None or not amount > 0 or (isinstance(amount, float) and amount > 1):
        raise UserError(
            f"memory={shown(memory)} is not an amount of memory: write '2GiB', a number of bytes, "
            "'50%' or a share between 0 and 1"
        )
    return amount


def format_bytes(size: float) -> str:
    """`size` bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
