"""What the engines of a study are given, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Kind = Literal["finished", "diverged", "failed", "interrupted"]


@dataclass(frozen=True)
class Job:
    """A training to be run in `folder`, or gone on with if it is there; `config` is YAML."""

    key: str
    label: str
    data: str
    config: str
    folder: Path
    threads: int


@dataclass(frozen=True)
class Ended:
    """How a job ended; `message` says why it failed."""

    kind: Kind
    message: str | None = None


class Watcher(Protocol):
    """The study, as an engine sees it."""

    def stop(self) -> bool:
        """Whether to begin nothing further, and end what runs with its checkpoint."""
        ...

    def started(self, job: Job) -> None: ...

    def ended(self, job: Job, found: Ended) -> None: ...

    def tick(self) -> None:
        """Called a few times a second."""
