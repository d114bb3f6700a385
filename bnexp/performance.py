"""Settings of the whole process that make training faster."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_briefly() -> None:
    """Let OpenMP's threads spin for some microseconds only before they sleep until there is work.

    By default libgomp's spin for milliseconds, which on a machine whose cores are busy with other
    work slows PyTorch down far beyond its share (`benchmarks/busy.py`). Sets an environment
    variable that libgomp reads when torch is imported, so call it before; does nothing where the
    user has set one of `WAITING`.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "10000"


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
