"""Which layers' statistics the loss hangs on: one backward pass for all of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnexp.nn.find import batchnorm_layers
from bnexp.nn.inference import inference
from bnexp.statistics.statistics import Statistics
from bnexp.torch_internals import BatchNormBase

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
    model: nn.Module,
    batches: Callable[[], Iterable],
    loss: Loss,
    first: Statistics,
    second: Statistics,
) -> Attribution | None:
    """Attribute `loss under first - loss under second` to the layers and channels of both.

    With θ the means and the logarithms of `var + eps` of all layers together, and g the gradient
    of the mean loss with respect to them at the ends and in the middle of the line between:

        L(first) - L(second) ≈ (g(first) + 4 g(middle) + g(second)) / 6 · (θ_first - θ_second)

    (Simpson's rule: exact for losses of up to the fourth degree along the line; `explained` beside
    `difference` says how good it is. The trapezoid of the ends alone is much worse where averages
    still hold half of their initial values, and so are variances without the logarithm.) All of
    g takes one backward pass: with `y = w·(x - mean)/s + b` and `s² = var + eps`,
    `dL/dmean = -w/s · dL/db` and `dL/dlog(s²) = -w/2 · dL/dw`.

    Takes three passes over what `batches` gives, each forward and backward. The model is as before
    afterwards. None where the loss has no gradient, or is not finite.
    """
    eps = {name: float(layer.eps) for name, layer in batchnorm_layers(model).items()}
    shared = [name for name in first.names if name in second.mean]
    mean = [{n: s.mean[n].detach().double().cpu() for n in shared} for s in (first, second)]
    log = [
        {n: (s.var[n].detach().double().cpu() + eps[n]).log() for n in shared}
        for s in (first, second)
    ]
    middle = Statistics(
        {n: (mean[0][n] + mean[1][n]) / 2 for n in shared},
        {n: ((log[0][n] + log[1][n]) / 2).exp() - eps[n] for n in shared},
        dict.fromkeys(shared, 0),
    )
    points = []
    for statistics in (first, middle, second):
        point = _gradients(model, batches(), loss, statistics, shared)
        if point is None:
            return None
        points.append(point)
    start, half, end = points
    layers = [
        LayerShare(
            name,
            *(
                (a[name] + 4 * b[name] + c[name]) / 6 * (theta[0][name] - theta[1][name])
                for a, b, c, theta in zip(
                    start.gradients, half.gradients, end.gradients, (mean, log), strict=True
                )
            ),
        )
        for name in shared
    ]
    return Attribution(
        tuple(layers), start.loss - end.loss, sum(layer.loss for layer in layers), start.samples
    )


@dataclass(frozen=True)
class _Point:
    loss: float
    samples: int
    gradients: tuple[dict[str, Tensor], dict[str, Tensor]]


def _gradients(
    model: nn.Module, batches: Iterable, loss: Loss, statistics: Statistics, names: Sequence[str]
) -> _Point | None:
    """The mean loss and its gradients with respect to the means, and to the log variances."""
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
        by_mean, by_log_var = {}, {}
        for name in names:
            layer, weight, bias = affine[name]
            scale = (statistics.var[name].double().cpu() + layer.eps).sqrt()
            w = weight.detach().double().cpu()
            by_mean[name] = -w / scale * _gradient(bias) / samples
            by_log_var[name] = -w / 2 * _gradient(weight) / samples
    return _Point(total / samples, samples, (by_mean, by_log_var))


def _gradient(leaf: nn.Parameter) -> Tensor:
    return (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).double().cpu()


@contextlib.contextmanager
def _differentiable(
    model: nn.Module,
) -> Iterator[dict[str, tuple[BatchNormBase, nn.Parameter, nn.Parameter]]]:
    """Within the block BN layers have weights and biases of their own to differentiate by, with
    the values of theirs (1 and 0 where they have none), and nothing else requires a gradient."""
    learning = [p for p in model.parameters() if p.requires_grad]
    saved: list[tuple[BatchNormBase, dict]] = []
    affine: dict[str, tuple[BatchNormBase, nn.Parameter, nn.Parameter]] = {}
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for name, layer in batchnorm_layers(model).items():
            saved.append((layer, dict(layer._parameters)))
            own = layer._parameters
            like = _placement(model, layer).new_zeros(layer.num_features)
            weight, bias = (
                nn.Parameter((like + fill) if value is None else value.detach().clone())
                for value, fill in ((own["weight"], 1.0), (own["bias"], 0.0))
            )
            affine[name] = (layer, weight, bias)
            layer._parameters.update(weight=weight, bias=bias)
        yield affine
    finally:
        for changed, parameters in saved:
            changed._parameters.update(parameters)
        for parameter in learning:
            parameter.requires_grad_(True)


def _placement(model: nn.Module, layer: nn.Module) -> Tensor:
    """A tensor with the device and dtype that the layer's parameters have, or would have."""
    for tensor in (*layer.parameters(), *layer.buffers(), *model.parameters()):
        if tensor.is_floating_point():
            return tensor
    return torch.zeros((), device="cpu")
