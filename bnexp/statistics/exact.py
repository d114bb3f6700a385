"""`exact`: all batches in lockstep from BN layer to BN layer, within a bound on memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.memory_size import format_bytes
from bnexp.nn.inference import ModelState
from bnexp.nn.intercept import normalized_by
from bnexp.statistics.forward import Done, Normalizer, Population, Task, copied, no_batches
from bnexp.statistics.layer_by_layer import (
    Call,
    PathsDiffer,
    PopulationCall,
    all_calls_together,
    by_layer,
    layer_by_layer,
)
from bnexp.statistics.lockstep import FINISHED, STOP, Lockstep, in_threads
from bnexp.statistics.moments import Moments, moments
from bnexp.statistics.spill import OffloadMode, OffloadStore, PassMemory, free_memory

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


class Dependent(Exception):
    """Passes can't be interleaved, for the reason in the text."""


class _PassFailed(Exception):
    """The model raised (`__cause__`) in the pass of batch `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exact(task: Task) -> dict[str, Population]:
    """Population statistics of each call of a BN layer, below it those of all calls before.

    In one sweep, or layer by layer where passes influence one another. `task.calls` "joint": of
    all calls of a layer together, if one is called several times.
    """
    # Whoever makes batches may use their memory again for the next.
    batches: Iterator[Any] = (copied(b) if task.held is None else b for b in task.batches)
    start = list(itertools.islice(batches, 2))
    if not start:
        raise no_batches()
    probe = Probe.of(task, start[0])
    several = [name for name, calls in Counter(c.name for c in probe.calls).items() if calls > 1]
    if several and task.calls == "joint":
        return all_calls_together(task, [*start, *batches])
    if several:
        _warn(
            f"called several times per pass: {', '.join(several)}. Each call was normalized with "
            "its own statistics, as in training; inference has one mean and variance for all of "
            "a layer's calls: calls='joint' gives those that it meets"
        )
    if len(start) == 1:
        return by_layer(PopulationCall.of([call]) for call in probe.calls)
    reason = probe.change
    if reason is not None:  # perhaps a cache, which is filled once: does it change again?
        reason = Probe.of(task, start[1]).change
    if reason is None:
        try:
            return by_layer(_swept(task, probe, itertools.chain(start, batches)))
        except Dependent as dependent:
            reason = str(dependent)
            if task.held is None:
                raise UserError(
                    f"the model's forward passes influence one another ({reason}), so 'exact' "
                    "needs each batch several times: pass a list of batches, or use "
                    "method='pooled'"
                ) from None
    passes = len(probe.calls) + 1
    _warn(
        f"the model's forward passes may influence one another ({reason}), so 'exact' runs them "
        f"one after the other, once per BN layer: {passes} passes over the batches instead of one"
    )
    held = task.held or [*start, *batches]
    task.report.start(passes * len(held))
    return by_layer(layer_by_layer(task, held))


def memory_estimate(task: Task) -> MemoryEstimate:
    """Takes and runs the first batch."""
    for batch in task.batches:
        return Probe.of(task, batch).estimate(task)
    raise no_batches()


@dataclass(frozen=True)
class Probe:
    """One batch's pass alone: the way through the model, and what it held where, at most `working`.

    change: what another pass would meet if this one waited at a BN layer: what differs there from
    the model's state before, or a block that may put something back.
    """

    calls: list[Call]
    working: int
    change: str | None

    @staticmethod
    def of(task: Task, batch: Any) -> Probe:
        memory = PassMemory()
        calls: list[Call] = []
        change: str | None = None
        blocks = task.run.blocks()
        threads = {threading.get_ident()}
        with task.run.unseen, OffloadMode(OffloadStore()) as mode:
            state = ModelState(task.model)

            def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
                nonlocal change
                held = memory.bytes
                threads.add(threading.get_ident())
                with mode.uncounted():
                    change = change or state.change() or blocks.find()
                    calls.append(Call.of(name, x, held))
                    normalizer = Normalizer.by_its_own(calls[-1].moments, x)
                if name == task.stop_after:
                    raise Done
                return normalizer.normalize(x, weight, bias, eps)

            with normalized_by(task.layers, normalize):
                if task.held is None:  # then its input counts as the pass's own
                    mode.current = memory
                batch = copied(batch)
                mode.current = memory
                task.run.try_out(batch)
        if len(threads) > 1:  # raised there, it might be lost
            raise in_threads()
        if not calls:
            raise UserError("the forward pass reaches no BN layer: nothing to recompute")
        return Probe(calls, memory.peak, change)

    def estimate(self, task: Task) -> MemoryEstimate:
        most = max(self.calls, key=lambda call: call.held)
        return MemoryEstimate(task.length, most.held, most.name, self.working, task.memory)


def _swept(task: Task, probe: Probe, batches: Iterator) -> list[PopulationCall]:
    """The population's calls by one sweep. Raises Dependent."""
    estimate = probe.estimate(task)
    _log.info("exact: %s", estimate)
    task.report.note(str(estimate))
    legs = len(probe.calls) + (task.stop_after is None)
    task.report.start(estimate.batches and estimate.batches * legs)
    path = [call.name for call in probe.calls]
    if estimate.elsewhere == 0:
        sweep = _Sweep(task, path, Lockstep())
        sweep.run(batches)
        return sweep.population
    first = next(batches)
    size = _samples(first)
    batches = itertools.chain([first], batches)
    del first
    host = 0 if task.device.type == "cpu" else free_memory(torch.device("cpu")) // 2

    def that_fit(number: int) -> str:
        return f"about {number * size} samples" if size else f"about {number} batches"

    if estimate.working > estimate.bound:
        raise UserError(
            f"one batch needs {format_bytes(estimate.working)} and memory allows "
            f"{format_bytes(estimate.bound)}: use smaller batches or raise memory"
        )
    room = estimate.bound - estimate.working + host + OffloadStore.disk_left()
    if estimate.total is not None and estimate.total - estimate.working > room:
        raise UserError(
            f"exact needs {format_bytes(estimate.total)} for what waits, and memory, host "
            f"and disk have {format_bytes(room)}: {that_fit(room // estimate.waiting)} would "
            "fit; use fewer, point TMPDIR at a larger disk, or use method='pooled'"
        )
    with contextlib.closing(OffloadStore(host)) as store, OffloadMode(store) as mode:
        lockstep = Lockstep(mode, estimate.bound, estimate.working)
        try:
            sweep = _Sweep(task, path, lockstep, mode)
            sweep.run(batches)
        except OSError as error:
            if error is not store.error:
                raise
            raise UserError(
                f"the disk under {store.folder()} is full ({error.strerror}): "
                f"{that_fit(lockstep.started)} were too many for 'exact'; use fewer, point "
                "TMPDIR at a larger disk, or use method='pooled'"
            ) from error
    return sweep.population


