"""Tables and paragraphs as code hosts show them (GitHub Flavored Markdown), whatever is in them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bnexp.printable import printable

_SPECIAL = re.compile(r"[\\`*_\[\]<>|~&#$]")
_BLOCK = re.compile(r"(\d+(?=[.)](?:\s|$))|(?=[-+=]))")


def escaped(text: str) -> str:
    """One line that is shown as `text` is: what has a meaning in Markdown or HTML loses it, and
    control characters are named."""
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", printable(text))


def paragraph(text: str, bold: bool = False) -> str:
    """`text` as a paragraph, also where it begins like a list or a rule. Its line breaks stay."""
    lines = []
    for line in text.strip().splitlines():
        line = escaped(line.strip())
        lines.append(_BLOCK.sub(r"\1\\", line, count=1) if _BLOCK.match(line) else line)
    joined = "  \n".join(line for line in lines if line)
    return f"**{joined}**" if bold and joined else joined


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right. Line breaks in cells stay;
    short rows are filled up."""
    width = len(head)
    lines = [_row(head), "| " + " | ".join([":---", *["---:"] * (width - 1)]) + " |"]
    lines += [_row([*row, *[""] * (width - len(row))]) for row in rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    texts = ("<br>".join(map(escaped, cell.split("\n"))) for cell in cells)
    return f"| {' | '.join(text.strip() for text in texts)} |"
