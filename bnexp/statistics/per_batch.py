"""`batch-mean` and `pooled`: one batch after the other, normalized with its own statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from bnexp.nn.intercept import normalized_by
from bnexp.statistics.forward import (
    Done,
    by_its_own,
    first_non_finite,
    length_of,
    need_two,
    no_batches,
    non_finite,
)
from bnexp.statistics.moments import Moments, moments

# How many mini-batches are looked at together for NaN, which on a GPU means waiting for it.
_FOLD = 32


class PerBatch:
    """One batch after the other, each normalized with its own statistics."""

    def __init__(self, layers, run, method: str, stop_after: str | None, report) -> None:
        self._layers = layers
        self._run = run
        self._method = method
        self._stop_after = stop_after
        self._report = report
        self._number = 0
        self._recent: dict[str, list[tuple[int, Moments]]] = {}
        self._sums: dict[str, Moments | tuple] = {}

    def over(self, batches: Iterable) -> dict[str, tuple[Tensor, Tensor, int]]:
        self._report.start(length_of(batches))
        empty = True
        with normalized_by(self._layers, self._normalize):
            for self._number, batch in enumerate(batches):
                empty = False
                with contextlib.suppress(Done):
                    self._run(batch)
                if self._number % _FOLD == _FOLD - 1:
                    self._fold()
                self._report.advance()
        if empty:
            raise no_batches()
        self._fold()
        return {name: self._result(sums) for name, sums in self._sums.items()}

    def _normalize(self, name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
        need_two(name, x, f"batch number {self._number} (counted from 0)")
        m = moments(x)
        self._recent.setdefault(name, []).append((self._number, m))
        if name == self._stop_after:
            raise Done
        return by_its_own(m, x).normalize(x, weight, bias, eps)

    def _fold(self) -> None:
        for name, parts in self._recent.items():
            bad = first_non_finite([m for _, m in parts])
            if bad is not None:
                raise non_finite(name, parts[bad][0])
            parts = [m for _, m in parts]
            before = self._sums.get(name)
            if self._method == "pooled":
                self._sums[name] = Moments.merge([before, *parts] if before else parts)
            else:
                sums = (
                    torch.stack([m.mean for m in parts]).sum(0),
                    torch.stack([m.unbiased_var for m in parts]).sum(0),
                    len(parts),
                    sum(m.count for m in parts),
                )
                self._sums[name] = (
                    tuple(map(sum, zip(before, sums, strict=True))) if before else sums
                )
        self._recent = {}

    def _result(self, sums: Moments | tuple) -> tuple[Tensor, Tensor, int]:
        if isinstance(sums, Moments):
            return sums.mean, sums.var, sums.count
        mean, var, batches, count = sums
        return mean / batches, var / batches, count
