"""The run folder: made atomically, appended to while training, read by everything else.

runs/<name>-<number>/
    config.yaml        resolved and retrainable
    environment.json   versions, device, seed, git commit, command, resumes
    state.json         running, finished, interrupted or failed, and at which step
    steps.csv          one row per step
    evals.csv          one row per evaluation
    checkpoints/       see bnexp.training.checkpoints
    comparison.json    see bnexp.evaluation
    results.png, report.html
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.records.csv_log import CsvLog

if TYPE_CHECKING:
    import numpy as np

    from bnexp.config import Config

RUNS = Path("runs")
STEP_COLUMNS = ("step", "epoch", "lr", "loss", "accuracy", "ema_accuracy")
EVAL_COLUMNS = ("step", "split", "statistics", "accuracy", "loss", "samples", "seconds")


def _to_json(value: dict) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Run:
    """A run folder. Reading never changes it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config(self) -> dict:
        """The resolved config as plain data."""
        return self.load_config().model_dump(mode="json")

    def load_config(self) -> Config:
        from bnexp.config import load_config

        return load_config(self.path / "config.yaml")

    @property
    def environment(self) -> dict:
        environment = self._json("environment.json") or {}
        if not isinstance(environment.get("created", ""), str):
            raise UserError(f"{self.path}/environment.json is damaged: created is no time")
        return environment

    @property
    def state(self) -> dict:
        """`{"state", "step", "total_steps", "weights", "message"}`. The state is `killed` when a
        run that says it is running no longer holds its lock, and `unknown` without the file."""
        state = self._json("state.json") or {"state": "unknown", "step": 0}
        if not isinstance(state.get("state"), str) or not isinstance(state.get("step"), int):
            raise UserError(f"{self.path}/state.json is damaged: it has no state and step")
        if state["state"] == "running" and not self.is_locked():
            state["state"] = "killed"
        return state

    def comparison(self) -> dict | None:
        """The content of comparison.json; None before the final evaluation."""
        comparison = self._json("comparison.json")
        if comparison is not None and not (
            {"baseline", "samples", "classes", "verdict", "layers"} <= comparison.keys()
            and isinstance(comparison.get("kinds"), list)
            and comparison["kinds"]
        ):
            raise UserError(f"{self.path}/comparison.json is damaged: it is not a comparison")
        return comparison

    def steps(self) -> dict[str, np.ndarray]:
        """The columns of steps.csv as float64 arrays; a line being written is left out."""
        import numpy as np

        content = b""
        with contextlib.suppress(FileNotFoundError):
            content = (self.path / "steps.csv").read_bytes()
        rows = content[content.find(b"\n") + 1 : content.rfind(b"\n") + 1]
        if not rows:
            return {name: np.empty(0) for name in STEP_COLUMNS}
        try:  # a list of its rows would take twenty times the memory
            table = np.loadtxt(io.BytesIO(rows), delimiter=",", comments=None, ndmin=2)
        except ValueError as error:
            reason = str(error).partition(";")[0]
            raise UserError(f"{self.path}/steps.csv is damaged: {reason}") from None
        if table.shape[1] != len(STEP_COLUMNS):
            raise UserError(f"{self.path}/steps.csv is damaged: {table.shape[1]} columns")
        known = [i for i, name in enumerate(STEP_COLUMNS) if name != "loss"]  # that may be nan
        if not np.isfinite(table[:, known]).all():
            raise UserError(f"{self.path}/steps.csv is damaged: a step without its numbers")
        return {name: table[:, i] for i, name in enumerate(STEP_COLUMNS)}

    def evals(self) -> list[dict]:
        """The rows of evals.csv, numbers parsed."""
        numbers = {"step": int, "samples": int, "accuracy": float, "loss": float, "seconds": float}
        try:
            return [
                {k: numbers.get(k, str)(v) for k, v in zip(EVAL_COLUMNS, row, strict=True)}
                for row in self._rows("evals.csv", len(EVAL_COLUMNS))
            ]
        except ValueError as error:
            raise UserError(f"{self.path}/evals.csv is damaged: {error}") from None

    def write_state(
        self, state: str, step: int, total_steps: int, weights="last", message: str | None = None
    ) -> None:
        self.write_json(
            "state.json",
            {
                "state": state,
                "step": step,
                "total_steps": total_steps,
                "weights": weights,
                "message": message,
            },
        )

    def write_json(self, filename: str, value: dict) -> None:
        write_atomically(self.path / filename, _to_json(value))

    def lock(self):
        """The lock a training holds on its run; the operating system frees it with the process."""
        from filelock import FileLock

        return FileLock(self.path / ".lock", timeout=0)

    def is_locked(self) -> bool:
        from filelock import Timeout

        if not (self.path / ".lock").exists():
            return False
        try:
            with self.lock():
                return False
        except Timeout:
            return True
        except OSError:
            return False

    def _json(self, filename: str) -> dict | None:
        try:
            value = json.loads((self.path / filename).read_text())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError, IsADirectoryError) as error:
            raise UserError(f"{self.path / filename} is damaged: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{self.path / filename} is damaged: it is not a JSON object")
        return value

    def _rows(self, filename: str, columns: int) -> list[list[str]]:
        try:
            text = (self.path / filename).read_text()
        except FileNotFoundError:
            return []
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise UserError(f"{self.path / filename} is damaged: {error}") from None
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.reader(io.StringIO(whole)))[1:]
        for number, row in enumerate(rows, start=2):
            if len(row) != columns:
                raise UserError(f"{self.path / filename} is damaged in line {number}")
        return rows


