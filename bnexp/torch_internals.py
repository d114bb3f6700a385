"""The private names of torch that bnexp relies on, each with a test that it is still there."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn, overrides
from torch.nn import parameter
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase  # noqa: F401
from torch.utils import _device, _python_dispatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)
SavedTensorHooks = tuple[Callable, Callable]


def original_module(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or `model` itself.

    Layers are thus named alike with and without compiling.
    """
    return getattr(model, "_orig_mod", model)


def is_lazy(tensor: Tensor | None) -> bool:
    """Whether it is a parameter or buffer of a lazy layer, without shape so far."""
    return tensor is not None and parameter.is_lazy(tensor)


def in_backward() -> bool:
    """True where activation checkpointing runs a forward pass again, inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def in_transform(tensor: Tensor) -> bool:
    """Whether `tensor` stands for others inside `torch.vmap` or a transform of `torch.func`."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def outside_of_graphs(function: Callable[[], None]) -> Callable[[], None]:
    """`function`, called as it is by compiled code.

    Unlike `torch.compiler.disable`, this does not import the compiler, which takes as long as
    importing torch: without it there is no compiled code.
    """
    disabled = torch._disable_dynamo(function)

    def call() -> None:
        if "torch._dynamo" in sys.modules:
            disabled()
        else:
            function()

    return call


def without_compiler(kind: type[Optimizer]) -> type[Optimizer]:
    """The optimizer `kind` as a class of its own that does not import torch's compiler, which takes
    as long as importing torch. Its `step` takes no closure and can't be differentiated or compiled.
    """
    methods = ("state_dict", "load_state_dict", "zero_grad", "add_param_group")
    plain: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in methods}
    plain["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), plain)


def version(tensor: Tensor) -> int:
    """How often the tensor was written to in place, through itself or a view of it."""
    return tensor._version


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` calls forward hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def without_function_modes() -> AbstractContextManager:
    """Within the block no function mode, nor any subclass of Tensor, is asked what to do."""
    return torch._C.DisableTorchFunction()


def function_modes() -> tuple[Any, ...]:
    """The function modes that this thread has entered, the outermost first."""
    return tuple(overrides._get_current_function_mode_stack())


def set_function_modes(modes: tuple[Any, ...]) -> None:
    while overrides._len_torch_function_stack():
        overrides._pop_mode()
    for mode in modes:
        overrides._push_mode(mode)


def default_device() -> tuple[Any, torch.device | None]:
    """What `torch.set_default_device` set in this thread: the function mode that does it, which it
    takes off the next time, and the device, which is also that of a `torch.device` block.
    """
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None), _device.CURRENT_DEVICE


def put_back_default_device(found: tuple[Any, torch.device | None]) -> None:
    """As it was when `default_device` found it, but for the function mode."""
    torch._GLOBAL_DEVICE_CONTEXT.device_context, _device.CURRENT_DEVICE = found


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


def attention_order() -> tuple[int, ...]:
    """Kernels of scaled dot product attention by preference, as numbers."""
    return tuple(torch._C._get_sdp_priority_order())


def set_attention_order(order: tuple[int, ...]) -> None:
    torch._C._set_sdp_priority_order(list(order))


def timeout_of(group: ProcessGroup) -> timedelta:
    """After which the collectives of a process group give up."""
    return group._get_backend(group._device_types[0]).options._timeout
