"""How far one set of statistics is from another, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.statistics.statistics import Statistics


@dataclass(frozen=True)
class LayerDrift:
    """Distance between two statistics of one layer.

    mean_drift, worst_mean_drift: root mean square and maximum over the channels of
        `|mean_a - mean_b| / sqrt(var_b + eps)`: in standard deviations of what is normalized.
    log_var_drift, worst_log_var_drift: likewise of `|log((var_a + eps) / (var_b + eps))|`.
    worst_mean_channel, worst_var_channel: where the maxima are.
    """

    name: str
    channels: int
    mean_drift: float
    worst_mean_drift: float
    worst_mean_channel: int
    log_var_drift: float
    worst_log_var_drift: float
    worst_var_channel: int

    @property
    def drift(self) -> float:
        """The larger of `mean_drift` and `log_var_drift / 2`, the log-ratio of the deviations."""
        return max(self.mean_drift, self.log_var_drift / 2)


def layer_drift(a: Statistics, b: Statistics, eps: float | Mapping[str, float]) -> list[LayerDrift]:
    """Distance of `a` from `b` for each layer both have, by `LayerDrift.drift`, furthest first.

    eps: the layers' own, so that channels which BN treats as constant do not dominate: by layer
    name (`bnexp.nn.find.layer_eps(model)`), or one for all. Computed in float64 on the CPU;
    mutates nothing. Raises UserError if no layer is in both, if a layer's number of channels
    differs, or if its eps is missing or not positive.
    """
    shared = [name for name in a.names if name in b.mean]
    if not shared:
        raise UserError("the two statistics have no layer in common")
    drifts = [_one_layer(name, a, b, _eps_of(name, eps)) for name in shared]
    return sorted(drifts, key=lambda layer: layer.drift, reverse=True)


def _eps_of(name: str, eps: float | Mapping[str, float]) -> float:
    if isinstance(eps, Mapping):
        if name not in eps:
            raise UserError(f"there is no eps for layer {name!r}: it is of another model")
        eps = eps[name]
    if not eps > 0:
        raise UserError(f"eps={eps!r} must be positive")
    return eps


def _one_layer(name: str, a: Statistics, b: Statistics, eps: float) -> LayerDrift:
    mean_a, mean_b, var_a, var_b = (
        _double(t) for t in (a.mean[name], b.mean[name], a.var[name], b.var[name])
    )
    if mean_a.shape != mean_b.shape:
        raise UserError(
            f"layer {name!r} has {mean_a.numel()} channels in one of the statistics and "
            f"{mean_b.numel()} in the other: they are of different models"
        )
    mean = (mean_a - mean_b).abs() / (var_b + eps).sqrt()
    log_var = ((var_a + eps) / (var_b + eps)).log().abs()
    worst_mean, worst_var = int(mean.argmax()), int(log_var.argmax())
    return LayerDrift(
        name,
        mean.numel(),
        _rms(mean),
        float(mean[worst_mean]),
        worst_mean,
        _rms(log_var),
        float(log_var[worst_var]),
        worst_var,
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.float64)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
