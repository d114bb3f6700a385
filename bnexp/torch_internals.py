"""The private names of torch that bnexp relies on, each with a test that it is still there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.parameter import is_lazy

Function = TypeVar("Function", bound=Callable)

__all__ = ["BatchNormBase", "has_hooks", "in_backward", "is_lazy", "original_module"]


def original_module(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or `model` itself.

    Layers are thus named alike with and without compiling.
    """
    return getattr(model, "_orig_mod", model)


def in_backward() -> bool:
    """True where activation checkpointing runs a forward pass again, inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def outside_of_graphs(function: Function) -> Function:
    """`function`, called as it is by compiled code.

    Unlike `torch.compiler.disable`, this imports the compiler, for a second, when it is called
    first.
    """
    return torch._disable_dynamo(function)


def version(tensor: Tensor) -> int:
    """How often the tensor was written to in place, through itself or a view of it."""
    return tensor._version


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` calls forward hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
