"""Statistics that a forward pass uses without calling the BN layer they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from bnexp.errors import UserError
from bnexp.nn.find import all_batchnorms
from bnexp.torch_internals import BatchNormBase, original_module

_STATISTICS = ("running_mean", "running_var")


class UnseenStatistics(TorchFunctionMode):
    """What uses running statistics behind the layers' backs in the forward passes of a block.

    In inference some blocks read a BN layer's buffers and fold them into a convolution, without
    calling the layer (mmengine's `efficient_conv_bn_eval`, RepVGG), and some modules call
    `F.batch_norm` on buffers of their own. Whoever stands in for the calls of BN layers meets
    neither: these go on with what is in the buffers.

    read: the BN layers, by name, whose buffers were read though the layer was not called.
    own: the modules, by name, that gave buffers of their own to `F.batch_norm`.
    behind: the BN layers that were called after the first of either.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = original_module(model)
        layers = all_batchnorms(model)
        self._names = {id(layer): name for name, layer in layers.items()}
        self._buffers = {
            id(getattr(layer, key)): name
            for name, layer in layers.items()
            for key in _STATISTICS
            if getattr(layer, key) is not None
        }
        self._others = {
            id(buffer): name.rpartition(".")[0]
            for name, buffer in model.named_buffers()
            if id(buffer) not in self._buffers
        }
        self._read: list[str] = []
        self._calls: list[tuple[str, bool]] = []
        self.own: list[str] = []

    @property
    def read(self) -> list[str]:
        called = {name for name, _ in self._calls}
        return [name for name in self._read if name not in called]

    @property
    def behind(self) -> list[str]:
        return list(dict.fromkeys(name for name, late in self._calls if late))

    def __enter__(self) -> UnseenStatistics:
        self._handle = register_module_forward_pre_hook(self._note_call)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()
        super().__exit__(*exception)

    def _note_call(self, module: nn.Module, args: Any) -> None:
        if (name := self._names.get(id(module))) is not None:
            self._calls.append((name, bool(self._read or self.own)))
        elif isinstance(module, BatchNormBase) and module.training:
            self._refuse_strangers(args, module.running_mean, module.running_var, training=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for tensor in tensors:
            if (name := self._buffers.get(id(tensor))) is not None and name not in self._read:
                self._read.append(name)
            if func in (F.batch_norm, torch.batch_norm):
                owner = self._others.get(id(tensor))
                if owner is not None and owner not in self.own:
                    self.own.append(owner)
        if func is F.batch_norm:
            self._refuse_strangers(*args, **kwargs)
        return func(*args, **kwargs)

    def _refuse_strangers(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, *_, **__
    ) -> None:
        """Who holds them puts them back; what is no part of the model nobody holds."""
        if not training or running_mean is None:
            return
        if not {id(running_mean), id(running_var)} & {*self._buffers, *self._others}:
            raise UserError(
                "a BN layer that is no part of the model (in a plain list or dict? use "
                "nn.ModuleList or nn.ModuleDict) is called in training mode, which changes its "
                "running averages: make it a part, or put it in inference mode, `.eval()`"
            )

    def warning(self) -> str | None:
        """One line that says what follows for which layers; None where nothing was found."""
        found = []
        if read := self.read:
            found.append(
                f"BN layers {_listed(read)} are not called, but their buffers are read (by a block "
                "that folds them into its convolution in inference, say)"
            )
        if self.own:
            found.append(
                f"modules {_listed(self.own)} call batch_norm on buffers of their own, which are "
                "no BN layers'"
            )
        if not found:
            return None
        behind = (
            f"the BN layers behind ({_listed(self.behind)})"
            if self.behind
            else "whatever is behind"
        )
        return (
            f"{' and '.join(found)}: they get no statistics here and normalize with what is in "
            f"their buffers, on which the statistics of {behind} rest; call the layers, in the "
            "blocks' training form, to have all right"
        )


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = [repr(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
