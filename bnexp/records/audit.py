"""The record of an audit: made whole or not at all, read by the report.

runs/<name>-<number>/
    config.yaml        what was audited
    environment.json   versions, device, git commit, command
    state.json         finished
    comparison.json    the score under each condition (`bnexp.analysis.comparison`)
    findings.json      findings, attribution, halves
    statistics/        <condition>.pt, as `Statistics.save` writes them
    report.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.records.files import read_json, read_text
from bnexp.records.making import free_folders, place, staged, to_json

if TYPE_CHECKING:
    from bnexp.statistics import Statistics


Content = TypeVar("Content")


@dataclass(frozen=True)
class AuditRecord:
    """An audit's folder. Reading never changes it."""

    path: Path

    @property
    def config(self) -> str:
        return self._text("config.yaml")

    @property
    def environment(self) -> dict[str, Any]:
        return self._json("environment.json")

    @property
    def comparison(self) -> dict[str, Any]:
        return self._json("comparison.json")

    @property
    def findings(self) -> dict[str, Any]:
        return self._json("findings.json")

    def _text(self, name: str) -> str:
        return self._there(name, read_text(self.path / name))

    def _json(self, name: str) -> dict[str, Any]:
        return self._there(name, read_json(self.path / name))

    def _there(self, name: str, content: Content | None) -> Content:
        if content is None:
            raise UserError(f"{self.path / name} is missing")
        return content


def is_audit(path: Path) -> bool:
    try:
        return (path / "findings.json").is_file() and (path / "comparison.json").is_file()
    except OSError:  # a name too long for a path
        return False


def find_audit(given: str, runs: Path) -> AuditRecord | None:
    """The audit a user named by its path or by its name below `runs`, if it is one."""
    return next((AuditRecord(p) for p in (Path(given), runs / given) if is_audit(p)), None)


def write_audit(
    folder: Path,
    *,
    comparison: Mapping[str, Any],
    findings: Mapping[str, Any],
    statistics: Mapping[str, Statistics],
    config: str = "",
    environment: Mapping[str, Any] | None = None,
    page: str = "",
) -> AuditRecord:
    """Make the record at `folder`, whole or not at all. UserError if it exists already."""
    with staged(folder.parent) as staging:
        (staging / "statistics").mkdir()
        texts = {
            "config.yaml": config,
            "environment.json": to_json(environment or {}),
            "state.json": to_json({"state": "finished", "step": 0}),
            "comparison.json": to_json(comparison),
            "findings.json": to_json(findings),
            "report.html": page,
        }
        for name, text in texts.items():
            write_atomically(staging / name, text)
        for condition, values in statistics.items():
            values.save(staging / "statistics" / f"{condition.replace('/', '-')}.pt")
        if place(staging, [folder]) is None:
            raise UserError(f"{folder} exists: name a folder that doesn't")
    return AuditRecord(folder)


def next_folder(name: str, runs: Path) -> Path:
    """`runs/<name>-<number>` with the first number after those there are."""
    return next(free_folders(name, runs))
