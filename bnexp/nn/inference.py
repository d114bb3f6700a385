"""Inference that leaves no trace: every module in inference mode, all of it put back at the end."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inference mode for all modules of `model`, without gradients.

    On exit, also after an exception, every module's training flag, the buffers that forward passes
    changed (BN layers' own are left to whoever exchanges them) and the states of the random
    generators (torch's, numpy's, Python's) are as before. Flags are set directly: a module whose
    `train()` does more than that doesn't see it called.
    """
    training = {module: module.training for module in model.modules()}
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type != "cpu"}
    with contextlib.ExitStack() as stack:
        for kind in sorted({d.type for d in devices} & {"cuda", "xpu"}):
            indices = [d.index or 0 for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.callback(random.setstate, random.getstate())
        if (numpy_random := sys.modules.get("numpy.random")) is not None:
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        # The fused encoder layer takes any norm1 and norm2 for LayerNorm.
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(_set_training, training)
        _set_training(dict.fromkeys(training, False))
        stack.callback(_restore_buffers, _buffers(model))
        stack.enter_context(torch.no_grad())
        yield


def eagerly() -> contextlib.AbstractContextManager:
    """Compiled code does not run: it has the BN layers' own forward built in."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _set_training(flags: dict[nn.Module, bool]) -> None:
    for module, flag in flags.items():
        module.training = flag


_Buffers = list[tuple[nn.Module, dict[str, Tensor | None], list[tuple[Tensor, int, Tensor]]]]


def _buffers(model: nn.Module) -> _Buffers:
    """The buffers of each module but BN layers, with copies of their values."""
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
