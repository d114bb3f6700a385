"""The record of a study.

runs/<name>-<number>/
    study.yaml         the study, which runs again from it alone
    state.json         running, finished, interrupted or failed; how many experiments; failures
    experiments/       <hash of the resolved config>/, each an experiment's record, and the log of
                       the process that made it, <hash>.log, where it said something
    results.csv        one row per experiment and condition, axes and seed as columns
    claims.json        the claims and what came out
    report.html
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.records.experiment import RUNS, Run, is_run
from bnexp.records.files import read_json, read_text
from bnexp.records.folder import Folder, newest_first
from bnexp.records.making import free_folders, place, staged, to_json

STATES = ("running", "finished", "interrupted", "failed")


@dataclass(frozen=True)
class StudyRecord(Folder):
    """The folder of a study."""

    busy = "is being run by another process"

    @property
    def experiments(self) -> Path:
        return self.path / "experiments"

    def run(self, key: str) -> Run | None:
        """The record of the training of this identity, if it was begun."""
        path = self.experiments / key
        return Run(path) if is_run(path) else None

    @property
    def text(self) -> str:
        """The content of study.yaml."""
        text = read_text(self.path / "study.yaml")
        if text is None:
            raise UserError(f"there is no {self.path / 'study.yaml'}")
        return text

    @property
    def state(self) -> dict[str, Any]:
        """`{"state", "created", "grid", "experiments", "trainings", "done", "failed"}`; `failed`:
        identity -> why it was given up. The state is `killed` when a study that says it is running
        no longer holds its lock."""
        return self.now(self._written_state)

    def _written_state(self) -> dict[str, Any]:
        path = self.path / "state.json"
        found = read_json(path)
        if found is None:
            raise UserError(f"there is no {path}")
        if found.get("state") not in STATES:
            raise UserError(f"{path} is damaged: its state is none of {', '.join(STATES)}")
        state = {"created": "", "grid": "", "experiments": 0, "trainings": 0, "done": 0} | found
        failed = state.setdefault("failed", {})
        numbers = [state[name] for name in ("experiments", "trainings", "done")]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise UserError(f"{path} is damaged: its counts are no numbers")
        texts = [state["created"], state["grid"]]
        if not isinstance(failed, dict) or not all(
            isinstance(text, str) for text in (*texts, *failed.values())
        ):
            raise UserError(f"{path} is damaged: a text in it is none")
        return state

    def results(self) -> tuple[list[str], list[dict[str, str]]]:
        """The columns of results.csv and its rows, as texts; empty before there are any."""
        path = self.path / "results.csv"
        text = read_text(path)
        if not text:
            return [], []
        try:
            rows = list(csv.reader(io.StringIO(text), strict=True))
        except csv.Error as error:
            raise UserError(f"{path} is damaged: {error}") from None
        columns = rows[0]
        if any(len(row) != len(columns) for row in rows):
            raise UserError(f"{path} is damaged: a row has too few columns, or too many")
        return columns, [dict(zip(columns, row, strict=True)) for row in rows[1:]]

    def claims(self) -> list[dict[str, Any]]:
        """The claims of claims.json, as `bnexp.analysis.judged.Judged` has them."""
        path = self.path / "claims.json"
        claims = (read_json(path) or {}).get("claims", [])
        if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
            raise UserError(f"{path} is damaged: claims is no list of claims")
        return claims


def create_study(name: str, text: str, state: Mapping[str, Any], runs: Path = RUNS) -> StudyRecord:
    """Make the record `<runs>/<name>-<number>`, whole or not at all."""
    with staged(runs) as staging:
        (staging / "experiments").mkdir()
        write_atomically(staging / "study.yaml", text)
        write_atomically(staging / "state.json", to_json(state))
        made = place(staging, free_folders(name, runs))
        assert made is not None  # numbers do not end
        return StudyRecord(made)


def is_study(path: Path) -> bool:
    try:
        return (path / "study.yaml").is_file() and (path / "experiments").is_dir()
    except OSError:  # a name too long for a path
        return False


def find_study(given: str, runs: Path = RUNS) -> StudyRecord | None:
    """The study a user named by its record's path or by its name below `runs`, if it is one."""
    return next((StudyRecord(p) for p in (Path(given), runs / given) if is_study(p)), None)


def all_studies(runs: Path = RUNS) -> list[StudyRecord]:
    """Every study below `runs`, newest first."""
    return newest_first(runs, is_study, StudyRecord, lambda record: record.state["created"])


def to_csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
