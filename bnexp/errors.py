"""The errors bnexp raises on purpose, each with the exit code the command line gives it."""

from __future__ import annotations

import errno
import reprlib


class UserError(ValueError):
    """The input is wrong. The message is one line: what is wrong and how to mend it."""

    exit_code = 2


class NotFinite(UserError):
    """The data or the activations hold NaN or infinity, or what no buffer can hold."""


class RunFailed(RuntimeError):
    """The input was right and the run failed all the same (diverged, disk full, ...)."""

    exit_code = 1


class Diverged(RunFailed):
    """The training itself came to nothing: its numbers are not finite, or it collapsed. Another
    attempt would end in the same way."""


class ExpectationNotMet(RuntimeError):
    """The run finished, but an `expect:` of its config does not hold."""

    exit_code = 3


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and its state is in a checkpoint."""

    exit_code = 130


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 2, 4, 6
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def shown(value: object, limit: int = 120) -> str:
    """`repr(value)` for an error message: of bounded length, and made in bounded time."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # an int of too many digits
        text = "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "access is not allowed",
    errno.EPERM: "access is not allowed",
    errno.EIO: "the disk failed",
}


def disk_failure(error: BaseException) -> RunFailed | None:
    """What an OSError says of the disk, with the file it names; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
        return None
    where = f" ({error.filename})" if error.filename else ""
    return RunFailed(_DISK_ERRORS[error.errno] + where)


# What torch, oneDNN on a CPU without memory for a convolution, the dynamic linker and Python say.
_MEMORY_ERRORS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "could not create a primitive",
    "failed to map segment from shared object",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of a device, did not suffice."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = isinstance(error, RuntimeError | ImportError) and str(error).lower()
    return isinstance(error, MemoryError) or any(text in (said or "") for text in _MEMORY_ERRORS)
