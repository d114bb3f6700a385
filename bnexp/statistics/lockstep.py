"""Many forward passes in lockstep: each runs to its next meeting point and waits there.

One greenlet per pass, all in one thread. A pass that waits is a paused call stack; the
scheduler starts the next one, and when all have arrived decides for all and lets them go on.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import overrides

from bnexp.errors import UserError
from bnexp.statistics.spill import Owner, Ownership

FINISHED = object()
STOP = object()


class Lockstep:
    """Advances jobs from meeting point to meeting point.

    A job calls `wait(item)` and gets back what `decide` answered. After each round `decide`
    receives the items of all jobs in order, `FINISHED` for those that returned; it answers with
    the value that `wait` returns to every job, or with `STOP`.

    ownership: where given, jobs that wait beyond `bound` bytes in all are put into its store.
    reserve: bytes left free for the job that runs.
    """

    def __init__(self, ownership: Ownership | None = None, bound: int = 0, reserve: int = 0):
        self._ownership = ownership
        self._bound = bound - reserve
        self._resident = 0
        self._hub = None
        self._running = None
        self._thread = threading.get_ident()
        self._closed = False
        self._state = _ThreadState()
        self.started = 0

    def wait(self, item: Any) -> Any:
        """Called inside a job: pauses it until all others wait as well."""
        if self._closed:
            raise GreenletExit
        if threading.get_ident() != self._thread or getcurrent() is not self._running:
            raise UserError(
                "the model runs its BN layers in threads or greenlets of its own "
                "(nn.DataParallel?): pass the module inside, or use method='pooled'"
            )
        with self._state.elsewhere():
            return self._hub.switch(item)

    def run(
        self,
        jobs: Iterable[Callable[[], None]],
        decide: Callable[[list], Any],
        advanced: Callable[[], None] = lambda: None,
    ) -> None:
        """Run all jobs to their end, or until `decide` says `STOP`.

        An exception in a job, in `jobs` or in `decide` ends all of it and propagates. No
        greenlet is left behind in any case. `advanced` is called after each job's each leg.
        """
        self._hub = getcurrent()
        passes: list[tuple[greenlet, Owner]] = []
        try:
            items = []
            for job in jobs:
                passes.append((greenlet(job, parent=self._hub), Owner()))
                passes[-1][0].gr_context = contextvars.copy_context()
                del job
                self.started += 1
                items.append(self._advance(*passes[-1]))
                advanced()
            while any(item is not FINISHED for item in items):
                answer = decide(items)
                if answer is STOP:
                    return
                for index, (job, owner) in enumerate(passes):
                    items[index] = self._advance(job, owner, answer)
                    advanced()
        finally:
            self._closed = True
            for job, _ in passes:
                if not job.dead:
                    with contextlib.suppress(GreenletExit):
                        self._running = job
                        job.throw(GreenletExit)
            self._running = None
            if self._ownership is not None:
                for _, owner in passes:
                    self._ownership.release(owner)

    def _advance(self, job: greenlet, owner: Owner, *answer: Any) -> Any:
        if self._ownership is None:
            return self._switch(job, *answer)
        self._resident -= owner.resident
        owner.resident = 0
        self._ownership.fetch(owner)
        self._ownership.current = owner
        try:
            item = self._switch(job, *answer)
        finally:
            self._ownership.current = None
        if self._resident + owner.bytes <= self._bound:
            owner.resident = owner.bytes
            self._resident += owner.resident
        else:
            self._ownership.put(owner)
        return item

    def _switch(self, job: greenlet, *answer: Any) -> Any:
        self._running = job
        item = job.switch(*answer)
        self._running = None
        return FINISHED if job.dead else item


class _ThreadState:
    """torch's per-thread switches, which a pass may have set around the point where it waits.

    All passes share one thread, so a pass that pauses inside `torch.autocast`, `enable_grad`,
    `inference_mode`, `torch.cuda.device` or a function mode puts back what held when the sweep
    began, and takes its own up again when it goes on.
    """

    def __init__(self) -> None:
        present = {
            "cpu": True,
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
            "xpu": torch.xpu.is_available(),
        }
        self._devices = [kind for kind, there in present.items() if there]
        self._base = self._read()

    def _read(self) -> tuple:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_cache_enabled(),
            torch.cuda.current_device() if torch.cuda.is_initialized() else None,
            tuple(
                (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in self._devices
            ),
            overrides._len_torch_function_stack(),
        )

    @contextlib.contextmanager
    def elsewhere(self):
        own = self._read()
        if own == self._base:
            yield
            return
        grad, inference, cache, device, autocast, modes = self._base
        with contextlib.ExitStack() as stack:
            popped = [overrides._pop_mode() for _ in range(own[-1] - modes)]
            stack.callback(lambda: [overrides._push_mode(m) for m in reversed(popped)])
            if own[1] != inference:
                stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, (enabled, dtype), now in zip(self._devices, autocast, own[4], strict=True):
                if now != (enabled, dtype):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache))
            if device is not None and device != own[3]:
                stack.enter_context(torch.cuda.device(device))
            yield
