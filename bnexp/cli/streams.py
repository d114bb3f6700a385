"""Standard streams that can't be written are no reason to fail."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

PLAIN = "bnexp.plain"
"""The error handler of a stream that can't show all characters: a minus stays a minus."""

_IN_ASCII = {"−": "-", "–": "-", "…": "..", "σ": "sd"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(character, "?") for character in characters), error.end


codecs.register_error(PLAIN, _in_ascii)


@contextlib.contextmanager
def printing_what_can_be() -> Iterator[None]:
    """Print to stdout in the block; where that fails, the rest of the block is left out."""
    try:
        yield
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        give_up(sys.stdout)
        with contextlib.suppress(OSError, ValueError):
            print(f"bnexp: the results can't be printed: {error}", file=sys.stderr)


def flush_or_give_up() -> None:
    """What is left in the streams; so that Python has nothing to fail with when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            give_up(stream)


def give_up(stream: TextIO) -> None:
    """From now on `stream` leads nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
