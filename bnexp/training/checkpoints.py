"""Checkpoints: whole or absent, checked when read, and never able to run code.

A checkpoint is what `torch.save` writes; its checksums are verified when it is read.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import torch

from bnexp.atomic import replacing, write_atomically
from bnexp.errors import UserError
from bnexp.tensor_files import load_tensors

FORMAT = 2
BEST = "best.pt"
BEST_ON_TEST = "best-on-test.pt"


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int, best: str | None) -> Path:
    """Write `state` (tensors, numbers, strings, lists, dicts; its key `step` names the file).

    The file is written under a temporary name, synced and renamed, so that a crash at any moment
    leaves either the former checkpoints or those and this one. Only then the oldest beyond `keep`
    are removed. `best` is the name of a second file that is this checkpoint from now on; whoever
    is killed before it is has the state say so, and `restore_best` makes up for it.
    """
    path = step_path(folder, state["step"])
    serialized = io.BytesIO()  # torch.save into a file hides the OSError of a full disk
    torch.save({"format": FORMAT, **state}, serialized)
    write_atomically(path, serialized.getbuffer(), follow_links=False)
    if best is not None:
        _link(path, folder / best)
    for old in step_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def restore_best(folder: Path, best: str, step: int, now: int) -> bool:
    """Make `best` the checkpoint of `step`, as the state of step `now` says; False if it is lost.

    A process that was killed after the step's own file was written and before `best` named it has
    left another one there, perhaps none. A `best` from beyond `now` is removed: it will be made
    again.
    """
    if _step_of(folder / best) == step:
        return True
    if _step_of(step_path(folder, step)) == step:
        _link(step_path(folder, step), folder / best)
        return True
    if (_step_of(folder / best) or 0) > now:
        (folder / best).unlink()
    return False


def _step_of(path: Path) -> int | None:
    with contextlib.suppress(UserError):
        return load_checkpoint(path)["step"]
    return None


def _link(path: Path, other: Path) -> None:
    with replacing(other, follow_links=False) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def remove_torn(folder: Path) -> None:
    """Remove what a killed process had not finished writing."""
    for path in folder.glob(".*.tmp"):
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink(missing_ok=True)


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.pt"


def step_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of single steps, newest first: ordinary files, no links."""
    steps: dict[int, Path] = {}
    for path in folder.glob("step-*.pt"):
        match = re.fullmatch(r"step-([0-9]{9,15})\.pt", path.name)
        with contextlib.suppress(FileNotFoundError):
            if match and stat.S_ISREG(path.lstat().st_mode):
                steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in the file at `path`, its tensors on the CPU.

    Raises PermissionError, and UserError if there is no such file, if it is damaged, if it is
    not bnexp's, or if it holds anything but plain data; nothing in it is ever executed.
    """
    try:
        state = load_tensors(path)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except PermissionError:
        raise  # not to be taken for damage, and passed over
    except (UserError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain data and was not loaded: it could run code"
        ) from None
    except Exception as error:  # torch.load raises whatever its input leads it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is damaged: {reason}") from None
    if not isinstance(state, dict) or state.get("format") not in (1, FORMAT):
        raise UserError(f"{path} is not a checkpoint of this version of bnexp")
    state = state if state["format"] == FORMAT else _upgraded(state)
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"checkpoint {path} is damaged: it has no step")
    if path.name.startswith("step-") and path.name != step_path(path.parent, step).name:
        raise UserError(f"{path} is the checkpoint of another step, {step}")
    return state


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of format 1, which had the guards' numbers side by side, as one of format 2."""
    state = dict(state)
    names = {
        "collapse": {"best": "best_ema_accuracy", "checks_at_chance": "checks_at_chance"},
        "best": {
            "metric": "best_metric",
            "step": "best_step",
            "evaluations_since": "evaluations_without_improvement",
        },
    }
    for guard, former in names.items():
        if set(former.values()) <= state.keys():
            state[guard] = {new: state.pop(old) for new, old in former.items()}
    return {**state, "format": FORMAT}


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint, and one line for each damaged one that was passed over.

    None if the run died before its first checkpoint; UserError if there are only damaged ones.
    """
    further = [folder / name for name in (BEST, BEST_ON_TEST)]
    damaged: list[UserError] = []
    for path in [*step_checkpoints(folder), *(p for p in further if p.is_file())]:
        try:
            return load_checkpoint(path), [f"{error}; using the one before" for error in damaged]
        except UserError as error:
            damaged.append(error)
    if damaged:
        raise UserError(f"no whole checkpoint to go on from: {damaged[0]}")
    return None, []
