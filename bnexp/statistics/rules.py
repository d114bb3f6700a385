"""Estimators: rules that turn the stream of a layer's batch moments into running statistics.

The stream is, per channel, `(mean_t, var_t)` for mini-batches t = 1, 2, ..., where `var_t` is the
unbiased variance, as PyTorch's running buffers have it. A rule is a small frozen dataclass; what
it does to tensors are the pure functions below it, over the channels of all layers at once.
`StatisticsTracker` feeds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnexp.errors import UserError

_BLOCKS = 16


@dataclass(frozen=True)
class Ema:
    """Exponential moving average: `running = d·running + (1-d)·batch`, with decay d in [0, 1).

    PyTorch's `momentum` is `1 - d`: `Ema(0.9)` is what its layers do by default (Ioffe & Szegedy
    2015, section 3.1). It starts from the layer's running buffers (0 and 1 in a new layer).

    With `debias` it starts from nothing instead, and is divided by `1 - d^t` as in Adam (Kingma &
    Ba 2015, section 3): a weighted mean of the batches seen, with weights proportional to
    `d^(t-i)`.
    """

    decay: float
    debias: bool = False

    def __post_init__(self) -> None:
        decay = self.decay
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise UserError(
                f"Ema: decay must be at least 0 and less than 1, not {decay!r} "
                "(it is the weight kept on the old value: 1 - PyTorch's momentum)"
            )


@dataclass(frozen=True)
class Cumulative:
    """The plain mean over all mini-batches so far, of batch means and of unbiased variances.

    What PyTorch's layers do with `momentum=None`, and Algorithm 2 of Ioffe & Szegedy 2015 taken
    along the training run.
    """


@dataclass(frozen=True)
class Pooled:
    """Mean and unbiased variance of all values seen, the variance between batch means included.

    With `n_t` values per channel in mini-batch t and `n = Σ n_t`: `mean = Σ n_t·mean_t / n` and
    `var = (Σ (n_t - 1)·var_t + Σ n_t·(mean_t - mean)²) / (n - 1)`; the "population statistics" of
    Wu & Johnson 2021 (section 3 and appendix) as a running estimate. Merged in float64 as Chan,
    Golub & LeVeque (1979) do, never as `E[x²] - E[x]²`.

    With `window`, over the last mini-batches alone: exactly `window` of them if `window < 32`.
    Larger windows forget in blocks of `q = window // 16` mini-batches, so that memory stays
    bounded (at most 31 blocks of three numbers per channel): then the last `B·q - q + 1` to `B·q`
    mini-batches count, with `B = window // q`; that is at least 7/8 of the window, never more
    than all of it. Until it is full, all mini-batches count.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        window = self.window
        if window is not None and (
            isinstance(window, bool) or not isinstance(window, int) or window < 1
        ):
            raise UserError(f"Pooled: window is a positive number of mini-batches, not {window!r}")

    @property
    def blocks(self) -> int:
        """How many blocks of mini-batches are kept."""
        return 1 if self.window is None else self.window // self.block_length

    @property
    def block_length(self) -> int:
        """Mini-batches in a block; without a window, more than there will ever be."""
        return 2**62 if self.window is None else max(1, self.window // _BLOCKS)


Estimator = Ema | Cumulative | Pooled


def initial_mass(rule: Ema | Cumulative) -> float:
    """The mass `average` starts from: what the starting value is worth, in mini-batches."""
    return 1 / (1 - rule.decay) if isinstance(rule, Ema) and not rule.debias else 0.0


def decay_of(rule: Ema | Cumulative) -> float:
    """A cumulative average is an average that forgets nothing: decay 1."""
    return rule.decay if isinstance(rule, Ema) else 1.0


def average_(
    values: Tensor, mass: Tensor, decay: Tensor, batch: Tensor, seen: Tensor | None = None
) -> None:
    """One step of E weighted averages over C channels. Mutates `values` and `mass`.

    All the averaging rules are one recursion on the total weight ("mass") m of what a value
    stands for, in units of the newest mini-batch's weight:

        m ← d·m + 1,    value ← value + (batch - value) / m

    From m = 0 with d < 1, m_t = (1 - d^t)/(1 - d): the debiased EMA, without its division at the
    end. With d = 1, m_t = t: the cumulative mean. From its fixed point m = 1/(1 - d) it is the
    plain EMA.

    Args:
        values: (E, 2, C) means and variances.
        mass: (E, 1, C).
        decay: (E, 1, 1), d.
        batch: (2, C) batch means and unbiased variances, in the dtype of `values`.
        seen: (C,) bool; where it is False neither value nor mass changes. None: all True.
    """
    if seen is None:
        mass.mul_(decay).add_(1)
        values.lerp_(batch, mass.reciprocal())
    else:
        mass.copy_(torch.where(seen, decay * mass + 1, mass))
        values.copy_(torch.where(seen, values.lerp(batch, mass.reciprocal()), values))


def pool_(block: Tensor, count: Tensor, batch: Tensor, seen: Tensor | None = None) -> None:
    """Merge the moments of one mini-batch into those of a block (Chan et al. 1979).

    Mutates `block`, (3, C): count, mean and m2 = Σ (x - mean)² of the values in it.

    Args:
        count: (C,) values in this mini-batch.
        batch: (2, C) its mean and unbiased variance, in the dtype of `block`.
        seen: (C,) bool; where it is False nothing changes. None: all True.
    """
    if seen is not None:
        merged = block.clone()
        pool_(merged, count, batch)
        block.copy_(torch.where(seen, merged, block))
        return
    have, mean, m2 = block
    share = count / (have + count)
    delta = batch[0] - mean
    mean.addcmul_(delta, share)
    m2.addcmul_(batch[1], count - 1).addcmul_(delta.square_(), share.mul_(have))
    have.add_(count)


def pool_window_(
    blocks: Tensor,
    turn: Tensor,
    length: int,
    count: Tensor,
    batch: Tensor,
    seen: Tensor | None = None,
) -> None:
    """`pool_` into the newest of a ring of blocks (B, 3, C); the oldest is emptied for a new one.

    Mutates `blocks`. `turn`: (C,) int64, how many mini-batches the channel has had before;
    `length`: mini-batches per block; the rest as in `pool_`.
    """
    index = (turn // length % len(blocks)).expand(1, 3, -1)
    block = blocks.gather(0, index)[0]
    fresh = block.masked_fill(turn % length == 0, 0)
    pool_(fresh, count, batch)
    if seen is not None:
        fresh = torch.where(seen, fresh, block)
    blocks.scatter_(0, index, fresh.unsqueeze(0))


def pooled_value(blocks: Tensor, otherwise: Tensor) -> Tensor:
    """(2, C) mean and unbiased variance over all blocks (B, 3, C); `otherwise` (2, C) where they
    are empty. Mutates nothing."""
    if len(blocks) == 1:
        total, overall, spread = blocks[0]
    else:
        count, mean, m2 = blocks.unbind(1)
        total = count.sum(0)
        shifted = mean - mean[0]  # a common offset costs no digits
        delta = (count * shifted).sum(0) / total
        overall = mean[0] + delta
        spread = m2.sum(0) + (count * (shifted - delta).square_()).sum(0)
    return torch.where(total > 0, torch.stack([overall, spread / (total - 1)]), otherwise)
