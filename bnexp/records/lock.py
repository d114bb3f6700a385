"""The lock that a training holds on its record; the operating system frees it with the process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from bnexp.errors import UserError

READER_SECONDS = 10.0
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`. BlockingIOError if another process holds it.

    Who only asks (`is_locked`) shares the lock for an instant, and is waited for.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path} is no ordinary file: remove it") from None
        raise error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UserError(f"{path} is no ordinary file: remove it")
        patience = time.monotonic() + READER_SECONDS
        while not _try(handle, fcntl.LOCK_EX):
            # Only readers share: where the lock can't be shared, another training holds it.
            if not _try(handle, fcntl.LOCK_SH) or time.monotonic() > patience:
                raise BlockingIOError(f"{path} is locked")
            fcntl.flock(handle, fcntl.LOCK_UN)  # two that wait would share it for ever
            time.sleep(0.001)
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file at `path`. Never keeps one from taking it."""
    try:
        handle = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        return False
    try:
        return not _try(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _try(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
