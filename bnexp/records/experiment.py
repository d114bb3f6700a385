"""The run folder: made atomically, appended to while training, read by everything else.

runs/<name>-<number>/
    config.yaml        resolved and retrainable
    environment.json   versions, device, seed, threads, git commit, command, resumes
    data.json          what tells the data from others
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
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexp.atomic import write_atomically
from bnexp.condition import Condition
from bnexp.errors import UserError
from bnexp.records.csv_log import CsvLog
from bnexp.records.files import read_bytes, read_json, read_text, read_yaml
from bnexp.records.folder import Folder, newest_first
from bnexp.records.making import free_folders, place, staged, to_json

if TYPE_CHECKING:
    import numpy as np

RUNS = Path("runs")
STEP_COLUMNS = ("step", "epoch", "lr", "loss", "accuracy", "ema_accuracy")
EVAL_COLUMNS = ("step", "split", "statistics", "accuracy", "loss", "samples", "seconds")


@dataclass(frozen=True)
class Run(Folder):
    """The folder of one training."""

    busy = "is still being trained by another process"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.yaml, which has the sections and names that every config has."""
        path = self.path / "config.yaml"
        config = read_yaml(path)
        if config is None:
            raise UserError(f"there is no {path}")
        for section, key, kind in _CONFIG:
            found = config.get(section)
            if not isinstance(found, dict) or not isinstance(found.get(key), kind):
                raise UserError(f"{path} is damaged: {section}.{key} is missing or no {_a(kind)}")
        return config

    @property
    def environment(self) -> dict[str, Any]:
        path = self.path / "environment.json"
        environment = read_json(path) or {}
        created = environment.get("created", "")
        if not isinstance(created, str) or not _PLAIN.fullmatch(created):
            raise UserError(f"{path} is damaged: created is no time")
        if not isinstance(environment.get("resumes", []), list):
            raise UserError(f"{path} is damaged: resumes is no list")
        return environment

    @property
    def id(self) -> str | None:
        """What tells the run's checkpoints from those of others; None in older records."""
        with contextlib.suppress(UserError):
            found = self.environment.get("id")
            return found if isinstance(found, str) else None
        return None

    @property
    def state(self) -> dict[str, Any]:
        """`{"state", "step", "total_steps", "weights", "message", "diverged"}`; `diverged` says
        that a failure was the training's own, which would repeat itself. The state is `killed`
        when a run that says it is running no longer holds its lock, `unknown` without the file."""
        return self.now(self._written_state)

    def _written_state(self) -> dict[str, Any]:
        path = self.path / "state.json"
        state = {"step": 0, "total_steps": None, "weights": "last", "message": None}
        state["diverged"] = False
        found = read_json(path)
        if found is None:
            return {"state": "unknown", **state}
        state |= found
        if state.get("state") not in STATES:
            raise UserError(f"{path} is damaged: its state is none of {', '.join(STATES)}")
        if not _is_count(state["step"]) or not _is_count(state["total_steps"] or 0):
            raise UserError(f"{path} is damaged: its steps are no numbers of steps")
        if state["weights"] not in ("last", "best"):
            raise UserError(f"{path} is damaged: its weights are neither last nor best")
        state["diverged"] = state["state"] == "failed" and state.get("diverged") is True
        if not isinstance(state["message"], str | None):
            raise UserError(f"{path} is damaged: its message is no text")
        return state

    def comparison(self) -> dict[str, Any] | None:
        """The content of comparison.json; None before the final evaluation."""
        path = self.path / "comparison.json"
        comparison = read_json(path)
        if comparison is None:
            return None
        kinds = comparison.get("kinds")
        if (
            not {"baseline", "samples", "classes", "verdict", "layers"} <= comparison.keys()
            or not isinstance(kinds, list)
            or not kinds
            or not all(isinstance(kind, dict) and _is_share(kind.get("accuracy")) for kind in kinds)
        ):
            raise UserError(f"{path} is damaged: it is not a comparison")
        return comparison

    def steps(self) -> dict[str, np.ndarray]:
        """The columns of steps.csv as float64 arrays; a line being written is left out."""
        import numpy as np

        path = self.path / "steps.csv"
        content = read_bytes(path) or b""
        rows = content[content.find(b"\n") + 1 : content.rfind(b"\n") + 1]
        if not rows:
            return {name: np.empty(0) for name in STEP_COLUMNS}
        try:  # a list of its rows would take twenty times the memory
            table = np.loadtxt(io.BytesIO(rows), delimiter=",", comments=None, ndmin=2)
        except ValueError as error:
            reason = str(error).partition(";")[0]
            raise UserError(f"{path} is damaged: {reason[:200]}") from None
        if table.shape[1] != len(STEP_COLUMNS):
            raise UserError(f"{path} is damaged: {table.shape[1]} columns")
        columns = {name: table[:, i] for i, name in enumerate(STEP_COLUMNS)}
        known = table[:, [i for i, name in enumerate(STEP_COLUMNS) if name != "loss"]]
        if not np.isfinite(known).all():  # a loss may be nan
            raise UserError(f"{path} is damaged: a step without its numbers")
        step, accuracies = columns["step"], (columns["accuracy"], columns["ema_accuracy"])
        if (
            (np.diff(step, prepend=0.0) <= 0).any()
            or (known[:, :2] % 1 != 0).any()
            or known[:, :2].max() >= MAX_COUNT
            or known.min() < 0
            or max(a.max() for a in accuracies) > 1 + 1e-9
        ):
            raise UserError(f"{path} is damaged: a number that no training writes")
        return columns

    def evals(self) -> list[dict[str, Any]]:
        """The rows of evals.csv, numbers parsed; a line being written is left out."""
        path = self.path / "evals.csv"
        text = read_text(path) or ""
        whole = text[: text.rfind("\n") + 1]
        try:
            return [
                {k: _EVAL_TYPES[k](v) for k, v in zip(EVAL_COLUMNS, row, strict=True)}
                for row in list(csv.reader(io.StringIO(whole)))[1:]
            ]
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path} is damaged: {str(error)[:200]}") from None

    def test_accuracies(self) -> list[tuple[int, Condition, float]]:
        """Step, condition and accuracy of the evaluations on the test set."""
        return [
            (row["step"], Condition.parse(row["statistics"]), row["accuracy"])
            for row in self.evals()
            if row["split"] == "test"
        ]

    def write_state(
        self,
        state: str,
        step: int,
        total_steps: int,
        weights="last",
        message: str | None = None,
        diverged: bool = False,
    ) -> None:
        content = {
            "state": state,
            "step": step,
            "total_steps": total_steps,
            "weights": weights,
            "message": message,
        }
        self.write_json("state.json", {**content, "diverged": True} if diverged else content)


