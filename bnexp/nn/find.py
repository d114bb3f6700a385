"""The batch normalization layers of a model, by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.nn.batchnorm import TrackedBatchNorm
from bnexp.torch_internals import BatchNormBase, is_lazy, original_module

_PLAIN_FORWARDS = (BatchNormBase.forward, nn.SyncBatchNorm.forward, TrackedBatchNorm.forward)


def all_batchnorms(model: nn.Module) -> dict[str, BatchNormBase]:
    """Qualified name -> BN layer, of whatever class and in whatever state, in module order.

    A layer registered under several names appears once, under the first. A model wrapped by
    `torch.compile` has the names of the model inside. Mutates nothing.
    """
    return {
        name: module
        for name, module in original_module(model).named_modules()
        if isinstance(module, BatchNormBase)
    }


def batchnorm_layers(model: nn.Module) -> dict[str, BatchNormBase]:
    """`all_batchnorms`, all of them usable.

    Raises UserError for BN layers inside TorchScript, which cannot be reached, and for lazy
    layers that have not seen their first batch.
    """
    for name, module in original_module(model).named_modules():
        if isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name:
            raise UserError(
                f"BN layer {name!r} is compiled by TorchScript and cannot be reached: "
                "use the model it was scripted or traced from"
            )
    layers = all_batchnorms(model)
    for name, layer in layers.items():
        if is_lazy(layer.weight) or is_lazy(layer.running_mean):
            raise UserError(
                f"BN layer {name!r} is lazy and has no shape yet: run the model once first"
            )
    return layers


def without_layers(model: nn.Module) -> str:
    """That a model without BN layers has none, and what normalizes with statistics in their place,
    such as torchvision's `FrozenBatchNorm2d`."""
    others = [
        f"{name!r} ({type(module).__name__})"
        for name, module in original_module(model).named_modules()
        if getattr(module, "running_var", None) is not None
    ]
    if not others:
        return "the model has no BN layer"
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    return (
        f"the model has no BN layer of torch.nn; {', '.join(others[:3])}{more} keep statistics of "
        "their own, which are left as they are"
    )


def layer_eps(model: nn.Module) -> dict[str, float]:
    """Qualified name -> `eps` of the BN layers of `model`."""
    return {name: layer.eps for name, layer in all_batchnorms(model).items()}


def refuse_replicas(model: nn.Module) -> None:
    """Raise UserError where `nn.DataParallel` would run copies of BN layers side by side."""
    for name, module in original_module(model).named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise UserError(
                f"{repr(name) if name else 'the model'} is a DataParallel on "
                f"{len(module.device_ids)} devices, whose copies of a BN layer see parts of a "
                "batch each: use the module inside, `.module`"
            )


def refuse_meetings(model: nn.Module) -> None:
    """Raise UserError where a forward pass meets those of other ranks, who may have none to run."""
    for name, module in original_module(model).named_modules():
        data_parallel = isinstance(module, nn.parallel.DistributedDataParallel)
        if data_parallel and module.process_group.size() > 1:
            raise UserError(
                f"{repr(name) if name else 'the model'} is a DistributedDataParallel, whose "
                "forward pass waits for the other ranks': use the module inside, `.module`"
            )


def is_plain(layer: BatchNormBase) -> bool:
    """Whether the layer is batch normalization and nothing else, without a `forward` of its own."""
    return type(layer).forward in _PLAIN_FORWARDS and "forward" not in vars(layer)


def flush(layers: Iterable[nn.Module]) -> None:
    """Let the trackers of bnexp's layers take in the last mini-batch, so buffers are up to date."""
    for layer in layers:
        if isinstance(layer, TrackedBatchNorm):
            layer.flush()
