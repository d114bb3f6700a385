"""Folding batch normalization into the convolutions before it, for evaluation."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnexp.nn.calls import AnsweredCalls, BatchNormCall
from bnexp.nn.find import flush, is_plain
from bnexp.torch_internals import BatchNormBase, has_hooks, original_module

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]

_pairs: WeakKeyDictionary[nn.Module, list[Pair]] = WeakKeyDictionary()


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the convolutions of `model` do the work of the BN layers behind them.

    In inference a BN layer is `scale * (x - mean) + bias` with `scale = weight / sqrt(var + eps)`,
    per channel, and so the convolution before it can have its filters multiplied by `scale` and
    `(its bias - mean) * scale + bias` for a bias (Jacob et al. 2018, section 3.2). That is done
    once, in float64, from the running buffers as they are on entry; outputs agree to rounding.

    Folded are `nn.BatchNorm2d`, bnexp's, and subclasses that give their input to `F.batch_norm` and
    use it for nothing else (timm's `BatchNormAct2d`), in eval mode with running buffers, where the
    layer is the only one to use what an `nn.Conv2d` returns; where either is called several times
    or has hooks, nothing changes, and neither in a model that torch.fx can't trace or that
    torch.compile wrapped. The graph is traced once per model: its structure must not change
    afterwards.

    The convolutions are lent other parameters; on exit, also after an exception, they and the BN
    layers have again the very objects they had. Don't train or change statistics inside.
    """
    saved: list[tuple[Pair, dict]] = []
    try:
        for conv, bn in _foldable(model):
            weight, bias = _folded_parameters(conv, bn)
            saved.append(((conv, bn), dict(conv._parameters)))
            conv._parameters.update(weight=weight, bias=bias)
            vars(bn)["forward"] = _passing_on(bn)
        yield model
    finally:
        for (conv, bn), parameters in saved:
            conv._parameters.update(parameters)
            vars(bn).pop("forward", None)


def _foldable(model: nn.Module) -> list[Pair]:
    if model not in _pairs:
        _pairs[model] = _find_pairs(model)
    return [
        (conv, bn)
        for conv, bn in _pairs[model]
        if not bn.training
        and bn.running_mean is not None
        and bn.running_var is not None
        and "forward" not in vars(bn)
        and not (has_hooks(conv) or has_hooks(bn))
    ]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, BatchNormBase) or super().is_leaf_module(module, name)


def _find_pairs(model: nn.Module) -> list[Pair]:
    """The (convolution, BN layer) of `model` where one's output goes to the other alone."""
    if original_module(model) is not model:
        return []
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception:  # whatever a foreign forward raises when it is given a Proxy
        return []
    modules = dict(model.named_modules())
    calls = Counter(modules[node.target] for node in nodes if node.op == "call_module")
    read = {modules[node.target.rpartition(".")[0]] for node in nodes if node.op == "get_attr"}
    pairs = []
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        conv, bn = modules[before.target], modules[node.target]
        if (
            type(conv) is nn.Conv2d
            and isinstance(bn, nn.BatchNorm2d)
            and _normalizes_its_input(bn)
            and list(before.users) == [node]
            and calls[conv] == calls[bn] == 1
            and not {conv, bn} & read
        ):
            pairs.append((conv, bn))
    return pairs


def _normalizes_its_input(bn: nn.BatchNorm2d) -> bool:
    """Whether all that the layer does with its input is one call of `F.batch_norm`."""
    if is_plain(bn):
        return True
    training, bn.training = bn.training, False
    vars(bn)["_check_input_dim"] = lambda input: None  # would branch on what isn't known
    try:
        nodes = list(fx.Tracer().trace(bn).nodes)
    except Exception:  # as above
        return False
    finally:
        bn.training = training
        del vars(bn)["_check_input_dim"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    calls = [node for node in nodes if node.target is F.batch_norm]
    if len(inputs) != 1 or len(calls) != 1:
        return False
    call: Any = BatchNormCall(*calls[0].args, **calls[0].kwargs)  # of nodes, not of tensors
    names = BatchNormCall._fields[1:5]
    of_layer = [None if getattr(bn, name) is None else name for name in names]
    return (
        call.input is inputs[0]
        and [getattr(node, "target", node) for node in call[1:5]] == of_layer
        and call.eps == bn.eps
        and not call.training
        and all(user is calls[0] or _asks_for_shape(user) for user in inputs[0].users)
    )


def _asks_for_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("dim", "size")
    return node.target is getattr and node.args[1] in ("ndim", "shape", "dtype", "device")


@torch.no_grad()
def _folded_parameters(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    flush([bn])
    kind = torch.float32 if conv.weight.device.type == "mps" else torch.float64
    scale = (bn.get_buffer("running_var").to(kind) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.to(kind)
    shift = -bn.get_buffer("running_mean").to(kind)
    if conv.bias is not None:
        shift = shift + conv.bias.to(kind)
    bias = shift * scale
    if bn.bias is not None:
        bias = bias + bn.bias.to(kind)
    weight = conv.weight.to(kind) * scale[:, None, None, None]
    dtype = conv.weight.dtype
    return nn.Parameter(weight.to(dtype), False), nn.Parameter(bias.to(dtype), False)


def _passing_on(bn: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """The layer's forward, with nothing left to be normalized."""
    own = bn.forward
    if is_plain(bn):

        def forward(input: Tensor) -> Tensor:
            bn._check_input_dim(input)
            return input

    else:

        def forward(input: Tensor) -> Tensor:
            with AnsweredCalls(type(bn).__name__, bn, lambda call: call.input):
                return own(input)

    return forward
