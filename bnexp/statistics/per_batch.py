"""`batch-mean` and `pooled`: one batch after the other, normalized with its own statistics."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from bnexp.nn.intercept import normalized_by
from bnexp.statistics.forward import (
    Done,
    Normalizer,
    Population,
    Task,
    copied,
    first_non_finite,
    need_two,
    no_batches,
    non_finite,
)
from bnexp.statistics.moments import Moments, moments

# How many mini-batches are looked at together for NaN, which on a GPU means waiting for it.
_TOGETHER = 32


class Accumulator(Protocol):
    """Turns the moments of one layer's mini-batches into its population statistics."""

    def add(self, parts: list[Moments]) -> None: ...

    def join(self, others: Self) -> None:
        """Take in what was accumulated of further mini-batches."""

    def result(self) -> Population: ...


class _BatchMean:
    """Mean of the batch means and of the unbiased batch variances."""

    def __init__(self) -> None:
        self._mean = self._var = torch.zeros((), dtype=torch.float64, device="cpu")
        self._batches = 0
        self._count = 0

    def add(self, parts: list[Moments]) -> None:
        self._mean = self._mean + torch.stack([m.mean for m in parts]).sum(0)
        self._var = self._var + torch.stack([m.unbiased_var for m in parts]).sum(0)
        self._batches += len(parts)
        self._count += sum(m.count for m in parts)

    def join(self, others: Self) -> None:
        self._mean = self._mean + others._mean
        self._var = self._var + others._var
        self._batches += others._batches
        self._count += others._count

    def result(self) -> Population:
        return Population(self._mean / self._batches, self._var / self._batches, self._count)


class _Pooled:
    """Moments of all values together."""

    def __init__(self) -> None:
        self._merged: list[Moments] = []

    def add(self, parts: list[Moments]) -> None:
        self._merged = [Moments.merge([*self._merged, *parts])]

    def join(self, others: Self) -> None:
        self.add(others._merged)

    def result(self) -> Population:
        return Population.of(self._merged)


def batch_mean(task: Task) -> dict[str, Population]:
    return _accumulated(task, _BatchMean)


def pooled(task: Task) -> dict[str, Population]:
    return _accumulated(task, _Pooled)


def _accumulated(task: Task, accumulator: type[Accumulator]) -> dict[str, Population]:
    recent: dict[str, list[tuple[int, Moments]]] = {}
    accumulators: dict[str, Accumulator] = {}
    number = -1

    def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
        need_two(name, x, f"batch number {number} (counted from 0)")
        m = moments(x)
        recent.setdefault(name, []).append((number, m))
        if name == task.stop_after:
            raise Done
        return Normalizer.by_its_own(m, x).normalize(x, weight, bias, eps)

    def accumulate() -> None:
        for name, parts in recent.items():
            bad = first_non_finite([m for _, m in parts])
            if bad is not None:
                raise non_finite(name, parts[bad][0])
            accumulators.setdefault(name, accumulator()).add([m for _, m in parts])
        recent.clear()

    task.report.start(task.length)
    with normalized_by(task.layers, normalize):
        for number, batch in enumerate(task.batches):
            if number:
                task.run(batch)
            else:
                with task.run.unseen:
                    task.run.try_out(copied(batch))
            if number % _TOGETHER == _TOGETHER - 1:
                accumulate()
            task.report.advance()
    accumulate()
    brought = task.ranks.gather((number + 1, accumulators), "the end of the batches")
    if not any(batches for batches, _ in brought):
        raise task.ranks.common(no_batches())
    union: dict[str, Accumulator] = {}
    for _, found in brought:
        for name, part in found.items():
            union.setdefault(name, accumulator()).join(part)
    return {name: found.result() for name, found in union.items()}
