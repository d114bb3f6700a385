"""Moments `(count, mean, m2)` of activations: how they are taken, and the one way they merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A shifted second pass is taken where |mean| exceeds this many standard deviations.
_OFFSET = 8.0
# Of a kernel call in `_native_moments`: accumulators, so that they stay in the first-level cache,
# and rows, so that float32 sums of so many terms keep six digits.
_ACCUMULATORS = 2048
_FEWEST_ROWS = 64
_MOST_ROWS = 512


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
        counts = parts[0].mean.new_tensor([part.count for part in parts])
        means, m2s = (torch.stack([getattr(p, name) for p in parts]) for name in ("mean", "m2"))
        return Moments(sum(part.count for part in parts), *merge(counts, means, m2s))


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2, (C,) each, of the union of P sets with these counts (P,), means and m2 (P, C),
    by the formula of `Moments.merge`. Mutates nothing."""
    # Taken relative to one part's mean, so that a common offset costs no digits.
    shifted = means - means[0]
    delta = counts @ shifted / counts.sum()
    return means[0] + delta, m2s.sum(0) + counts @ (shifted - delta).square_()


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
        zeros = torch.zeros(channels, dtype=torch.float64, device=x.device)
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
        return _wide_moments(x, count)
    with np.errstate(invalid="ignore", over="ignore"):
        mean, var = _native_mean_and_var(x, count)
        if not (np.isfinite(var) & (mean * mean <= _OFFSET**2 * var)).all():
            # The kernels' float32 sums lose digits with the offset; sums about a value near the
            # mean, any such value, lose none. Rare in networks, so it is done on demand.
            shift = mean.astype(np.float32)
            shifted = x - torch.from_numpy(shift).view(-1, *[1] * (x.dim() - 2))
            mean, var = _native_mean_and_var(shifted, count)
            mean = mean + shift
    if not np.isfinite(var).all():  # squares overflow float32 before the values do
        return _wide_moments(x, count)
    return Moments(count, torch.from_numpy(mean), torch.from_numpy(var * count))


def _wide_moments(x: Tensor, count: int) -> Moments:
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.double(), dims, correction=0)
    return Moments(count, mean, var * count)


def _native_mean_and_var(x: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Float64 mean and biased variance by ATen's statistics kernel, of float32 `x` on the CPU.

    For `channels_last` and 2-d input that kernel adds up all the rows in float32 one after the
    other, which costs 1e-5 of the variance at 100,000 rows and more where values are skewed. So
    no call gets more than `_MOST_ROWS` rows, and k short rows are read as one of k·C channels,
    which gives k independent, shorter sums at no cost. All are merged here in float64; by numpy,
    whose calls on so few numbers take a third of the time of torch's.
    """
    rows = x.movedim(1, -1)
    if x.is_contiguous() and not rows.is_contiguous():
        return tuple(_kernel([x])[0])  # for this format it accumulates in float64
    channels = x.shape[1]
    rows = rows.reshape(count, channels).contiguous()
    fold = max(1, min(count // _FEWEST_ROWS, _ACCUMULATORS // channels))
    calls = -(-count // (fold * _MOST_ROWS))
    length = count // (fold * calls)
    whole = calls * length * fold
    sums = _kernel(rows[:whole].view(calls, length, fold * channels))
    means, variances = (sums[:, i].reshape(-1, channels) for i in (0, 1))
    mean = means.mean(0)
    var = (variances + np.square(means - mean)).mean(0)
    if whole == count:
        return mean, var
    rest_mean, rest_var = _kernel([rows[whole:]])[0]
    share = 1 - whole / count
    delta = rest_mean - mean
    var = (1 - share) * var + share * rest_var + share * (1 - share) * np.square(delta)
    return mean + share * delta, var


def _kernel(parts: Iterable[Tensor]) -> np.ndarray:
    """Float64 (parts, 2, channels): each part's mean and biased variance."""
    found = [torch.stack(torch.batch_norm_update_stats(part, None, None, 0.0)) for part in parts]
    return (torch.stack(found) if len(found) > 1 else found[0][None]).double().numpy()
