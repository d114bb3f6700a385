"""The batch-normalization layers of a model: finding them, and standing in for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from bnexp.errors import UserError
from bnexp.nn.batchnorm import TrackedBatchNorm

# (name of the layer, input, weight, bias, eps) -> normalized input
Normalize = Callable[[str, Tensor, Tensor | None, Tensor | None, float], Tensor]


def original_module(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or `model` itself.

    Layers are thus named alike with and without compiling.
    """
    return getattr(model, "_orig_mod", model)


def batchnorm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> BN layer (`torch.nn`'s or bnexp's), in module order.

    A layer registered under several names appears once, under the first. A model wrapped by
    `torch.compile` has the names of the model inside. Mutates nothing.

    Raises UserError for BN layers inside TorchScript, which cannot be reached, and for lazy
    layers that have not seen their first batch.
    """
    layers = {}
    for name, module in original_module(model).named_modules():
        if isinstance(module, _BatchNorm):
            if is_lazy(module.weight) or is_lazy(module.running_mean):
                raise UserError(
                    f"BN layer {name!r} is lazy and has no shape yet: run the model once first"
                )
            layers[name] = module
        elif isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name:
            raise UserError(
                f"BN layer {name!r} is compiled by TorchScript and cannot be reached: "
                "use the model it was scripted or traced from"
            )
    return layers


def settle(layers: Iterable[nn.Module]) -> None:
    """Let the trackers of bnexp's layers take in the last mini-batch, so buffers are up to date."""
    for layer in layers:
        if isinstance(layer, TrackedBatchNorm):
            layer.settle()


@contextlib.contextmanager
def normalized_by(layers: dict[str, nn.Module], normalize: Normalize) -> Iterator[None]:
    """Within the block `normalize` does the work of the layers, whose buffers are not touched.

    A layer of torch's or bnexp's own class is stood in for as a whole. A subclass with a
    `forward` of its own (an activation inside, another order of dimensions) runs it, in
    inference mode, and only its call of `F.batch_norm` is answered; a subclass that makes no
    such call raises UserError, rather than being guessed at.
    """
    plain = (_BatchNorm.forward, SyncBatchNorm.forward, TrackedBatchNorm.forward)
    saved = []
    try:
        for name, layer in layers.items():
            attributes = vars(layer)
            saved.append((layer, layer.training, attributes.get("forward")))
            layer.training = False
            if type(layer).forward in plain and "forward" not in attributes:
                attributes["forward"] = _stand_in(name, layer, normalize)
            else:
                attributes["forward"] = _intercepted(name, layer, normalize)
        yield
    finally:
        for layer, training, forward in saved:
            layer.training = training
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward


def _stand_in(name: str, layer: nn.Module, normalize: Normalize) -> Callable:
    def forward(input: Tensor) -> Tensor:
        layer._check_input_dim(input)
        return normalize(name, input, layer.weight, layer.bias, layer.eps)

    return forward


def _intercepted(name: str, layer: nn.Module, normalize: Normalize) -> Callable:
    own = layer.forward

    def forward(*args, **kwargs):
        with _Interceptor(name, normalize) as interceptor:
            result = own(*args, **kwargs)
        if not interceptor.called:
            raise UserError(
                f"BN layer {name!r} is a {type(layer).__name__} with a forward of its own that "
                "does not call torch.nn.functional.batch_norm: bnexp cannot tell what it normalizes"
            )
        return result

    return forward


class _Interceptor(TorchFunctionMode):
    def __init__(self, name: str, normalize: Normalize) -> None:
        super().__init__()
        self._name = name
        self._normalize = normalize
        self.called = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        self.called = True
        return self._batch_norm(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input,
        running_mean,
        running_var,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
    ):
        return self._normalize(self._name, input, weight, bias, eps)
