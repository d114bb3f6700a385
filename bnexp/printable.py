"""Text from outside, such as names of files, as text that can be shown anywhere."""

from __future__ import annotations

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
