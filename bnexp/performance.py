"""Settings of the whole process that make training faster."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import time
from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Of the machine's cores, what other processes may use before threads had better not spin.
_OTHERS = 0.25
# Seconds over which that is measured at the least.
_LOOK = 0.1


def wait_briefly() -> None:
    """Beside other processes that keep the cores busy, let OpenMP's threads sleep soon while they
    wait for one another.

    By default libgomp's spin for milliseconds. On a quiet machine that is fastest; on a busy one it
    takes PyTorch down far below its share (`benchmarks/busy.py`). Whether others are busy is seen
    from /proc/stat, since this module was imported, 0.1 s ago at the least. Sets an environment
    variable that libgomp reads when torch is imported, and does nothing where it is already; nor
    where the user has set one of `WAITING`, and but on Linux.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    time.sleep(max(0.0, _IMPORTED + _LOOK - time.monotonic()))
    if _others(_USED, _used()) > _OTHERS:
        os.environ["GOMP_SPINCOUNT"] = "1000"


class _Used(NamedTuple):
    """Seconds of the cores that this process may use, since the machine was started: in all, idle,
    and used by this process and its children that have ended."""

    whole: float
    idle: float
    own: float


def _used() -> _Used | None:
    try:
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        with open("/proc/stat") as file:
            cores = [line.split() for line in takewhile(lambda line: line[:3] == "cpu", file)]
        ticks = [[int(word) for word in core[1:9]] for core in cores if core[0] in mine]
        whole = sum(map(sum, ticks))
        idle = sum(core[3] + core[4] for core in ticks)  # waiting for a disk is idle, too
        second = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return _Used(whole / second, idle / second, sum(os.times()[:4]))


def _others(before: _Used | None, after: _Used | None) -> float:
    """The share of the machine that other processes had between two looks; 0 if it isn't known."""
    if before is None or after is None or after.whole <= before.whole:
        return 0.0
    whole, idle, own = (b - a for a, b in zip(before, after, strict=True))
    return (whole - idle - own) / whole


_IMPORTED, _USED = time.monotonic(), _used()


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep freed blocks instead of returning them to the system.

    By default every large activation is mapped afresh and its pages are faulted in one by one.
    Call it before the first large allocation. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """A block of imports, during which nothing is searched for garbage, and whose objects aren't
    searched later either: torch brings a million, which are there until the end. Saves about a
    quarter of `import torch` and of the end of the process (`benchmarks/startup.py`)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may multiply and convolve float32 with TensorFloat-32. No effect elsewhere."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def prepare_process(allocator: bool, tf32: bool) -> None:
    """What a process that trains alone sets, as the config's `performance` says. Call it before
    the first large allocation."""
    if allocator:
        keep_freed_memory()
    allow_tf32(tf32)