STATES = ("running", "finished", "interrupted", "failed")
MAX_COUNT = 2**53
_PLAIN = re.compile(r"[ -~]{0,64}")
_CONFIG: tuple[tuple[str, str, type | tuple[type, ...]], ...] = (
    ("data", "name", str),
    ("model", "name", str),
    ("statistics", "decay", (int, float)),
    ("statistics", "estimators", dict),
    ("statistics", "recompute", dict),
    ("training", "batch_size", int),
    ("training", "optimizer", dict),
    ("training", "ema_accuracy_decay", (int, float)),
    ("test", "batch_size", int),
)


def _a(kind: type | tuple[type, ...]) -> str:
    return "text" if kind is str else "section" if kind is dict else "number"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError(f"{text[:40]!r} is no number of steps or samples")
    return int(text)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError(f"{text[:40]!r} is no accuracy")
    return float(text)


def _word(text: str) -> str:
    if not text.isprintable() or len(text) > 200:
        raise ValueError(f"{text[:40]!r} is no name")
    return text


_EVAL_TYPES: dict[str, Callable[[str], Any]] = {
    "step": _count,
    "split": _word,
    "statistics": _word,
    "accuracy": _share,
    "loss": float,
    "samples": _count,
    "seconds": float,
}


def create_run(
    name: str,
    config_yaml: str,
    files: Mapping[str, dict[str, Any]],
    runs: Path = RUNS,
    folder: Path | None = None,
) -> Run:
    """Make a run with this config and these JSON files, whole or not at all: `folder`, or the
    next free `<runs>/<name>-<number>/`.

    UserError if `folder` exists.
    """
    with staged(runs if folder is None else folder.parent) as staging:
        (staging / "checkpoints").mkdir()
        write_atomically(staging / "config.yaml", config_yaml)
        for filename, content in files.items():
            write_atomically(staging / filename, to_json(content))
        CsvLog(staging / "steps.csv", STEP_COLUMNS).close()
        CsvLog(staging / "evals.csv", EVAL_COLUMNS).close()
        made = place(staging, free_folders(name, runs) if folder is None else [folder])
        if made is None:
            raise UserError(f"{folder} exists already: name a new folder, or resume the run in it")
        return Run(made)


def is_run(path: Path) -> bool:
    try:
        has_more = (path / "steps.csv").is_file() or (path / "checkpoints").is_dir()
        return has_more and (path / "config.yaml").is_file()
    except OSError:  # a name too long for a path
        return False


def all_runs(runs: Path = RUNS) -> list[Run]:
    """Every run below `runs`, newest first."""
    return newest_first(runs, is_run, Run, lambda run: str(run.environment.get("created", "")))


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
    raise UserError(f"no finished run below {runs}/; train one: bnexp train digits")


def described_data(config: Mapping[str, Any]) -> str:
    """The data set of a config's section `data`, with what was done to its images. LookupError or
    TypeError where the section is damaged."""
    worse = config.get("corruption")
    name = ("binary " if config.get("binary") else "") + str(config["name"])
    return f"{name} with {worse['name']} {worse['severity']} in testing" if worse else name
