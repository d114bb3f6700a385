"""Checkpoints: whole or absent, checked when read, and never able to run code.

A checkpoint is what `torch.save` writes: a zip archive whose entries carry CRC-32 checksums.
torch does not verify them when it reads; `load_checkpoint` does.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path

import torch

from bnexp.atomic import replacing, write_atomically
from bnexp.errors import UserError

FORMAT = 2
_UNREADABLE = (RuntimeError, EOFError, ValueError, KeyError, NotImplementedError, OSError)


def save_checkpoint(folder: Path, state: dict, keep: int, best: bool) -> Path:
    """Write `state` (tensors, numbers, strings, lists, dicts; its key `step` names the file).

    The file is written under a temporary name, synced and renamed, so that a crash at any moment
    leaves either the former checkpoints or those and this one. Only then the oldest beyond `keep`
    are removed. With `best`, it is also what best.pt names from now on.
    """
    path = folder / f"step-{state['step']:09d}.pt"
    serialized = io.BytesIO()  # torch.save into a file hides the OSError of a full disk
    torch.save({"format": FORMAT, **state}, serialized)
    write_atomically(path, serialized.getbuffer())
    if best:
        with replacing(folder / "best.pt") as temporary:
            temporary.unlink()
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copyfile(path, temporary)
    for old in step_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def remove_torn(folder: Path) -> None:
    """Remove what a killed process had not finished writing."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def step_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of single steps, newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def load_checkpoint(path: Path) -> dict:
    """The state in the file at `path`, its tensors on the CPU.

    Raises PermissionError, and UserError if there is no such file, if it is damaged, if it is
    not bnexp's, or if it holds anything but plain data; nothing in it is ever executed.
    """
    try:
        _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except PermissionError:
        raise  # not to be taken for damage, and passed over
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain data and was not loaded: it could run code"
        ) from None
    except (zipfile.BadZipFile, zlib.error, *_UNREADABLE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is damaged: {reason}") from None
    if not isinstance(state, dict) or state.get("format") not in (1, FORMAT):
        raise UserError(f"{path} is not a checkpoint of this version of bnexp")
    return state if state["format"] == FORMAT else _upgraded(state)


def _upgraded(state: dict) -> dict:
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


def _verify(path: Path) -> None:
    """BadZipFile unless every entry is as torch writes it and has the checksum it claims."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr:
                raise zipfile.BadZipFile(f"the header of {entry.filename} is wrong")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def newest_checkpoint(folder: Path) -> tuple[dict | None, list[str]]:
    """The newest whole checkpoint, and one line for each damaged one that was passed over.

    None if the run died before its first checkpoint; UserError if there are only damaged ones.
    """
    paths = [path for path in [*step_checkpoints(folder), folder / "best.pt"] if path.exists()]
    damaged: list[UserError] = []
    for path in paths:
        try:
            return load_checkpoint(path), [f"{error}; using the one before" for error in damaged]
        except UserError as error:
            damaged.append(error)
    if damaged:
        raise UserError(f"no whole checkpoint to go on from: {damaged[0]}")
    return None, []
