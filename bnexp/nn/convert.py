"""Turning the batch normalization layers of a model into bnexp's."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from bnexp.errors import UserError
from bnexp.nn.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    TrackedBatchNorm,
)
from bnexp.nn.find import all_batchnorms

Model = TypeVar("Model", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}


def convert_batchnorm(model: Model) -> Model:
    """Turn every `torch.nn.BatchNorm1d/2d/3d` (and lazy one) in `model` into bnexp's, in place.

    A layer stays the same object and only its class changes, so tensors, optimizers, hooks,
    names, shared modules and training flags are untouched, and `model` itself may be the layer.
    Layers that are bnexp's already are left alone, and so are subclasses of `torch.nn`'s layers
    (timm's `BatchNormAct2d`, say): their own `forward` defines what they compute.

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
    for layer in model.modules():
        if type(layer) in _OURS:
            layer.__class__ = _OURS[type(layer)]
    return model


def restore_batchnorm(model: Model) -> Model:
    """The inverse of `convert_batchnorm`: bnexp's layers become `torch.nn`'s again, in place.

    What only bnexp's layers know (ghost batches, freezing) is forgotten. Returns `model`.

    Raises:
        UserError: if a `StatisticsTracker` is attached; close it first.
    """
    theirs = {ours: parent for parent, ours in _OURS.items()}
    layers = [layer for layer in model.modules() if type(layer) in theirs]
    if any(getattr(layer, "slot", None) is not None for layer in layers):
        raise UserError("a StatisticsTracker is attached to the model; close() it first")
    for layer in layers:
        for name in ("normalization_batch", "frozen"):
            layer.__dict__.pop(name, None)
        layer.__class__ = theirs[type(layer)]
    return model


def unsupported_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> BN layer that `convert_batchnorm` leaves as it is: a foreign subclass or
    `SyncBatchNorm`."""
    ours = (TrackedBatchNorm, *_OURS.values())
    return {
        name: layer
        for name, layer in all_batchnorms(model).items()
        if not isinstance(layer, ours) and type(layer) not in _OURS
    }
