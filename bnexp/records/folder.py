"""What the folders of runs and of studies have in common."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.records import lock
from bnexp.records.making import to_json


@dataclass(frozen=True)
class Folder:
    """A record's folder, which one process at a time may work on. Reading never changes it; what
    is written stays within it.

    Everything that is read may come from a stranger: what isn't as bnexp writes it is a UserError
    that names the file.
    """

    path: Path

    busy: ClassVar[str]
    """What is said, after the path, to who wants to work on what another process works on."""

    @property
    def name(self) -> str:
        return self.path.name

    def write(self, filename: str, content: str | bytes | memoryview) -> None:
        """Replace a file by `content`, whole or not at all. A link is replaced itself: nothing
        outside of the folder is written."""
        write_atomically(self.path / filename, content, follow_links=False)

    def write_json(self, filename: str, value: Mapping[str, Any]) -> None:
        self.write(filename, to_json(value))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, as the only one that works on it. UserError if there is another one."""
        with contextlib.ExitStack() as holding:
            try:
                holding.enter_context(lock.locked(self.path / ".lock"))
            except BlockingIOError:
                raise UserError(f"{self.path} {self.busy}") from None
            yield

    def is_locked(self) -> bool:
        """Whether a process holds the folder. Asking never keeps one from taking it."""
        return lock.is_locked(self.path / ".lock")

    def now(self, written: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The state that `written` reads; `killed` where it is running and nobody holds the
        folder. Who writes another one does so before it lets go of the folder."""
        state = written()
        if state["state"] == "running" and not self.is_locked():
            state = written()
            if state["state"] == "running":
                state["state"] = "killed"
        return state


Kind = TypeVar("Kind", bound=Folder)


def newest_first(
    runs: Path, is_one: Callable[[Path], bool], kind: type[Kind], created: Callable[[Kind], str]
) -> list[Kind]:
    """The records of one kind below `runs`, by when they were `created`, then by their numbers."""
    if not runs.is_dir():
        return []

    def key(record: Kind) -> tuple[str, int, str]:
        number = re.search(r"-([0-9]{1,18})$", record.name)
        try:
            when = created(record)
        except UserError:
            when = ""
        return when, int(number[1]) if number else 0, record.name

    found = [kind(p) for p in runs.iterdir() if not p.name.startswith(".") and is_one(p)]
    return sorted(found, key=key, reverse=True)
