"""`exact`: all batches in lockstep from BN layer to BN layer, within a bound on memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import platform
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
    Dependent,
    GivenUp,
    PathsDiffer,
    PopulationCall,
    all_calls_together,
    by_layer,
    give_up,
    layer_by_layer,
    meet,
)
from bnexp.statistics.lockstep import FINISHED, STOP, Lockstep, in_threads
from bnexp.statistics.moments import Moments, moments
from bnexp.statistics.spill import OffloadMode, OffloadStore, PassMemory, free_memory

_log = logging.getLogger("bnexp.statistics")
# Which batches are run again, by how many there are; the second of more.
_CHECKED: dict[int, tuple[int, ...]] = {1: (), 2: (0, 1), 3: (0, 1)}


@dataclass(frozen=True)
class MemoryEstimate:
    """What `method="exact"` needs, in bytes, measured on the first batch.

    batches: how many there are, None if unknown. waiting: what one batch holds while it waits,
    at the BN layer (`layer`) where that is most: the layer's input, live skips, the model's
    input. working: the most that one batch holds while it runs. bound: what `memory` allows.
    Of several ranks that share memory: all their batches; `working` for one of each rank's.
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
    ranks = task.ranks
    # Whoever makes batches may use their memory again for the next.
    batches: Iterator[Any] = (copied(b) if task.held is None else b for b in task.batches)
    start = list(itertools.islice(batches, 2))
    probe = Probe.of(task, start[0]) if start else None
    outlooks = ranks.gather(_Outlook.of(task, start, probe), "the first batches")
    if not any(outlook.batches for outlook in outlooks):
        raise ranks.common(no_batches())
    several = list(dict.fromkeys(name for outlook in outlooks for name in outlook.several))
    if several and task.calls == "joint":
        return all_calls_together(task, [*start, *batches])
    if several:
        _warn(
            f"called several times per pass: {', '.join(several)}. Each call was normalized with "
            "its own statistics, as in training; inference has one mean and variance for all of "
            "a layer's calls: calls='joint' gives those that it meets"
        )
    if sum(outlook.batches for outlook in outlooks) == 1:
        return by_layer(_of_one_batch(task, probe))
    reason = next((outlook.reason for outlook in outlooks if outlook.reason), None)
    legs = 1 + max(outlook.calls for outlook in outlooks)
    if reason is None:
        try:
            return by_layer(_swept(task, probe, itertools.chain(start, batches), outlooks))
        except GivenUp as given_up:
            reason = str(given_up)
            if not all(outlook.held for outlook in outlooks):
                raise ranks.common(
                    UserError(
                        f"the model's forward passes influence one another ({reason}), so 'exact' "
                        "needs each batch several times: pass a list of batches, or use "
                        "method='pooled'"
                    )
                ) from None
    _warn(
        f"the model's forward passes may influence one another ({reason}), so 'exact' runs them "
        f"one after the other, once per BN layer: {legs} passes over the batches instead of one"
    )
    held = task.held or [*start, *batches]
    task.report.start(legs * len(held))
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


@dataclass(frozen=True)
class _Outlook:
    """What one rank has learned from its first two batches.

    held: it can run its batches again. reason: why passes can't be interleaved. place: the memory
    that `estimate` is about, which others may share.
    """

    batches: int
    held: bool
    calls: int
    several: list[str]
    reason: str | None
    place: tuple[str, str]
    estimate: MemoryEstimate | None

    @staticmethod
    def of(task: Task, start: list, probe: Probe | None) -> _Outlook:
        place = platform.node(), str(task.device)
        if probe is None:
            return _Outlook(0, True, 0, [], None, place, None)
        calls = Counter(call.name for call in probe.calls)
        several = [name for name, number in calls.items() if number > 1]
        reason = probe.change
        if len(start) == 1 or (several and task.calls == "joint"):
            reason = None  # nothing is interleaved
        if reason is not None:  # perhaps a cache, which is filled once: does it change again?
            reason = Probe.of(task, start[1]).change
        if reason is not None and task.ranks.size > 1:
            reason = f"rank {task.ranks.rank}: {reason}"
        held = task.held is not None
        estimate = probe.estimate(task)
        return _Outlook(len(start), held, len(probe.calls), several, reason, place, estimate)


