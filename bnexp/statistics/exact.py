"""`exact`: all batches in lockstep from BN layer to BN layer, within a bound on memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bnexp.errors import UserError
from bnexp.memory_size import format_bytes
from bnexp.nn.intercept import normalized_by
from bnexp.statistics.forward import (
    Done,
    Fixed,
    by_its_own,
    first_non_finite,
    is_wide,
    length_of,
    no_batches,
    non_finite,
)
from bnexp.statistics.lockstep import FINISHED, STOP, Lockstep
from bnexp.statistics.moments import Moments, moments
from bnexp.statistics.spill import Owner, Ownership, Store, free_memory

_log = logging.getLogger("bnexp.statistics")


@dataclass(frozen=True)
class MemoryEstimate:
    """What `method="exact"` needs, in bytes, measured on the first batch.

    batches: how many there are, None if unknown. waiting: what one batch holds while it waits,
    at the BN layer (`layer`) where that is most: the layer's input, live skips, the model's
    input. working: the most that one batch holds while it runs. bound: what `memory` allows.
    """

    batches: int | None
    waiting: int
    layer: str
    working: int
    bound: int

    @property
    def total(self) -> int | None:
        """All batches waiting at `layer`, and one running."""
        return None if self.batches is None else self.batches * self.waiting + self.working

    @property
    def elsewhere(self) -> int | None:
        """How much of it must wait outside the bound: in host memory or on disk."""
        return None if self.total is None else max(0, self.total - self.bound)

    def __str__(self) -> str:
        each = f"{format_bytes(self.waiting)} each waiting at {self.layer!r}"
        if self.total is None:
            return f"an unknown number of batches, {each}; bound {format_bytes(self.bound)}"
        text = f"{self.batches} batches, {each}: {format_bytes(self.total)} in all"
        if self.elsewhere:
            text += (
                f", {format_bytes(self.elsewhere)} of it beyond the bound of "
                f"{format_bytes(self.bound)}, put elsewhere meanwhile"
            )
        return text


@dataclass(frozen=True)
class _Visit:
    """One call of one BN layer in one forward pass."""

    name: str
    moments: Moments
    dtype: torch.dtype
    device: torch.device
    held: int = 0


class Exact:
    """All batches in lockstep from BN layer to BN layer."""

    def __init__(self, layers, run, stop_after: str | None, report) -> None:
        self._layers = layers
        self._run = run
        self._stop_after = stop_after
        self._report = report
        self._ownership: Ownership | None = None
        self._probed: list[_Visit] = []
        self._working = 0
        # In the order in which the forward pass calls the layers:
        self._population: list[tuple[str, Moments, Fixed | None]] = []
        self._first_batch: list[Moments] = []

    def over(
        self, batches: Iterable, device: torch.device, bound: int
    ) -> dict[str, tuple[Tensor, Tensor, int]]:
        borrowed = belongs_to_caller(batches)
        iterator = iter(batches)
        start = _take(iterator, 1)
        if not start:
            raise no_batches()
        again = _copy(start[0])
        self.probe(start[0], borrowed)
        start += _take(iterator, 1)
        if len(start) == 1:
            self._population = [(v.name, self._whole([v]), None) for v in self._probed]
            return self._result()
        estimate = self.estimate(length_of(batches), bound)
        _log.info("exact: %s", estimate)
        self._report.note(str(estimate))
        legs = len(self._probed) + (self._stop_after is None)
        self._report.start(estimate.batches and estimate.batches * legs)
        if estimate.elsewhere == 0:
            self._sweep(start, iterator, borrowed, Lockstep())
        else:
            self._sweep_bounded(start, iterator, borrowed, estimate, device)
        self._check_independence(again)
        return self._result()

    def probe(self, batch: Any, borrowed: bool) -> None:
        """Run one batch alone, to see the way through the model and what is held where."""
        owner = Owner()
        with self._owning(Ownership()) as ownership:

            def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
                held = owner.bytes
                with self._unowned():
                    m = moments(x)
                    fixed = by_its_own(m, x)
                self._probed.append(_Visit(name, m, x.dtype, x.device, held))
                if name == self._stop_after:
                    raise Done
                return fixed.normalize(x, weight, bias, eps)

            with normalized_by(self._layers, normalize), contextlib.suppress(Done):
                # A copy: a model may work in place on its input, and this one is needed again.
                if borrowed:
                    batch = _copy(batch)
                ownership.current = owner
                if not borrowed:  # then it counts as the pass's own
                    batch = _copy(batch)
                self._run(batch)
        self._working = owner.peak
        if not self._probed:
            raise UserError("the forward pass reaches no BN layer: nothing to recompute")

    def estimate(self, batches: int | None, bound: int) -> MemoryEstimate:
        most = max(self._probed, key=lambda visit: visit.held)
        return MemoryEstimate(batches, most.held, most.name, self._working, bound)

    def _sweep_bounded(
        self, start, iterator, borrowed: bool, estimate: MemoryEstimate, device: torch.device
    ) -> None:
        """The sweep with what waits beyond the bound put into a store."""
        size = _samples(start[0])
        host = 0 if device.type == "cpu" else free_memory(torch.device("cpu")) // 2

        def that_fit(batches: int) -> str:
            return f"about {batches * size} samples" if size else f"about {batches} batches"

        if estimate.working > estimate.bound:
            raise UserError(
                f"one batch needs {format_bytes(estimate.working)} and memory allows "
                f"{format_bytes(estimate.bound)}: use smaller batches or raise memory"
            )
        room = estimate.bound - estimate.working + host + Store.disk_left()
        if estimate.elsewhere is not None and estimate.batches * estimate.waiting > room:
            raise UserError(
                f"exact needs {format_bytes(estimate.total)} for what waits, and memory, host "
                f"and disk have {format_bytes(room)}: {that_fit(room // estimate.waiting)} would "
                "fit; use fewer, point TMPDIR at a larger disk, or use method='pooled'"
            )
        with contextlib.closing(Store(host)) as store, self._owning(Ownership(store)) as owning:
            lockstep = Lockstep(owning, estimate.bound, estimate.working)
            try:
                self._sweep(start, iterator, borrowed, lockstep)
            except OSError as error:
                if error is not store.error:
                    raise
                raise UserError(
                    f"the disk under {store.folder()} is full ({error.strerror}): "
                    f"{that_fit(lockstep.started)} were too many for 'exact'; use fewer, point "
                    "TMPDIR at a larger disk, or use method='pooled'"
                ) from error

    def _sweep(self, start: list, iterator: Iterator, borrowed: bool, lockstep: Lockstep) -> None:
        def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
            with self._unowned():
                visit = _Visit(name, moments(x), x.dtype, x.device)
            fixed = lockstep.wait(visit)
            return fixed.normalize(x, weight, bias, eps)

        def job(cell: list) -> None:
            if self._ownership is not None and not borrowed:
                # So that the pass owns its input, which may then wait elsewhere too.
                cell.append(_copy(cell.pop()))
            self._run(cell.pop())

        def jobs() -> Iterator[Callable[[], None]]:
            while start:
                yield functools.partial(job, [start.pop(0)])
            for batch in iterator:
                yield functools.partial(job, [batch])

        with normalized_by(self._layers, normalize):
            lockstep.run(jobs(), self._meet, self._report.advance)

    def _meet(self, visits: list) -> object:
        """All batches have arrived: the population statistics of this call are final."""
        reached = [None if visit is FINISHED else visit.name for visit in visits]
        for number, name in enumerate(reached):
            if name != reached[0]:
                raise UserError(
                    f"batch number {number} (counted from 0) goes on to {_place(name)} where "
                    f"batch 0 goes on to {_place(reached[0])}: the model's path depends on its "
                    "data, so 'exact' is not defined for it; use method='pooled'"
                )
        whole = self._whole(visits)
        first = visits[0]
        wide = is_wide(whole, first.device)
        self._population.append(
            (first.name, whole, Fixed.of(whole, first.dtype, first.device, wide))
        )
        self._first_batch.append(first.moments)
        return STOP if first.name == self._stop_after else self._population[-1][2]

    @staticmethod
    def _whole(visits: list[_Visit]) -> Moments:
        name = visits[0].name
        bad = first_non_finite([visit.moments for visit in visits])
        if bad is not None:
            raise non_finite(name, bad)
        parts = [visit.moments for visit in visits if visit.moments.count]
        if sum(part.count for part in parts) < 2:
            raise UserError(
                f"BN layer {name!r} has one value per channel over all batches: a variance needs "
                "at least two"
            )
        return Moments.merge(parts)

    def _check_independence(self, batch: Any) -> None:
        """Run the first batch again, alone: it must see what it saw among the others.

        It does not if the model hands things from layer to layer by way of attributes, hooks or
        globals, which another pass overwrites in between.
        """
        calls = iter(zip(self._population, self._first_batch, strict=True))
        remaining = len(self._population)

        def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
            nonlocal remaining
            (expected_name, _, fixed), expected = next(calls, ((None, None, None), None))
            if name != expected_name or not _agree(moments(x), expected, x.dtype):
                raise UserError(
                    f"the model's forward passes influence one another (seen at BN layer "
                    f"{name!r}: it keeps data of one pass in attributes, hooks or globals, or the "
                    "batches share memory), so they cannot advance in lockstep for 'exact': use "
                    "method='pooled'"
                )
            remaining -= 1
            if not remaining:
                raise Done
            return fixed.normalize(x, weight, bias, eps)

        with normalized_by(self._layers, normalize), contextlib.suppress(Done):
            self._run(batch)

    def _result(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        calls: dict[str, list[Moments]] = {}
        for name, whole, _ in self._population:
            calls.setdefault(name, []).append(whole)
        merged = {name: Moments.merge(parts) for name, parts in calls.items()}
        return {name: (m.mean, m.var, m.count) for name, m in merged.items()}

    @contextlib.contextmanager
    def _owning(self, ownership: Ownership) -> Iterator[Ownership]:
        self._ownership = ownership
        try:
            with ownership:
                yield ownership
        finally:
            self._ownership = None

    @contextlib.contextmanager
    def _unowned(self) -> Iterator[None]:
        """What is made within is not the pass's, and never put away."""
        if self._ownership is None:
            yield
            return
        owner, self._ownership.current = self._ownership.current, None
        yield
        self._ownership.current = owner


def _place(name: str | None) -> str:
    return "the end" if name is None else f"BN layer {name!r}"


def _agree(a: Moments, b: Moments, dtype: torch.dtype) -> bool:
    """Whether two moments of the same values differ by no more than rounding could do."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
    std = b.var.sqrt() + 1e-5 * b.mean.abs() + 1e-12
    if a.count == b.count == 0:
        return True
    return a.count == b.count and bool(
        ((a.mean - b.mean).abs() <= tolerance * std).all()
        and ((a.var.sqrt() - b.var.sqrt()).abs() <= tolerance * std).all()
    )


def belongs_to_caller(batches: Iterable) -> bool:
    """Whether the caller holds all batches anyway, so that they cost no further memory."""
    return isinstance(batches, (list, tuple))


def _take(iterator: Iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


def _copy(batch: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, batch)


def _samples(batch: Any) -> int | None:
    """Number of samples in a batch of the usual kinds."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    return _samples(batch[0]) if isinstance(batch, (tuple, list)) and batch else None
