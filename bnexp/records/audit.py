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

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexp.atomic import write_atomically
from bnexp.errors import UserError

if TYPE_CHECKING:
    from bnexp.statistics import Statistics


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
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path / name} can't be read: {error}") from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self._text(name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path / name} is damaged: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{self.path / name} is damaged: it is not a JSON object")
        return value


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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder.parent} is no folder to make {folder.name} in") from None
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        (staging / "statistics").mkdir()
        texts = {
            "config.yaml": config,
            "environment.json": _to_json(environment or {}),
            "state.json": _to_json({"state": "finished", "step": 0}),
            "comparison.json": _to_json(comparison),
            "findings.json": _to_json(findings),
            "report.html": page,
        }
        for name, text in texts.items():
            write_atomically(staging / name, text)
        for condition, values in statistics.items():
            values.save(staging / "statistics" / f"{condition.replace('/', '-')}.pt")
        _rename(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return AuditRecord(folder)


def next_folder(name: str, runs: Path) -> Path:
    """`runs/<name>-<number>` with the first number after those there are."""
    taken = [0]
    with contextlib.suppress(OSError):
        for path in runs.iterdir():
            stem, _, number = path.name.rpartition("-")
            if stem == name and number.isdecimal():
                taken.append(int(number))
    return runs / f"{name}-{max(taken) + 1}"


def _rename(staging: Path, folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists: name a folder that doesn't")
    try:
        staging.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        raise UserError(f"{folder} exists: name a folder that doesn't") from None


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
