"""`exact`: all batches in lockstep from BN layer to BN layer, within a bound on memory."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import logging
import platform
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.memory_size import format_bytes
from bnexp.nn.inference import ModelState
from bnexp.nn.intercept import normalized_by
from bnexp.statistics.forward import (
    Done,
    NeededAgain,
    Normalizer,
    Population,
    Task,
    copied,
    no_batches,
)
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
from bnexp.statistics.lockstep import FINISHED, STOP, Lockstep
from bnexp.statistics.moments import Moments, moments
from bnexp.statistics.probe import MemoryEstimate, Probe
from bnexp.statistics.spill import OffloadMode, OffloadStore, free_memory

_log = logging.getLogger("bnexp.statistics")


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
    probe = None
    if start:  # a single batch's pass is all that there is to do
        probe = (Probe.of if len(start) == 1 else Probe.of_first)(task, start[0])
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
                    NeededAgain(
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
            reason = Probe.of_first(task, start[1]).change
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
    start = list(itertools.islice(batches, 2))
    size = _samples(start[0])
    scouts = [task.run.sample(batch) for batch in reversed(start)] if len(start) == 2 else []
    batches = itertools.chain(start, batches)
    if estimate.elsewhere == 0:
        del start
        sweep = _Sweep(task, probe, scouts, Lockstep())
        sweep.run(batches)
        return sweep.population
    del start
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
            sweep = _Sweep(task, probe, scouts, lockstep, mode)
            sweep.run(batches)
        except OSError as error:
            if error is not store.error:
                raise
            raise UserError(
                f"the disk under {store.folder()} is full ({error.strerror}): "
                f"{that_fit(sweep.started)} were too many for 'exact'; use fewer, point "
                "TMPDIR at a larger disk, or use method='pooled'"
            ) from error
    return sweep.population


@dataclass
class _Pass:
    """What is known of one pass of the sweep.

    number: of its batch; None if it is a scout's. kept: its batch, if it may have to be run again,
    and `seen`: the moments at each BN layer. first: where its first leg, run alone, came to, and
    `glimpse`: some of the values there. answer: how that layer normalizes, until it does.
    """

    number: int | None
    kept: Any = None
    seen: list[Moments] = field(default_factory=list)
    first: Call | None = None
    glimpse: Tensor | None = None
    answer: Normalizer | None = None


class _Sweep:
    """All batches' passes in lockstep, and whether they were independent.

    Where the probe says so, what waits for the first BN layer is not kept: passes are ended there,
    and begin again when its statistics are known.

    Passes hand things on by attributes, hooks or globals, which other passes overwrite while they
    wait; or they set something that all share and put it back later. In modules this is seen when
    the batches meet, and so are blocks that may put something back. What is left is seen by
    scouts: two single samples, which count nowhere, pass among the batches, and then again,
    alone, where they must see what they saw among the others. Where any pass doesn't, they don't:
    of what is set and put back the first sees the right thing, of what is handed on the last, and
    of a stack the one in the middle; scouts are the second and third of four at least, and two,
    since something may be shared by passes of one size only, or of one kind: they are of two
    batches. Without scouts the first and the second batch are run again.
    """

    def __init__(
        self,
        task: Task,
        probe: Probe,
        scouts: list[Tensor | None],
        lockstep: Lockstep,
        mode: OffloadMode | None = None,
    ) -> None:
        self.population: list[PopulationCall] = []
        self._task = task
        # The first pass may have left something behind the last layer.
        self._state = task.given if task.given.change() is None else ModelState(task.model)
        self._path = [call.name for call in probe.calls]
        self._again = probe.again
        self._lockstep = lockstep
        self._mode = mode
        self._blocks = task.run.blocks()
        self._open: str | None = None
        self._own_input = mode is not None and task.held is None
        self._scouts = [scout for scout in scouts if scout is not None]
        # Scouts have failed, or gone another way.
        self._lost = len(self._scouts) < 2
        self._passes: list[_Pass] = []
        # The pass that runs, and whether it is to end at the first layer.
        self._current = _Pass(None)
        self._ending = False

    @property
    def started(self) -> int:
        """How many batches' passes have begun."""
        return sum(each.number is not None for each in self._passes)

    def run(self, batches: Iterator) -> None:
        try:
            with normalized_by(self._task.layers, self._normalize):
                self._lockstep.run(self._jobs(batches), self._meet, self._advanced)
        except (PathsDiffer, _PassFailed) as error:
            batch = self._batch(error.number)
            if batch is not None and self._goes_alone(batch):
                raise Dependent(
                    f"batch number {error.number}, counted from 0, comes to its end alone and not "
                    "among others"
                ) from error
            raise error.__cause__ or error from None
        checked = (None,) if not self._lost else (0, 1) if self.started > 1 else ()
        for each in self._passes:
            if each.number in checked:
                self._check(each.kept, each.seen)

    def _batch(self, number: int) -> Any:
        if self._task.held is not None:
            return self._task.held[number]
        return next((each.kept for each in self._passes if each.number == number), None)

    def _jobs(self, batches: Iterator) -> Iterator[Callable[[], None]]:
        for number, batch in enumerate(batches):
            yield self._job(_Pass(number, batch if number < 2 else None), batch)
            if number == 0 and not self._lost:
                for scout in self._scouts:
                    yield self._job(_Pass(None, scout), scout)

    def _job(self, this: _Pass, batch: Any) -> Callable[[], None]:
        self._passes.append(this)
        return functools.partial(self._go, this, [batch])

    def _go(self, this: _Pass, cell: list) -> None:
        try:
            if self._own_input:  # so that it may wait elsewhere too
                cell.append(copied(cell.pop()))
            if self._again:
                self._current, self._ending = this, True
                # In a context of its own, so that what it sets there isn't met the next time.
                contextvars.copy_context().run(self._task.run, cell[0], self._state)
                self._ending = False
                if this.first is None:
                    return
                this.answer = self._wait(this, this.first)
            self._current = this
            self._task.run(cell.pop(), self._state)
            if this.answer is not None:
                raise _not_the_same(this)
        except (UserError, OSError, Dependent):
            raise
        except Exception as error:
            if this.number is None:
                self._lost = True
                return
            raise _PassFailed(this.number) from error

    def _normalize(self, name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
        this = self._current
        self._open = self._open or self._blocks.find()
        with self._mode.uncounted() if self._mode else contextlib.nullcontext():
            if this.answer is not None:
                normalizer, this.answer = this.answer, None
                if this.first is None or name != this.first.name or not _alike(x, this.glimpse):
                    raise _not_the_same(this)
                call = None
            else:
                call = Call.of(name, x)
                if self._ending:  # what others have changed would be put back unseen
                    self._open = self._open or self._state.change()
                    this.first, this.glimpse = call, _glimpse(x).clone()
                    raise Done
        if call is not None:
            normalizer = self._wait(this, call)
        return normalizer.normalize(x, weight, bias, eps)

    def _wait(self, this: _Pass, call: Call) -> Normalizer:
        normalizer = self._lockstep.wait(call)
        self._current = this
        if this.number is None and self._lost:
            raise Done
        return normalizer

    def _advanced(self, index: int) -> None:
        if self._passes[index].number is not None:
            self._task.report.advance()

    def _meet(self, items: list) -> object:
        """All batches have arrived: the population statistics of this call are final."""
        calls = [None if item is FINISHED else item for item in items]
        arrived = list(zip(self._passes, calls, strict=True))
        of_batches = [call for each, call in arrived if each.number is not None]
        if not any(of_batches):  # only scouts go on
            self._lost = True
            return STOP
        if len(of_batches) > 1 and (change := self._open or self._state.change()):
            raise Dependent(change)
        whole = meet(self._task, of_batches)
        if whole is None:
            return STOP
        self.population.append(whole)
        for each, call in arrived:
            if each.number is None and (call is None or call.name != whole.name):
                self._lost = True
            elif call is not None and each.kept is not None:
                each.seen.append(call.moments)
        return STOP if whole.name == self._task.stop_after else whole.normalizer

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


def _glimpse(x: Tensor) -> Tensor:
    """The values of `x` at one place."""
    while x.dim() > 2:
        x = x.select(-1, x.shape[-1] // 2)
    return x


def _alike(x: Tensor, glimpse: Tensor | None) -> bool:
    """Whether `x` is what it was when this was seen of it. Waits for a GPU."""
    now = _glimpse(x)
    if glimpse is None or now.shape != glimpse.shape:
        return False
    if now.numel() == 0 or torch.equal(now, glimpse):
        return True
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((now - glimpse).abs().max() <= tolerance * glimpse.abs().max())


def _not_the_same(this: _Pass) -> Dependent:
    which = "a sample" if this.number is None else f"batch number {this.number}, counted from 0,"
    return Dependent(f"{which} does not bring the same values to the first BN layer each time")


def _samples(batch: Any) -> int | None:
    """Number of samples in a batch of the usual kinds."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    return _samples(batch[0]) if isinstance(batch, (tuple, list)) and batch else None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)  # where recompute_statistics was called
