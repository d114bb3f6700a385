"""Config keys as people write them: `training.optimizer.lr`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def within(key: str, sections: Iterable[str]) -> bool:
    """Whether the dotted `key` is one of `sections` or lies in one."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)
