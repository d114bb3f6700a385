"""Which layers' statistics the loss hangs on: one backward pass for all of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnexp.nn.inference import inference
from bnexp.nn.layers import batchnorm_layers
from bnexp.statistics.statistics import Statistics

# (model, batch) -> the sum of the samples' losses, and how many there are
Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]


@dataclass(frozen=True, eq=False)
class LayerShare:
    """What one layer's statistics contribute to a difference of losses: `by_mean` and `by_var`,
    float64 (channels,) on the CPU, in the units of the loss."""

    name: str
    by_mean: Tensor
    by_var: Tensor

    @property
    def channels(self) -> Tensor:
        return self.by_mean + self.by_var

    @property
    def loss(self) -> float:
        return float(self.channels.sum())


@dataclass(frozen=True)
class Attribution:
    """How the mean loss under one set of statistics, less that under another, comes about.

    layers: in module order. difference: the true difference on these `samples`. explained: the
    sum of all layers' shares.
    """

    layers: tuple[LayerShare, ...]
    difference: float
    explained: float
    samples: int

    def worst(self, count: int) -> list[LayerShare]:
        """The layers with the largest shares of either sign."""
        return sorted(self.layers, key=lambda layer: -abs(layer.loss))[:count]


def attribute(
    model: nn.Module, batches: Callable[[], Iterable], loss: Loss, first: Statistics,
    second: Statistics,
) -> Attribution | None:
    """Attribute `loss under first - loss under second` to the layers and channels of both.

    With θ the means and variances of all layers together and g the gradient of the mean loss with
    respect to them, the trapezoid of the line from one to the other:

        L(first) - L(second) ≈ ½ (g(first) + g(second)) · (θ_first - θ_second)

    Exact where the loss is quadratic in θ in between; `explained` beside `difference` says how
    good it is. The gradient with respect to all of θ takes one backward pass: with
    `y = w·(x - mean)/s + b` and `s = sqrt(var + eps)`, `dL/dmean = -w/s · dL/db` and
    `dL/dvar = -w/(2 s²) · dL/dw`.

    Takes two passes over what `batches` gives, each forward and backward. The model is as before
    afterwards. None where the loss has no gradient, or is not finite.
    """
    shared = [name for name in first.names if name in second.mean]
    ends = []
    for statistics in (first, second):
        end = _gradients(model, batches(), loss, statistics)
        if end is None:
            return None
        ends.append(end)
    layers = []
    for name in shared:
        steps = [
            (a[name].double() - b[name].double().to(a[name].device)).cpu()
            for a, b in ((first.mean, second.mean), (first.var, second.var))
        ]
        slopes = [(one[name] + other[name]) / 2 for one, other in zip(
            ends[0].gradients, ends[1].gradients, strict=True)]
        layers.append(LayerShare(name, *(s * d for s, d in zip(slopes, steps, strict=True))))
    return Attribution(
        tuple(layers),
        ends[0].loss - ends[1].loss,
        sum(layer.loss for layer in layers),
        ends[0].samples,
    )


@dataclass(frozen=True)
class _End:
    loss: float
    samples: int
    gradients: tuple[dict[str, Tensor], dict[str, Tensor]]


def _gradients(
    model: nn.Module, batches: Iterable, loss: Loss, statistics: Statistics
) -> _End | None:
    """The mean loss and its gradients with respect to the means and the variances."""
    total, samples = 0.0, 0
    with inference(model), statistics.applied_to(model), _differentiable(model) as affine:
        for batch in batches:
            with torch.enable_grad():
                found, n = loss(model, batch)
                if not found.requires_grad or not bool(torch.isfinite(found)):
                    return None
                found.backward()
            total += float(found.detach())
            samples += n
        if not samples:
            return None
        by_mean, by_var = {}, {}
        for name, layer in batchnorm_layers(model).items():
            if name not in statistics.mean:
                continue
            scale = (statistics.var[name].double().cpu() + layer.eps).sqrt()
            weight, bias = affine[name]
            w = weight.detach().double().cpu()
            by_mean[name] = -w / scale * _gradient(bias) / samples
            by_var[name] = -w / (2 * scale**2) * _gradient(weight) / samples
    return _End(total / samples, samples, (by_mean, by_var))


def _gradient(leaf: nn.Parameter) -> Tensor:
    return torch.zeros(leaf.shape).double() if leaf.grad is None else leaf.grad.double().cpu()


@contextlib.contextmanager
def _differentiable(model: nn.Module) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Within the block BN layers have weights and biases of their own to differentiate by, with
    the values of theirs (1 and 0 where they have none), and nothing else requires a gradient."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    saved = []
    affine = {}
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for name, layer in batchnorm_layers(model).items():
            saved.append((layer, dict(layer._parameters)))
            like = next(iter(t for t in (layer.weight, layer.running_mean) if t is not None), None)
            placement: dict[str, Any] = (
                {} if like is None else {"device": like.device, "dtype": like.dtype}
            )
            weight, bias = (
                torch.full((layer.num_features,), fill, **placement)
                if own is None
                else own.detach().clone()
                for own, fill in ((layer.weight, 1.0), (layer.bias, 0.0))
            )
            affine[name] = (nn.Parameter(weight), nn.Parameter(bias))
            layer._parameters.update(weight=affine[name][0], bias=affine[name][1])
        yield affine
    finally:
        for layer, parameters in saved:
            layer._parameters.clear()
            layer._parameters.update(parameters)
        for parameter in frozen:
            parameter.requires_grad_(True)
