"""What forward passes that share one thread may set for themselves, each for its own stretch.

A pass may wait inside `torch.autocast`, `sdpa_kernel`, `redirect_stdout`, a function mode and the
like. It then puts back what held when the sweep began, and takes its own up again as it goes on.
(Context variables belong to the greenlet anyway.)
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from bnexp import torch_internals as internals

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _attribute(holder: Any, name: str) -> Setting:
    return partial(getattr, holder, name), partial(setattr, holder, name)


def _or_none(setting: Setting) -> Setting:
    """For what torch refuses to tell where old and new names of a setting were both used."""
    read, write = setting

    def read_or_none() -> Any:
        try:
            return read()
        except RuntimeError:
            return None

    return read_or_none, lambda value: value if value is None else write(value)


def _settings() -> list[Setting]:
    """How each setting is read, and how it is written."""
    backends = torch.backends
    found: list[Setting] = [
        (internals.default_device, internals.put_back_default_device),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
        (torch.get_num_threads, torch.set_num_threads),
        _or_none((torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)),
        (backends.cuda.flash_sdp_enabled, backends.cuda.enable_flash_sdp),
        (backends.cuda.mem_efficient_sdp_enabled, backends.cuda.enable_mem_efficient_sdp),
        (backends.cuda.math_sdp_enabled, backends.cuda.enable_math_sdp),
        (backends.cuda.cudnn_sdp_enabled, backends.cuda.enable_cudnn_sdp),
        (internals.attention_order, internals.set_attention_order),
        (backends.mha.get_fastpath_enabled, backends.mha.set_fastpath_enabled),
        *(_attribute(backends.cudnn, key) for key in ("enabled", "benchmark", "deterministic")),
        _or_none(_attribute(backends.cudnn, "allow_tf32")),
        _attribute(backends.mkldnn, "enabled"),
        (np.geterr, lambda value: np.seterr(**value)),
        *(_attribute(sys, key) for key in ("stdin", "stdout", "stderr")),
        *(_attribute(warnings, key) for key in ("filters", "showwarning", "_showwarnmsg_impl")),
        (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    ]
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    for kind in (kind for kind, present in there.items() if present):
        for read, write in (
            (torch.is_autocast_enabled, torch.set_autocast_enabled),
            (torch.get_autocast_dtype, torch.set_autocast_dtype),
        ):
            found.append((partial(read, kind), partial(write, kind)))
    if torch.cuda.is_initialized():
        found.append((torch.cuda.current_device, torch.cuda.set_device))
        found.append((torch.cuda.current_stream, torch.cuda.set_stream))
    return found


class PassSettings:
    """What holds when this is made, for `elsewhere`."""

    def __init__(self) -> None:
        self._settings = _settings()
        self._base = [read() for read, _ in self._settings]
        self._inference = torch.is_inference_mode_enabled()
        self._function_modes = internals.function_modes()
        self._device_mode = internals.default_device()[0]
        self._dispatch_modes = internals.dispatch_modes()
        self._hooks = internals.saved_tensor_hooks()

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Within the block the base holds, behind it again what the pass had set."""
        with contextlib.ExitStack() as stack:
            self._put_aside(stack.callback)
            if torch.is_inference_mode_enabled() != self._inference:
                stack.enter_context(torch.inference_mode(self._inference))
            self._write_base(stack.callback)
            yield

    def hold(self) -> bool:
        """Whether the base holds."""
        return (
            all(
                _same(read(), base)
                for (read, _), base in zip(self._settings, self._base, strict=True)
            )
            and torch.is_inference_mode_enabled() == self._inference
            and internals.function_modes() == self._function_modes
            and internals.dispatch_modes() == self._dispatch_modes
            and internals.saved_tensor_hooks() == self._hooks
        )

    def restore(self) -> None:
        """Back to the base, from what a pass left that was cut short; but for modes and hooks, as
        leaving a block takes them off: of `torch.set_default_device` alone the mode stays behind.
        """
        own, base = internals.default_device()[0], self._device_mode
        if own is not base:
            modes = tuple(mode for mode in internals.function_modes() if mode is not own)
            internals.set_function_modes((base, *modes) if base in self._function_modes else modes)
        self._write_base(lambda *_: None)

    def _put_aside(self, undo: Callable) -> None:
        """Leave what is bound to the order in which it was entered."""
        if (modes := internals.function_modes()) != self._function_modes:
            undo(internals.set_function_modes, modes)
            internals.set_function_modes(self._function_modes)
        while internals.dispatch_modes() > self._dispatch_modes:
            undo(internals.push_dispatch_mode, internals.pop_dispatch_mode())
        while (hooks := internals.saved_tensor_hooks()) not in (self._hooks, None):
            internals.pop_saved_tensor_hooks()
            undo(internals.push_saved_tensor_hooks, hooks)

    def _write_base(self, undo: Callable) -> None:
        for (read, write), base in zip(self._settings, self._base, strict=True):
            own = read()
            if not _same(own, base):
                undo(write, own)
                write(base)


def _same(own: Any, base: Any) -> bool:
    # Lists (of warning filters) are changed in place.
    return own is base or (not isinstance(own, list) and own == base)
