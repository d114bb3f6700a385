"""Progress of a recomputation: to nobody, to a callable, or as a bar on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from bnexp.ranks import Ranks

Tell = Callable[[int, int | None], None]
Progress = bool | Tell


class Report:
    """Counts legs of the way. `tell` gets (done, total or None), `note` a line of text.

    Each leg of one rank is also where it heeds the others (`Ranks.heed`).
    """

    def __init__(
        self,
        tell: Tell | None = None,
        note: Callable[[str], None] | None = None,
        heed: Callable[[], None] = lambda: None,
    ) -> None:
        self._tell = tell
        self._note = note
        self._heed = heed
        self._done = 0
        self._total: int | None = None

    def start(self, total: int | None) -> None:
        self._total = total

    def note(self, text: str) -> None:
        if self._note is not None:
            self._note(text)

    def advance(self) -> None:
        self._heed()
        self._done += 1
        if self._tell is not None:
            self._tell(self._done, self._total)


@contextlib.contextmanager
def reporting(progress: Progress, method: str, ranks: Ranks) -> Iterator[Report]:
    """The report that `progress` asks for: False nobody, True a bar on stderr, else a callable.

    Of several ranks the first shows the bar.
    """
    if progress is not True or ranks.rank:
        yield Report(None if isinstance(progress, bool) else progress, heed=ranks.heed)
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
            heed=ranks.heed,
        )
