"""Standing in for the batch normalization layers of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from bnexp.errors import UserError
from bnexp.nn.calls import AnsweredCalls, BatchNormCall
from bnexp.nn.find import is_plain
from bnexp.torch_internals import BatchNormBase, in_transform

# (name of the layer, input, weight, bias, eps) -> normalized input
Normalize = Callable[[str, Tensor, Tensor | None, Tensor | None, float], Tensor]


@contextlib.contextmanager
def normalized_by(layers: Mapping[str, BatchNormBase], normalize: Normalize) -> Iterator[None]:
    """Within the block `normalize` does the work of the layers, whose buffers are not touched.

    A layer of torch's or bnexp's own class is stood in for as a whole. A subclass with a
    `forward` of its own (an activation inside, another order of dimensions) runs it, in
    inference mode, and only its call of `F.batch_norm` is answered; a subclass that makes no
    such call raises UserError, rather than being guessed at, and so does a call with an input
    that holds no values of its own (on the meta device, inside `torch.vmap`).
    """
    saved = []
    try:
        for name, layer in layers.items():
            attributes = vars(layer)
            saved.append((layer, layer.training, attributes.get("forward")))
            layer.training = False
            stand_in = _stand_in if is_plain(layer) else _intercepted
            attributes["forward"] = stand_in(name, layer, normalize)
        yield
    finally:
        for layer, training, forward in saved:
            layer.training = training
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward


def _stand_in(name: str, layer: BatchNormBase, normalize: Normalize) -> Callable:
    def forward(input: Tensor) -> Tensor:
        layer._check_input_dim(input)
        _check_values(name, input)
        return normalize(name, input, layer.weight, layer.bias, layer.eps)

    return forward


def _intercepted(name: str, layer: BatchNormBase, normalize: Normalize) -> Callable:
    own = layer.forward

    def answer(call: BatchNormCall) -> Tensor:
        _check_values(name, call.input)
        return normalize(name, call.input, call.weight, call.bias, call.eps)

    def forward(*args, **kwargs):
        with AnsweredCalls(name, layer, answer) as calls:
            result = own(*args, **kwargs)
        calls.check()
        return result

    return forward


def _check_values(name: str, input: Tensor) -> None:
    if input.is_meta:
        raise UserError(
            f"the input of BN layer {name!r} is on the meta device, without values: move model "
            "and batches to a real one"
        )
    if in_transform(input):
        raise UserError(
            f"BN layer {name!r} is called inside torch.vmap or another transform of torch.func, "
            "where one input stands for many: run each model by itself, without the transform"
        )
