"""What `exact` learns beforehand from one pass alone: the way through the model, and costs."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.memory_size import format_bytes
from bnexp.nn.inference import ModelState, readers_of_random_states
from bnexp.nn.intercept import normalized_by
from bnexp.statistics.forward import Done, Normalizer, Task, copied, no_batches
from bnexp.statistics.layer_by_layer import Call
from bnexp.statistics.lockstep import in_threads
from bnexp.statistics.pass_settings import PassSettings
from bnexp.statistics.spill import OffloadMode, OffloadStore, PassMemory
from bnexp.torch_internals import storage_key, without_function_modes

# Memory goes through a core in the time of so many multiplications per element.
_PER_ELEMENT = 50
# The first leg is run again where it is this part of a pass at the most and memory comes down to
# this part at least.
_CHEAP = 1 / 6
_LESS = 0.8


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


def memory_estimate(task: Task) -> MemoryEstimate:
    """Takes and runs the first batch."""
    for batch in task.batches:
        return Probe.of(task, batch).estimate(task)
    raise no_batches()


@dataclass(frozen=True)
class Probe:
    """One batch's pass alone: the way through the model, and what it held where, at most `working`.

    change: what another pass would meet if this one waited at a BN layer: what differs there from
    the model's state before, or a block that may put something back. given: what a batch that has
    not begun holds of its own, beside what the caller holds. again: whether what waits at the first
    BN layer is better made again than kept.
    """

    calls: list[Call]
    working: int
    change: str | None
    given: int
    again: bool

    @staticmethod
    def of_first(task: Task, batch: Any) -> Probe:
        """From one sample if it can be taken and memory is ample by far, from the batch if not."""
        one = task.run.sample(batch)
        if one is not None:
            try:
                times = len(batch if isinstance(batch, Tensor) else batch[0])
                found = Probe.of(task, one)._times(times)
                total = found.estimate(task).total
                if total is not None and 2 * total * task.ranks.size <= task.memory:
                    return found
            except Exception:  # a model that takes whole batches only, perhaps
                task.run.undo()
        return Probe.of(task, batch)

    @staticmethod
    def of(task: Task, batch: Any) -> Probe:
        memory = PassMemory()
        calls: list[Call] = []
        change: str | None = None
        plain, first_work, given, own = False, 0, set[int](), 0
        blocks = task.run.blocks()
        threads = {threading.get_ident()}
        readers = readers_of_random_states(task.model)
        with task.run.unseen, _Measured(OffloadStore()) as mode:
            state, settings = ModelState(task.model), PassSettings()
            random = [read() for read in readers]

            def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
                nonlocal change, plain, first_work
                held = memory.bytes
                threads.add(threading.get_ident())
                with mode.uncounted(), without_function_modes():
                    change = change or state.change() or blocks.find()
                    if not calls:  # what has it done that would have to be undone?
                        others = memory.storages.keys() - given - {storage_key(x.untyped_storage())}
                        drawn = [read() for read in readers] != random
                        plain = not others and not drawn and settings.hold()
                        first_work = mode.work
                    calls.append(Call.of(name, x, held))
                    normalizer = Normalizer.by_its_own(calls[-1].moments, x)
                if name == task.stop_after:
                    raise Done
                return normalizer.normalize(x, weight, bias, eps)

            with normalized_by(task.layers, normalize):
                if task.held is None:  # then its input counts as the pass's own
                    mode.current = memory
                batch = copied(batch)
                given, own = set(memory.storages), memory.bytes
                mode.current = memory
                task.run.try_out(batch)
        if len(threads) > 1:  # raised there, it might be lost
            raise in_threads()
        if not calls:
            raise UserError("the forward pass reaches no BN layer: nothing to recompute")
        cheap = first_work <= _CHEAP * mode.work
        less = max([own, *(call.held for call in calls[1:])]) < _LESS * calls[0].held
        return Probe(calls, memory.peak, change, own, plain and cheap and less)

    @property
    def _held(self) -> list[int]:
        """What a pass holds while it waits at each BN layer."""
        later = [call.held for call in self.calls[1:]]
        return [self.given if self.again else self.calls[0].held, *later]

    def estimate(self, task: Task) -> MemoryEstimate:
        held = self._held
        most = max(range(len(held)), key=held.__getitem__)
        return MemoryEstimate(
            task.length, held[most], self.calls[most].name, self.working, task.memory
        )

    def _times(self, samples: int) -> Probe:
        """Of so many samples, as far as memory goes."""
        calls = [replace(call, held=call.held * samples) for call in self.calls]
        return replace(
            self, calls=calls, working=self.working * samples, given=self.given * samples
        )


class _Measured(OffloadMode):
    """Also counts what a pass's operations cost, in multiplications, roughly."""

    work = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = result[0] if isinstance(result, tuple) and result else result
        if self.current is not None and isinstance(made, Tensor):
            self.work += made.numel() * (_PER_ELEMENT + _terms(func, args))
        return result


def _terms(func: Any, args: tuple) -> int:
    """How many products each element of the result is the sum of."""
    packet = func.overloadpacket
    if packet is torch.ops.aten.convolution:
        return math.prod(args[1].shape[1:])
    if packet in (torch.ops.aten.mm, torch.ops.aten.bmm):
        return args[0].shape[-1]
    if packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm):
        return args[1].shape[-1]
    return 0
