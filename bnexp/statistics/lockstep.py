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

from greenlet import GreenletExit, getcurrent, greenlet

from bnexp.errors import UserError
from bnexp.statistics.pass_settings import PassSettings
from bnexp.statistics.spill import OffloadMode, PassMemory

FINISHED = object()
STOP = object()


def in_threads() -> UserError:
    return UserError(
        "the model runs its BN layers in threads or greenlets of its own (nn.DataParallel?): pass "
        "the module inside, or use method='pooled'"
    )


class Lockstep:
    """Advances jobs from meeting point to meeting point.

    A job calls `wait(item)` and gets back what `decide` answered. After each round `decide`
    receives the items of all jobs in order, `FINISHED` for those that returned; it answers with
    the value that `wait` returns to every job, or with `STOP`.

    offload: where given, jobs that wait beyond `bound` bytes in all are offloaded to its store.
    reserve: bytes left free for the job that runs.
    """

    def __init__(self, offload: OffloadMode | None = None, bound: int = 0, reserve: int = 0):
        self._offload = offload
        self._bound = bound - reserve
        self._resident = 0
        self._hub = getcurrent()
        self._running: greenlet | None = None
        self._thread = threading.get_ident()
        self._closed = False
        self._settings = PassSettings()

    def wait(self, item: Any) -> Any:
        """Called inside a job: pauses it until all others wait as well."""
        if self._closed:
            raise GreenletExit
        if threading.get_ident() != self._thread or getcurrent() is not self._running:
            raise in_threads()
        with self._settings.elsewhere():
            return self._hub.switch(item)

    def run(
        self,
        jobs: Iterable[Callable[[], None]],
        decide: Callable[[list], Any],
        advanced: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Run all jobs to their end, or until `decide` says `STOP`.

        An exception in a job, in `jobs` or in `decide` ends all of it and propagates. No
        greenlet is left behind in any case. `advanced` is called after each leg, with the number
        of the job, counted from 0.
        """
        passes: list[tuple[greenlet, PassMemory]] = []
        try:
            items = []
            for job in jobs:
                passes.append((greenlet(job, parent=self._hub), PassMemory()))
                passes[-1][0].gr_context = contextvars.copy_context()
                del job
                items.append(self._advance(*passes[-1]))
                advanced(len(items) - 1)
            while any(item is not FINISHED for item in items):
                answer = decide(items)
                if answer is STOP:
                    return
                for index, (job, memory) in enumerate(passes):
                    items[index] = self._advance(job, memory, answer)
                    advanced(index)
        finally:
            self._closed = True
            # The last first, so that what they set and put back is put back in order.
            for job, _ in reversed(passes):
                if not job.dead:
                    with contextlib.suppress(GreenletExit):
                        self._running = job
                        job.throw(GreenletExit)
            self._running = None
            if self._offload is not None:
                for _, memory in passes:
                    self._offload.restore_survivors(memory)

    def _advance(self, job: greenlet, memory: PassMemory, *answer: Any) -> Any:
        if self._offload is None:
            return self._switch(job, *answer)
        self._resident -= memory.resident
        memory.resident = 0
        self._offload.restore(memory)
        self._offload.current = memory
        try:
            item = self._switch(job, *answer)
        finally:
            self._offload.current = None
        if self._resident + memory.bytes <= self._bound:
            memory.resident = memory.bytes
            self._resident += memory.resident
        else:
            self._offload.offload(memory)
        return item

    def _switch(self, job: greenlet, *answer: Any) -> Any:
        self._running = job
        item = job.switch(*answer)
        self._running = None
        return FINISHED if job.dead else item
