"""Calls of `torch.nn.functional.batch_norm` within a layer, and answering them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnexp.errors import UserError
from bnexp.torch_internals import BatchNormBase


class BatchNormCall(NamedTuple):
    """The arguments of `F.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class AnsweredCalls(TorchFunctionMode):
    """Within the block `answer` takes the place of `F.batch_norm` where `layer` calls it.

    That is every call, unless the layer has BN layers inside, which call it as well: then those
    with its own `running_mean`. `name` is for the UserError that `check` raises if there was none.
    """

    def __init__(
        self, name: str, layer: BatchNormBase, answer: Callable[[BatchNormCall], Tensor]
    ) -> None:
        super().__init__()
        self._name = name
        self._layer = layer
        self._answer = answer
        self._called = False
        self._shares = any(
            isinstance(module, BatchNormBase) for module in layer.modules() if module is not layer
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        call = BatchNormCall(*args, **kwargs)
        if self._shares and call.running_mean is not self._layer.running_mean:
            return func(*args, **kwargs)
        self._called = True
        return self._answer(call)

    def check(self) -> None:
        if not self._called:
            raise UserError(
                f"BN layer {self._name!r} is a {type(self._layer).__name__} with a forward of its "
                "own that does not call torch.nn.functional.batch_norm: bnexp cannot tell what it "
                "normalizes"
            )
