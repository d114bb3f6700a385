"""The private names of torch that bnexp relies on, each with a test that it is still there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch

SavedTensorHooks = tuple[Callable, Callable]


def function_modes() -> int:
    """How many function modes this thread has entered."""
    return overrides._len_torch_function_stack()


def pop_function_mode() -> Any:
    return overrides._pop_mode()


def push_function_mode(mode: Any) -> None:
    overrides._push_mode(mode)


def dispatch_modes() -> int:
    """How many dispatch modes this thread has entered."""
    return _python_dispatch._len_torch_dispatch_stack()


def pop_dispatch_mode() -> Any:
    return _python_dispatch._pop_mode()


def push_dispatch_mode(mode: Any) -> None:
    _python_dispatch._push_mode(mode)


def saved_tensor_hooks() -> SavedTensorHooks | None:
    """The innermost (pack, unpack) that autograd saves tensors by in this thread."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def pop_saved_tensor_hooks() -> None:
    torch._C._autograd._pop_saved_tensors_default_hooks()


def push_saved_tensor_hooks(hooks: SavedTensorHooks) -> None:
    torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def storage_key(storage: torch.UntypedStorage) -> int:
    """What tells a living storage from all others, whichever Python object stands for it."""
    return storage._cdata


def attention_order() -> list[int]:
    """Kernels of scaled dot product attention by preference, as numbers."""
    return torch._C._get_sdp_priority_order()


def set_attention_order(order: list[int]) -> None:
    torch._C._set_sdp_priority_order(order)
