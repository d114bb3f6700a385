"""Forward passes that leave no trace, and what BN layers do in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.errors import NotFinite, UserError
from bnexp.statistics.moments import Moments

# Normalizing as x·scale + shift in float32 loses log2(|mean| / std) bits; beyond this ratio it
# is done in float64.
_OFFSET = 32.0


class Done(BaseException):
    """Ends a forward pass whose rest is of no interest."""


def device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def runner(model: nn.Module, device: torch.device, forward: Callable | None) -> Callable:
    def run(batch: Any) -> None:
        if forward is not None:
            forward(model, batch)
            return
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise UserError(
                f"a batch is a tensor, or a tuple or list that starts with one, not a "
                f"{type(x).__name__}: pass forward=lambda model, batch: ..."
            )
        del batch
        x = x.to(device, non_blocking=True)
        model(x)

    return run


def length_of(batches: Iterable) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def no_batches() -> UserError:
    return UserError("there are no batches to recompute from: is the iterator used up?")


@dataclass(frozen=True)
class Fixed:
    """A mean and a variance in the form that normalizes inputs of one dtype."""

    mean: Tensor
    var: Tensor
    wide: bool

    @staticmethod
    def of(m: Moments, dtype: torch.dtype, device: torch.device, wide: bool) -> Fixed:
        dtype = torch.float64 if wide or dtype == torch.float64 else torch.float32
        return Fixed(m.mean.to(dtype).to(device), m.var.to(dtype).to(device), wide)

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        dtype = self.mean.dtype
        weight = weight if weight is None else weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
        if not self.wide:
            return F.batch_norm(x, self.mean, self.var, weight, bias, False, 0.0, eps)
        y = F.batch_norm(x.to(dtype), self.mean, self.var, weight, bias, False, 0.0, eps)
        return y.to(x.dtype)


def is_wide(m: Moments, device: torch.device) -> bool:
    """Whether the means are so far off that normalizing needs float64. Waits for a GPU."""
    if device.type == "mps":
        return False
    mean, m2 = (t.cpu().numpy() for t in (m.mean, m.m2))
    return bool((mean * mean * m.count > _OFFSET**2 * m2).any())


def by_its_own(m: Moments, x: Tensor) -> Fixed:
    wide = x.device.type == "cpu" and is_wide(m, x.device)
    return Fixed.of(m, x.dtype, x.device, wide)


def _values_per_channel(x: Tensor) -> int:
    return x.numel() // x.shape[1] if x.shape[1] else 0


def need_two(name: str, x: Tensor, where: str = "this mini-batch") -> None:
    values = _values_per_channel(x)
    if values < 2:
        raise UserError(
            f"BN layer {name!r}: {where} has {values or 'no'} value{'s' * (values == 0)} per "
            "channel, and its own variance needs two: use larger batches, or drop the last one"
        )


def first_non_finite(parts: list[Moments]) -> int | None:
    """Index of the first moments with NaN or infinity in them. Waits for a GPU."""
    sums = torch.stack([part.mean.sum() + part.m2.sum() for part in parts])
    bad = (~torch.isfinite(sums)).nonzero()
    return int(bad[0]) if len(bad) else None


def non_finite(name: str, number: int) -> NotFinite:
    return NotFinite(
        f"NaN or infinity in the input of BN layer {name!r}, batch number {number} (counted from "
        "0): statistics of it would be worthless; check the data, and the weights"
    )
