"""The state of estimators: the channels of all layers at once, in a few fused calls a step.

A bank keeps all estimators of its kind. What it does to tensors are the pure functions below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bnexp.statistics.rules import Cumulative, Ema, Pooled


class Bank(Protocol):
    """The estimators of one kind, over C channels.

    Made from rules by name and `start`, (2, C): the means and variances in the layers' running
    buffers then, in the dtype and on the device that sums are kept in.

    linear: what it makes of the averages of several streams of mini-batches are the averages of
        what it makes of each.
    """

    linear: ClassVar[bool]

    def __init__(self, rules: Mapping[str, Any], start: Tensor) -> None: ...

    def update(self, batch: Tensor, counts: Callable[[], Tensor], seen: Tensor | None) -> None:
        """Take in one mini-batch: (2, C) means and unbiased variances, the number of values that
        each channel had, (C,), and which channels took part, (C,) bool (None: all)."""

    def value(self, name: str) -> Tensor:
        """(2, C) means and variances by the estimator `name`; may be its own memory."""

    def follow(self, name: str, buffers: Tensor) -> None:
        """Someone has written `buffers`, (2, C), which show the estimator `name`."""

    def state(self) -> dict[str, Tensor]:
        """Name -> tensor that goes into a checkpoint, its own memory, channels last."""


class Averages:
    """Weighted averages with E rows, for rules that have a `decay` and an `initial_weight_sum`.

    values: (E, 2, C); weight_sum: (E, 1, C); see `average_`.
    """

    linear: ClassVar[bool] = True

    def __init__(self, rules: Mapping[str, Ema | Cumulative], start: Tensor) -> None:
        self._row = {name: row for row, name in enumerate(rules)}
        self._initial = {name: rule.initial_weight_sum for name, rule in rules.items()}
        self.values = start.repeat(len(rules), 1, 1)
        decays = [rule.decay for rule in rules.values()]
        self.decay = start.new_tensor(decays).view(-1, 1, 1)
        weights = start.new_tensor(list(self._initial.values()))
        self.weight_sum = weights.view(-1, 1, 1).repeat(1, 1, start.shape[1])

    def update(self, batch: Tensor, counts: Callable[[], Tensor], seen: Tensor | None) -> None:
        average_(self.values, self.weight_sum, self.decay, batch, seen)

    def value(self, name: str) -> Tensor:
        return self.values[self._row[name]]

    def follow(self, name: str, buffers: Tensor) -> None:
        """An average that its starting value counts for goes on from what was written."""
        if self._initial[name]:
            value = self.value(name)
            value.copy_(torch.where(buffers == value.to(buffers.dtype), value, buffers))

    def state(self) -> dict[str, Tensor]:
        return {"averages": self.values, "mass": self.weight_sum}  # its name in files


class Pools:
    """Pooled moments: per rule a ring of blocks (B, 3, C), see `pool_window_`.

    turn: (C,) int64, how many mini-batches a channel has had.
    """

    linear: ClassVar[bool] = False

    def __init__(self, rules: Mapping[str, Pooled], start: Tensor) -> None:
        self._start = start
        self._pools = {
            name: (rule, start.new_zeros(rule.blocks, 3, start.shape[1]))
            for name, rule in rules.items()
        }
        self.turn = torch.zeros(start.shape[1], dtype=torch.int64, device=start.device)

    def update(self, batch: Tensor, counts: Callable[[], Tensor], seen: Tensor | None) -> None:
        count = counts()
        for rule, blocks in self._pools.values():
            if rule.window is None:
                pool_(blocks[0], count, batch, seen)
            else:
                pool_window_(blocks, self.turn, rule.block_length, count, batch, seen)
        self.turn.add_(1 if seen is None else seen)

    def value(self, name: str) -> Tensor:
        return pooled_value(self._pools[name][1], self._start)

    def follow(self, name: str, buffers: Tensor) -> None:
        """Nothing but mini-batches counts here."""

    def state(self) -> dict[str, Tensor]:
        pools = {f"pool {name}": blocks for name, (_, blocks) in self._pools.items()}
        return {"turn": self.turn, **pools}


def average_(
    values: Tensor, weight_sum: Tensor, decay: Tensor, batch: Tensor, seen: Tensor | None = None
) -> None:
    """One step of E weighted averages over C channels. Mutates `values` and `weight_sum`.

    All the averaging rules are one recursion on the sum m of the weights that a value stands
    for, in units of the newest mini-batch's weight:

        m ← d·m + 1,    value ← value + (batch - value) / m

    From m = 0 with d < 1, m_t = (1 - d^t)/(1 - d): the debiased EMA, without its division at the
    end. With d = 1, m_t = t: the cumulative mean. From its fixed point m = 1/(1 - d) it is the
    plain EMA.

    Args:
        values: (E, 2, C) means and variances.
        weight_sum: (E, 1, C).
        decay: (E, 1, 1), d.
        batch: (2, C) batch means and unbiased variances, in the dtype of `values`.
        seen: (C,) bool; where it is False neither value nor weight sum changes. None: all True.
    """
    if seen is None:
        weight_sum.mul_(decay).add_(1)
        values.lerp_(batch, weight_sum.reciprocal())
    else:
        weight_sum.copy_(torch.where(seen, decay * weight_sum + 1, weight_sum))
        values.copy_(torch.where(seen, values.lerp(batch, weight_sum.reciprocal()), values))


def merged_averages(
    values: Sequence[Tensor], weight_sums: Sequence[Tensor], shares: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What `average_` would have made, in values and weight sums, of the ranks' mini-batches of
    each step together: their averages, weighted by `shares`.

    Sequences by rank, of (E, 2, C), (E, 1, C) and (C,): how many sub-batches a rank has per step;
    0 where it has had none. Exact where ranks are alike. Mutates nothing.
    """
    weights = [w * share for w, share in zip(weight_sums, shares, strict=True)]
    nobody = torch.stack(weights).sum(0) == 0  # then all are as they started
    weights = [torch.where(nobody, 1.0, weight) for weight in weights]
    total = torch.stack(weights).sum(0)

    def mean(items: Sequence[Tensor]) -> Tensor:
        offsets = [w * (item - items[0]) for w, item in zip(weights, items, strict=True)]
        return items[0] + sum(offsets) / total

    return mean(values), mean(weight_sums)


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
