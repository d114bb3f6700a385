"""Moments `(count, mean, m2)` of activations: how they are taken, and the one way they merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A shifted second pass is taken where |mean| exceeds this many standard deviations.
_OFFSET = 8.0
# Accumulators per kernel call in the fold below: they stay in the first-level cache.
_ACCUMULATORS = 2048
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Moments:
    """Per channel: `count` values, their `mean`, and `m2`, the sum of (x - mean)².

    mean, m2: float64, shape (channels,). `m2` rather than a variance, because it adds up.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance `m2 / count`: the population's own."""
        return self.m2 / self.count

    @property
    def unbiased_var(self) -> Tensor:
        """`m2 / (count - 1)`; needs `count >= 2`."""
        return self.m2 / (self.count - 1)

    @staticmethod
    def merge(parts: Sequence[Moments]) -> Moments:
        """Moments of the union of disjoint sets of values (Chan, Golub & LeVeque 1979).

        With `n = Σ nᵢ`: `mean = Σ nᵢ meanᵢ / n` and `m2 = Σ m2ᵢ + Σ nᵢ (meanᵢ - mean)²`, the
        pairwise formula for any number of parts at once. Never `E[x²] - E[x]²`, which cancels.
        """
        if len(parts) == 1:
            return parts[0]
        means = torch.stack([part.mean for part in parts])
        m2s = torch.stack([part.m2 for part in parts])
        counts = means.new_tensor([part.count for part in parts])
        count = sum(part.count for part in parts)
        # Taken relative to one part's mean, so that a common offset costs no digits.
        shifted = means - means[0]
        delta = counts @ shifted / count
        m2 = m2s.sum(0) + counts @ (shifted - delta).square_()
        return Moments(count, means[0] + delta, m2)


@torch.no_grad()
def moments(x: Tensor) -> Moments:
    """Moments of each channel of `x` over the batch and all places. Mutates nothing.

    x: shape (N, C) or (N, C, *), any floating dtype, memory format and device. Half-precision
    values are accumulated in float32 or better; float32 results are good to about 6 digits of
    the variance, whatever the mean is. On the CPU this takes what the native BN kernels take.

    NaN and infinity pass through into the result. No values give count 0 and zeros.
    """
    channels = x.shape[1]
    count = x.numel() // channels if channels else 0
    if count == 0:
        zeros = torch.zeros(channels, dtype=torch.float64)
        return Moments(0, zeros, zeros.clone())
    if x.device.type == "cpu":
        return _cpu_moments(x, count)
    if x.device.type == "cuda":
        # A Welford kernel with float32 accumulators: no sums of squares, no sync.
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        dims = [d for d in range(x.dim()) if d != 1]
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        var, mean = torch.var_mean(x, dims, correction=0)
        mean, var = mean.cpu(), var.cpu()
    return Moments(count, mean.double(), var.double() * count)


def _cpu_moments(x: Tensor, count: int) -> Moments:
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if x.dtype == torch.float64:
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        return Moments(count, mean, var * count)
    result = _native_moments(x, count)
    # The kernels' float32 sums lose digits with the offset; sums about a value near the mean,
    # any such value, lose none. Rare in networks, so it is done on demand.
    if bool((result.mean.square() > _OFFSET**2 * result.var).any()):
        shift = result.mean.float()
        shifted = _native_moments(x - shift.view(-1, *[1] * (x.dim() - 2)), count)
        result = Moments(count, shifted.mean + shift.double(), shifted.m2)
    return result


def _native_moments(x: Tensor, count: int) -> Moments:
    """By ATen's statistics kernel, from float32 `x` on the CPU.

    For `channels_last` and 2-d input that kernel adds up all the rows in float32 one after the
    other, which costs 1e-5 of the variance at 100 000 rows. Reading k rows as one row of k·C
    channels gives it k independent, shorter sums, merged here in float64, at no cost.
    """
    rows = x.movedim(1, -1)
    if x.is_contiguous() and not rows.is_contiguous():
        # ATen's kernel for this format accumulates in float64.
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return Moments(count, mean.double(), var.double() * count)
    channels = x.shape[1]
    rows = rows.reshape(count, channels).contiguous()
    fold = max(1, min(count // _ROWS, _ACCUMULATORS // channels))
    if fold == 1:
        mean, var = torch.batch_norm_update_stats(rows, None, None, 0.0)
        return Moments(count, mean.double(), var.double() * count)
    folded = count - count % fold
    mean, var = torch.batch_norm_update_stats(
        rows[:folded].view(folded // fold, fold * channels), None, None, 0.0
    )
    within = var.double().view(fold, channels).mean(0)
    between, mean = torch.var_mean(mean.double().view(fold, channels), 0, correction=0)
    result = Moments(folded, mean, (within + between) * folded)
    if folded < count:
        mean, var = torch.batch_norm_update_stats(rows[folded:], None, None, 0.0)
        rest = count - folded
        result = Moments.merge([result, Moments(rest, mean.double(), var.double() * rest)])
    return result