class _Sweep:
    """All batches' passes in lockstep, and whether they were independent.

    Passes hand things on by attributes, hooks or globals, which other passes overwrite while they
    wait; or they set something that all share and put it back later. In modules this is seen when
    the batches meet, and so are blocks that may put something back. What is left is seen by
    running the second batch again, alone: it must see what it saw among the others. Where any
    batch doesn't, it doesn't: of what is set and put back the first sees the right thing, of what
    is handed on the last, and of a stack of three the second, so up to three the first runs, too.
    """

    def __init__(
        self,
        task: Task,
        path: list[str],
        lockstep: Lockstep,
        mode: OffloadMode | None = None,
    ) -> None:
        self.population: list[PopulationCall] = []
        self._task = task
        self._state = ModelState(task.model)
        self._path = path
        self._lockstep = lockstep
        self._mode = mode
        self._blocks = task.run.blocks()
        self._open: str | None = None
        self._own_input = mode is not None and task.held is None
        # Batches that may be run again, by number, and what each saw.
        self._kept: dict[int, Any] = {}
        self._seen: dict[int, list[Moments]] = {}

    def run(self, batches: Iterator) -> None:
        try:
            with normalized_by(self._task.layers, self._normalize):
                self._lockstep.run(self._jobs(batches), self._meet, self._task.report.advance)
        except (PathsDiffer, _PassFailed) as error:
            if self._task.held is not None:
                self._kept[error.number] = self._task.held[error.number]
            if error.number in self._kept and self._goes_alone(self._kept[error.number]):
                raise Dependent(
                    f"batch number {error.number}, counted from 0, comes to its end alone and not "
                    "among others"
                ) from error
            raise error.__cause__ or error from None
        for number, seen in self._seen.items():
            self._check(self._kept[number], seen)

    def _normalize(self, name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
        with self._mode.uncounted() if self._mode else contextlib.nullcontext():
            call = Call.of(name, x)
        self._open = self._open or self._blocks.find()
        return self._lockstep.wait(call).normalize(x, weight, bias, eps)

    def _jobs(self, batches: Iterator) -> Iterator[Callable[[], None]]:
        for number, batch in enumerate(batches):
            if number < 2:
                self._kept[number] = batch
            yield functools.partial(self._job, number, [batch])

    def _job(self, number: int, cell: list) -> None:
        try:
            if self._own_input:  # so that it may wait elsewhere too
                cell.append(copied(cell.pop()))
            self._task.run(cell.pop())
        except (UserError, OSError):
            raise
        except Exception as error:
            raise _PassFailed(number) from error

    def _meet(self, items: list) -> object:
        """All batches have arrived: the population statistics of this call are final."""
        if change := self._open or self._state.change():
            raise Dependent(change)
        call = PopulationCall.of([None if item is FINISHED else item for item in items])
        self.population.append(call)
        for number in (0, 1) if len(items) <= 3 else (1,):
            self._seen.setdefault(number, []).append(items[number].moments)
        return STOP if call.name == self._task.stop_after else call.normalizer

    def _goes_alone(self, batch: Any) -> bool:
        """Whether a batch's pass, alone, calls the layers that the first batch's called."""
        names = []

        def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
            names.append(name)
            if name == self._task.stop_after:
                raise Done
            return Normalizer.by_its_own(moments(x), x).normalize(x, weight, bias, eps)

        self._state.restore()
        with normalized_by(self._task.layers, normalize):
            try:
                self._task.run(batch)
            except Exception:
                return False
        return names == self._path

    def _check(self, batch: Any, seen: list[Moments]) -> None:
        expected = zip(self.population, seen, strict=True)
        wrong = None

        def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
            nonlocal wrong
            m = moments(x)
            for known, before in expected:
                if known.name != name or not _agree(m, before, x.dtype):
                    break
                if name == self._task.stop_after:
                    raise Done
                return known.normalizer.normalize(x, weight, bias, eps)
            wrong = wrong or name
            return Normalizer.by_its_own(m, x).normalize(x, weight, bias, eps)

        with normalized_by(self._task.layers, normalize):
            self._task.run(batch)
        if wrong is not None:
            raise Dependent(f"seen at BN layer {wrong!r}")


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


def _samples(batch: Any) -> int | None:
    """Number of samples in a batch of the usual kinds."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    return _samples(batch[0]) if isinstance(batch, (tuple, list)) and batch else None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)  # where recompute_statistics was called