def create_run(config: Config, environment: dict, runs: Path = RUNS) -> Run:
    """Make the next free `runs/<name>-<number>/`, whole or not at all.

    The folder is filled under a temporary name and then renamed; a rename onto a folder that
    another process made in the meantime fails, and the next number is tried.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError):
        raise UserError(f"{runs}/ can't be made here: run bnexp in another folder") from None
    staging = Path(tempfile.mkdtemp(prefix=f".{config.name}-", dir=runs))
    try:
        staging.chmod(0o755)
        (staging / "checkpoints").mkdir()
        write_atomically(staging / "config.yaml", config.to_yaml())
        write_atomically(staging / "environment.json", _to_json(environment))
        CsvLog(staging / "steps.csv", STEP_COLUMNS).close()
        CsvLog(staging / "evals.csv", EVAL_COLUMNS).close()
        number = 1 + max((n for n in map(_number_of(config.name), runs.iterdir()) if n), default=0)
        while True:
            target = runs / f"{config.name}-{number}"
            try:
                staging.rename(target)
                return Run(target)
            except OSError:
                if not target.exists():
                    raise
                number += 1
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _number_of(name: str):
    pattern = re.compile(re.escape(name) + r"-(\d+)")

    def number(path: Path) -> int | None:
        match = pattern.fullmatch(path.name)
        return int(match[1]) if match else None

    return number


def is_run(path: Path) -> bool:
    try:
        has_more = (path / "steps.csv").is_file() or (path / "checkpoints").is_dir()
        return has_more and (path / "config.yaml").is_file()
    except OSError:  # a name too long for a path
        return False


def all_runs(runs: Path = RUNS) -> list[Run]:
    """Every run below `runs`, newest first."""
    if not runs.is_dir():
        return []
    found = [Run(p) for p in runs.iterdir() if not p.name.startswith(".") and is_run(p)]
    return sorted(found, key=_created, reverse=True)


def _created(run: Run) -> tuple:
    number = run.name.rpartition("-")[2]
    try:
        created = str(run.environment.get("created", ""))
    except UserError:
        created = ""
    return (created, int(number) if number.isdigit() else 0)


def find_run(given: str, runs: Path = RUNS) -> Run:
    """The run a user named by its path or by its name below `runs`. UserError if there is none."""
    for path in (Path(given), runs / given):
        if is_run(path):
            return Run(path)
    with contextlib.suppress(OSError):
        for path in (Path(given), runs / given):
            if path.exists():
                raise UserError(f"{path} is not a run folder: it has no config.yaml and logs")
    path = Path(given)
    names = [run.name for run in all_runs(runs)]
    if near := difflib.get_close_matches(path.name, names, n=3):
        raise UserError(f"no run {given}; did you mean {', '.join(near)}?")
    hint = f"the newest are {', '.join(names[:3])}" if names else f"{runs}/ has none yet"
    raise UserError(f"no run {given}; {hint}")


def newest_finished_run(runs: Path = RUNS) -> Run:
    """The finished run below `runs` that was begun last. UserError if there is none."""
    for run in all_runs(runs):
        with contextlib.suppress(UserError):  # a damaged run is not a finished one
            if run.state["state"] == "finished":
                return run
    raise UserError(f"no finished run below {runs}/; train one: bnexp train configs/digits.yaml")
