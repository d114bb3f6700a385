"""Batch normalization over a mini-batch whose samples several processes share.

Each process normalizes its own samples by the mean and variance of all, and the gradient is that of
one process with the whole mini-batch: `torch.nn.SyncBatchNorm` does the same on CUDA alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnexp.nn.batchnorm import Affine
from bnexp.statistics.moments import merge, moments

# A tensor of one shape on every rank -> (ranks, ...), in rank order.
Gather = Callable[[Tensor], Tensor]


class AcrossRanks:
    """What a BN layer does in training, where the samples of a mini-batch lie on several ranks.

    For `bnexp.nn.normalize_across`. Two exchanges for each call of a layer: 2C + 1 numbers in
    float64 forward, 2C backward. All ranks must call the layers in the same order, each with its
    own samples, which may be none. Gradients of `weight` and `bias` are those of the own samples:
    they add up over the ranks.
    """

    def __init__(self, gather: Gather) -> None:
        self._gather = gather

    def __call__(self, x: Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor, int]:
        """The normalized `x`, (N, C, ...), and of the whole mini-batch mean and unbiased variance,
        (C,) in float64, and the number of values per channel.

        ValueError, as torch.nn's layers raise, where a whole mini-batch is a single value.
        """
        weight, bias, eps = affine
        own = moments(x.detach())
        count = own.mean.new_tensor([own.count])
        parts = self._gather(torch.cat([own.mean, own.m2, count]))
        channels = x.shape[1]
        counts, mean, m2 = parts[:, -1], parts[:, :channels], parts[:, channels:-1]
        mean, m2 = merge(counts, mean, m2)
        total = int(counts.sum())
        if total <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {total} on all ranks"
            )
        output = _Normalize.apply(x, weight, bias, mean, m2 / total, eps, total, self._gather)
        return output, mean, m2 / (total - 1), total

    def __deepcopy__(self, memo: dict) -> AcrossRanks:
        """A copy of a layer is one of the same ranks'."""
        return self


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        total: int,
        gather: Gather,
    ) -> Tensor:
        kept = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, var = mean.to(kept), var.to(kept)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.total, ctx.gather = eps, total, gather
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        grad, dtype = grads[0], x.dtype
        if dtype in (torch.float16, torch.bfloat16):
            x, grad = x.float(), grad.float()
        if x.numel():
            # With a fixed mean and variance: grad · w / σ; Σ grad · (x - mean) / σ; Σ grad.
            fixed, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            fixed = torch.zeros_like(x)
            of_weight = of_bias = torch.zeros_like(mean)
        sums = ctx.gather(torch.stack([of_weight, of_bias]).double()).sum(0) / ctx.total
        scale = (var.double() + ctx.eps).rsqrt()
        factor = scale if weight is None else scale * weight.double()
        # And with those of the mini-batch: - (w / σ) · (mean grad + x̂ · mean (grad · x̂)).
        slope, offset = -factor * scale * sums[0], -factor * sums[1]
        shape = (-1, *[1] * (x.dim() - 2))
        centred = x - mean.to(x.dtype).view(shape)
        dx = fixed.addcmul_(centred, slope.to(x.dtype).view(shape))
        dx += offset.to(x.dtype).view(shape)
        own_affine = (of_weight, of_bias) if weight is not None else (None, None)
        return dx.to(dtype), *own_affine, None, None, None, None, None
