"""Progress of a recomputation: to nobody, to a callable, or as a bar on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Tell = Callable[[int, int | None], None]
Progress = bool | Tell


class Report:
    """Counts legs of the way. `tell` gets (done, total or None), `note` a line of text."""

    def __init__(self, tell: Tell | None = None, note: Callable[[str], None] | None = None) -> None:
        self._tell = tell
        self._note = note
        self._done = 0
        self._total: int | None = None

    def start(self, total: int | None) -> None:
        self._total = total

    def note(self, text: str) -> None:
        if self._note is not None:
            self._note(text)

    def advance(self) -> None:
        self._done += 1
        if self._tell is not None:
            self._tell(self._done, self._total)


@contextlib.contextmanager
def reporting(progress: Progress, method: str) -> Iterator[Report]:
    """The report that `progress` asks for: False nobody, True a bar on stderr, else a callable."""
    if progress is not True:
        yield Report(progress or None)
        return
    from rich import progress as rich_progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"statistics ({method})", total=None)
        yield Report(
            tell=lambda done, total: bar.update(task, completed=done, total=total),
            note=lambda text: console.print(f"exact: {text}", highlight=False),
        )
