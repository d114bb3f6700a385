"""Turning the batch normalization layers of a model into bnexp's."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from bnexp.errors import UserError
from bnexp.nn.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    TrackedBatchNorm,
    followed_class,
    plain_class,
    turn_into,
)
from bnexp.nn.find import all_batchnorms
from bnexp.torch_internals import original_module

Model = TypeVar("Model", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_LAZY = [cls for pair in _OURS.items() for cls in pair if issubclass(cls, LazyModuleMixin)]


def convert_batchnorm(model: Model) -> Model:
    """Turn every `torch.nn.BatchNorm1d/2d/3d` (and lazy one) in `model` into bnexp's, in place.

    A layer stays the same object and only its class changes, so tensors, optimizers, hooks,
    names, shared modules and training flags are untouched, and `model` itself may be the layer.
    Layers that are bnexp's already are left alone, and so are subclasses of `torch.nn`'s layers
    (timm's `BatchNormAct2d`, say): their own `forward` defines what they compute.

    Tools that look for `torch.nn`'s very classes don't know the converted ones: call
    `restore_batchnorm` before `torch.ao.quantization.fuse_modules`. `torch.jit.script` restores
    them by itself.

    Returns:
        `model`.

    Raises:
        UserError: for a `SyncBatchNorm`, whose statistics span processes. Nothing has been
            converted then.
    """
    for name, layer in all_batchnorms(model).items():
        if isinstance(layer, nn.SyncBatchNorm):
            raise UserError(
                f"layer {name or '(the model)'!r} is a SyncBatchNorm, whose statistics span "
                "processes; build the model with BatchNorm layers instead"
            )
    for module in model.modules():
        if type(module) in _OURS:
            turn_into(module, _OURS[type(module)])
    return model


def followed_layers(model: nn.Module) -> dict[str, TrackedBatchNorm]:
    """Qualified name -> BN layer of `model`, all of them such that bnexp can follow and set them.

    As `convert_batchnorm`; and layers of a foreign subclass become ones of a class made from it,
    of the same name, that runs its `forward` and answers the calls of `F.batch_norm` in there.

    Raises:
        UserError: for a `SyncBatchNorm`, or a lazy layer of a foreign class. Nothing has changed
            then.
    """
    for name, layer in all_batchnorms(model).items():
        if isinstance(layer, LazyModuleMixin) and type(layer) not in _LAZY:
            raise UserError(
                f"layer {name!r} is a lazy {type(layer).__name__}, a class of its own: run the "
                "model once first, so that it has a shape"
            )
    convert_batchnorm(original_module(model))
    followed = {}
    for name, layer in all_batchnorms(model).items():
        if not isinstance(layer, TrackedBatchNorm | LazyModuleMixin):
            turn_into(layer, followed_class(type(layer)))
        followed[name] = cast(TrackedBatchNorm, layer)
    return followed


def restore_batchnorm(model: Model) -> Model:
    """The inverse of `convert_batchnorm`: bnexp's layers become `torch.nn`'s again, in place.

    Layers of foreign classes that were taken over become theirs again. What only bnexp's layers
    know (ghost batches, freezing, renormalization) is forgotten. Returns `model`.

    Raises:
        UserError: if a `StatisticsTracker` is attached; close it first.
    """
    if any(getattr(layer, "slot", None) is not None for layer in model.modules()):
        raise UserError("a StatisticsTracker is attached to the model; close() it first")
    for layer in model.modules():
        plain = plain_class(layer)
        if plain is not None:
            for name in ("normalization_batch", "across", "frozen", "limits"):
                layer.__dict__.pop(name, None)
            turn_into(layer, plain)
    return model
