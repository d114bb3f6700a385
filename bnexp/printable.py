"""Text from outside, such as names of files, as text that can be shown anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_JOINERS = "\u200c\u200d"  # of Persian words, of emoji


def printable(text: object) -> str:
    """`str(text)` on one line, in characters that every terminal, file and JSON reader takes.

    What is not printable is written as in Python: \\n, \\u202e; a byte that is not UTF-8 in the
    name of a file as \\xe9.
    """
    name = str(text)
    return name if name.isprintable() else "".join(map(_shown, name))


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    if "\udc80" <= character <= "\udcff":  # how os.fsdecode brings such a byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def all_printable(value: Any) -> Any:
    """The same tree with every text in it as it can be shown: a record may hold control
    characters, and halves of characters, that neither a page nor a terminal takes."""
    if isinstance(value, Mapping):
        return {all_printable(key): all_printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [all_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value