def _shared(task: Task, outlooks: list[_Outlook]) -> tuple[MemoryEstimate, float]:
    """What the ranks that share this one's memory need together, and this rank's share of it."""
    place = outlooks[task.ranks.rank].place
    needs = [o.estimate for o in outlooks if o.place == place and o.estimate is not None]
    most = max(needs, key=lambda need: need.waiting)
    batches = [need.batches for need in needs]
    known = None if None in batches else sum(filter(None, batches))
    share = task.length / known if known and task.length else 1 / len(needs)
    working, bound = sum(need.working for need in needs), min(need.bound for need in needs)
    return MemoryEstimate(known, most.waiting, most.layer, working, bound), share


def _of_one_batch(task: Task, probe: Probe | None) -> list[PopulationCall]:
    """The population's calls where one rank has all of it, in one batch: those of its pass."""
    if probe is None:
        return _followed(task)
    found = [meet(task, [call]) for call in probe.calls]
    meet(task, [None])
    return [call for call in found if call is not None]


def _followed(task: Task) -> list[PopulationCall]:
    """The population's calls, on a rank without batches."""
    return list(iter(lambda: meet(task, []), None))


def _swept(
    task: Task, probe: Probe | None, batches: Iterator, outlooks: list[_Outlook]
) -> list[PopulationCall]:
    """The population's calls by one sweep of all ranks. Raises GivenUp."""
    if probe is None:
        return _followed(task)
    try:
        population = _sweep(task, probe, batches, *_shared(task, outlooks))
    except Dependent as dependent:
        give_up(task, dependent)
    meet(task, [None])
    return population


def _sweep(
    task: Task, probe: Probe, batches: Iterator, estimate: MemoryEstimate, share: float
) -> list[PopulationCall]:
    """The population's calls by a sweep of this rank's batches. Raises Dependent, GivenUp.

    share: of the memory that the estimate is about, what this rank may have.
    """
    _log.info("exact: %s", estimate)
    task.report.note(str(estimate))
    legs = len(probe.calls) + (task.stop_after is None)
    task.report.start(task.length and task.length * legs)
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
    together = "" if task.ranks.size == 1 else " of all ranks here"

    def that_fit(number: int) -> str:
        return f"about {number * size} samples" if size else f"about {number} batches"

    if estimate.working > estimate.bound:
        raise UserError(
            f"one batch{together and ' on each of the ranks here'} needs "
            f"{format_bytes(estimate.working)} and memory allows "
            f"{format_bytes(estimate.bound)}: use smaller batches or raise memory"
        )
    room = estimate.bound - estimate.working + host + OffloadStore.disk_left()
    if estimate.total is not None and estimate.total - estimate.working > room:
        raise UserError(
            f"exact needs {format_bytes(estimate.total)} for what waits{together}, and memory, "
            f"host and disk have {format_bytes(room)}: {that_fit(room // estimate.waiting)} would "
            "fit; use fewer, point TMPDIR at a larger disk, or use method='pooled'"
        )
    store = OffloadStore(int(host * share))
    with contextlib.closing(store), OffloadMode(store) as mode:
        lockstep = Lockstep(mode, int(estimate.bound * share), int(estimate.working * share))
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
        # The first pass may have left something behind the last layer.
        self._state = task.given if task.given.change() is None else ModelState(task.model)
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
        if len(items) > 1 and (change := self._open or self._state.change()):
            raise Dependent(change)
        call = meet(self._task, [None if item is FINISHED else item for item in items])
        if call is None:
            return STOP
        self.population.append(call)
        for number in _CHECKED.get(len(items), (1,)):
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
