"""Layers that read their running statistics in training, which batch normalization never does.

`BatchRenorm` (Ioffe 2017) corrects what a mini-batch's own statistics do by the running ones,
within limits; `MovingAverageNorm` normalizes by the running ones alone, of which Ioffe & Szegedy
2015, section 2, say that it makes training blow up, so that this can be seen. No gradient goes
through running statistics. In inference both are batch normalization, with its buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.nn.batchnorm import Affine, TrackedBatchNorm, turn_into
from bnexp.nn.convert import convert_batchnorm
from bnexp.nn.find import batchnorm_layers
from bnexp.torch_internals import BatchNormBase, in_backward

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class RenormLimits:
    """How far batch renormalization may correct, by the mini-batches seen (Ioffe 2017, section 4).

    Up to `start` mini-batches the limits are 1 and 0, which is batch normalization. From there they
    rise linearly to `r_max` at `r_full` and to `d_max` at `d_full` mini-batches, and stay. The
    defaults are the paper's, for a training of some 160 000 steps.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    start: int = 5_000
    r_full: int = 40_000
    d_full: int = 25_000

    def __post_init__(self) -> None:
        if not (self.r_max >= 1 and self.d_max >= 0):
            raise UserError(
                f"r_max={self.r_max!r} must be 1 or more, d_max={self.d_max!r} 0 or more"
            )
        if not 0 <= self.start <= min(self.r_full, self.d_full):
            raise UserError(
                f"start={self.start!r} must be 0 or more, and no later than r_full={self.r_full!r} "
                f"and d_full={self.d_full!r}"
            )

    def at(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The largest r and d after `seen` mini-batches, an integer (); both () in float64 (float32
        on MPS). Doesn't wait for the device."""
        kind = torch.float32 if seen.device.type == "mps" else torch.float64
        r, d = (
            ((seen - self.start).to(kind) / (full - self.start)).clamp(0, 1)
            if full > self.start
            else seen.ge(full).to(kind)
            for full in (self.r_full, self.d_full)
        )
        return 1 + (self.r_max - 1) * r, self.d_max * d


PAPER = RenormLimits()


class _ReadsAverages(TrackedBatchNorm):
    reads_averages = True

    def _normalize(
        self, input: Tensor, mean: Tensor | None, var: Tensor | None, affine: Affine
    ) -> tuple[Tensor, int]:
        if mean is None or var is None:
            raise UserError(
                f"a {type(self).__name__} normalizes with its running statistics in training: "
                "build it with track_running_stats=True"
            )
        if in_backward():
            raise UserError(
                f"a {type(self).__name__} can't run inside activation checkpointing: in the "
                "repeated forward pass its running statistics may be newer than in the first"
            )
        output = self._normalize_by_averages(input, mean, var, affine)
        return output, input.numel() // self.num_features

    def _normalize_by_averages(
        self, input: Tensor, mean: Tensor, var: Tensor, affine: Affine
    ) -> Tensor:
        """The output; `mean` and `var` take the mini-batch's moments."""
        raise NotImplementedError


class _BatchRenorm(_ReadsAverages):
    limits: RenormLimits = PAPER

    def __init__(self, *args: Any, limits: RenormLimits = PAPER, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits

    def _normalize_by_averages(
        self, input: Tensor, mean: Tensor, var: Tensor, affine: Affine
    ) -> Tensor:
        outputs = []
        for i, part in enumerate(self._parts(input), start=1):
            own_mean, own_var = torch.zeros_like(mean), torch.zeros_like(var)
            with torch.no_grad():
                F.batch_norm(part, own_mean, own_var, None, None, True, 1.0, affine[2])
                for average, own in ((mean, own_mean), (var, own_var)):
                    average.copy_(own) if i == 1 else average.lerp_(own, 1.0 / i)
                values = max(part.numel() // self.num_features, 2)  # an empty batch has none
                r, d = self._corrections(own_mean, own_var * ((values - 1) / values), affine[2])
            weight, bias, eps = affine
            scale = r if weight is None else weight * r.to(weight.dtype)
            shift = d if weight is None else weight * d.to(weight.dtype)
            shift = shift if bias is None else shift + bias
            outputs.append(F.batch_norm(part, None, None, scale, shift, True, 0.0, eps))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _corrections(self, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """r and d, (C,) each, for a mini-batch's mean and biased variance, (C,) each."""
        running_mean, running_var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        deviation = (running_var + eps).sqrt()
        r_max, d_max = (limit.to(mean.dtype) for limit in self.limits.at(self._seen()))
        r = ((var + eps).sqrt() / deviation).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / deviation).clamp(-d_max, d_max)
        return r, d

    def _seen(self) -> Tensor:
        if self.num_batches_tracked is None:
            raise UserError(
                f"a {type(self).__name__} needs num_batches_tracked, which says how far it may "
                "correct"
            )
        return self.num_batches_tracked

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, limits={self.limits}"


class _MovingAverageNorm(_ReadsAverages):
    def _normalize_by_averages(
        self, input: Tensor, mean: Tensor, var: Tensor, affine: Affine
    ) -> Tensor:
        weight, bias, eps = affine
        with torch.no_grad():  # for the moments alone
            super(_ReadsAverages, self)._normalize(input, mean, var, (None, None, eps))
        # Copies: the backward pass reads them, and the buffers may have moved on by then.
        running_mean = self.get_buffer("running_mean").clone()
        running_var = self.get_buffer("running_var").clone()
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)


_RENORM_DOC = """Batch renormalization (Ioffe 2017), in place of `torch.nn.{parent}`.

    In training, with the mini-batch's mean and deviation `sqrt(biased variance + eps)` and the
    running ones, as they were before this mini-batch:

        r = deviation / running deviation, within [1/r_max, r_max]
        d = (mean - running mean) / running deviation, within [-d_max, d_max]
        y = ((x - mean) / deviation · r + d) · weight + bias

    where no gradient goes through r and d. Without limits that is what inference computes. The
    limits open up with `num_batches_tracked`, as `limits` says, so that a loaded layer goes on
    where it was. The running variance is an average of (unbiased) variances, as in torch.nn; the
    paper averages deviations. Constructor, parameters, buffers, `state_dict` and inference are
    `torch.nn.{parent}`'s. Raises UserError inside activation checkpointing.
    """

_MOVING_DOC = """Normalization by running statistics, through which no gradient goes, in training
    too: what Ioffe & Szegedy 2015, section 2, found to make training blow up.

    In training `y = (x - running mean) / sqrt(running variance + eps) · weight + bias`, with the
    running statistics as they were before this mini-batch, which then goes into them. Constructor,
    parameters, buffers, `state_dict` and inference are `torch.nn.{parent}`'s. Raises UserError
    inside activation checkpointing.
    """


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    __doc__ = _RENORM_DOC.format(parent="BatchNorm1d")
    plain_class = nn.BatchNorm1d


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    __doc__ = _RENORM_DOC.format(parent="BatchNorm2d")
    plain_class = nn.BatchNorm2d


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    __doc__ = _RENORM_DOC.format(parent="BatchNorm3d")
    plain_class = nn.BatchNorm3d


class MovingAverageNorm1d(_MovingAverageNorm, nn.BatchNorm1d):
    __doc__ = _MOVING_DOC.format(parent="BatchNorm1d")
    plain_class = nn.BatchNorm1d


class MovingAverageNorm2d(_MovingAverageNorm, nn.BatchNorm2d):
    __doc__ = _MOVING_DOC.format(parent="BatchNorm2d")
    plain_class = nn.BatchNorm2d


class MovingAverageNorm3d(_MovingAverageNorm, nn.BatchNorm3d):
    __doc__ = _MOVING_DOC.format(parent="BatchNorm3d")
    plain_class = nn.BatchNorm3d


_RENORM = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)
_MOVING = (MovingAverageNorm1d, MovingAverageNorm2d, MovingAverageNorm3d)


def use_batch_renorm(model: Model, limits: RenormLimits = PAPER) -> Model:
    """Turn the BN layers of `model` into `BatchRenorm1d/2d/3d`, in place; returns `model`.

    As `convert_batchnorm`: a layer stays the same object with the same tensors. To be done before
    an optimizer is made or a tracker attached, or after. Raises UserError for a subclass of
    `torch.nn`'s layers with a forward of its own, for `SyncBatchNorm`, and for layers that keep no
    running statistics; nothing has changed then.
    """
    for layer in _become(model, _RENORM):
        vars(layer)["limits"] = limits
    return model


def use_moving_averages(model: Model) -> Model:
    """Turn the BN layers of `model` into `MovingAverageNorm1d/2d/3d`; else as
    `use_batch_renorm`."""
    _become(model, _MOVING)
    return model


def _become(model: nn.Module, classes: tuple[type[TrackedBatchNorm], ...]) -> list[BatchNormBase]:
    layers = batchnorm_layers(model)
    of = {vars(cls)["plain_class"]: cls for cls in classes}
    for name, layer in layers.items():
        if vars(type(layer)).get("plain_class", type(layer)) not in of:
            raise UserError(
                f"layer {name!r} is a {type(layer).__name__}, which can't be renormalized: only "
                "torch.nn's and bnexp's BatchNorm1d, 2d and 3d can"
            )
        if layer.running_mean is None or layer.num_batches_tracked is None:
            raise UserError(
                f"layer {name!r} keeps no running statistics to normalize with: build it with "
                "track_running_stats=True"
            )
    convert_batchnorm(model)
    for layer in layers.values():
        turn_into(layer, of[vars(type(layer))["plain_class"]])
    return list(layers.values())
