"""Standard output as tables are printed to it."""

from __future__ import annotations

from rich.console import Console

PIPE_WIDTH = 160


def output() -> Console:
    """Standard output; wide where nobody looks at it in a terminal, so that no cell is cut."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console
