"""Is what was read what would have been written? Checkpoints may come from anyone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bnexp.errors import UserError, shown


def require_like(own: Any, found: Any, where: str, finite: bool = True) -> None:
    """UserError where `found` differs from `own`, both trees of tensors and plain values, in more
    than the values: keys, lengths, types, shapes and dtypes. With `finite`, also where a number is
    not."""
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor) or found.shape != own.shape or found.dtype != own.dtype:
            raise UserError(f"{where} is {_described(found)}, not {_described(own)}")
        if finite and found.is_floating_point() and not bool(found.isfinite().all()):
            raise UserError(f"{where} has values that are not finite")
    elif isinstance(own, Mapping):
        if not isinstance(found, Mapping) or own.keys() != found.keys():
            keys = own.keys() ^ found.keys() if isinstance(found, Mapping) else own.keys()
            raise UserError(f"{where} has other parts: {shown(sorted(map(str, keys))[:5])}")
        for key in own:
            require_like(own[key], found[key], f"{where}.{key}", finite)
    elif isinstance(own, list | tuple):
        if not isinstance(found, type(own)) or len(own) != len(found):
            raise UserError(f"{where} has another length")
        for i, (a, b) in enumerate(zip(own, found, strict=True)):
            require_like(a, b, f"{where}[{i}]", finite)
    elif type(own) is not type(found) or (isinstance(found, float) and not math.isfinite(found)):
        raise UserError(f"{where} is {shown(found)}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
