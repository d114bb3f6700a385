"""Forward passes that leave no trace, and what BN layers do in them."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inference mode for all modules, no gradients; RNG states, training flags and buffers that
    the forward passes change are restored at the end."""
    training = [module for module in model.modules() if module.training]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type != "cpu"}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        for kind in sorted({d.type for d in devices} & {"cuda", "xpu"}):
            indices = [d.index or 0 for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.callback(random.setstate, random.getstate())
        if (numpy_random := sys.modules.get("numpy.random")) is not None:
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        stack.enter_context(eagerly())
        # The fused encoder layer takes any norm1 and norm2 for LayerNorm.
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(lambda: [setattr(module, "training", True) for module in training])
        for module in training:
            module.training = False
        stack.callback(_restore_buffers, _buffers(model))
        stack.enter_context(torch.no_grad())
        yield


_Buffers = list[tuple[nn.Module, dict[str, Tensor | None], list[tuple[Tensor, int, Tensor]]]]


def _buffers(model: nn.Module) -> _Buffers:
    """The buffers of each module but BN layers, whose own are never touched, with copies."""
    return [
        (
            module,
            dict(module._buffers),
            [
                (buffer, buffer._version, buffer.clone())
                for buffer in module._buffers.values()
                if buffer is not None and not buffer.is_inference()
            ],
        )
        for module in model.modules()
        if module._buffers and not isinstance(module, _BatchNorm)
    ]


def _restore_buffers(saved: _Buffers) -> None:
    for module, buffers, values in saved:
        module._buffers.update(buffers)
        for buffer, version, value in values:
            if buffer._version != version:
                buffer.copy_(value)


def eagerly() -> contextlib.AbstractContextManager:
    """Compiled code must not run: it has the BN layers' own forward built in."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


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
