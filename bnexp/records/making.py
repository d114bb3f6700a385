"""Making a record's folder: whole or not at all, under a number of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bnexp.errors import UserError

# What a killed process left of a folder it was making is removed when it is as old as this:
# making one takes milliseconds.
ABANDONED_SECONDS = 3600
_STAGING = ".making-"


def to_json(value: Mapping[str, Any]) -> str:
    """As all JSON files of records are written. ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


@contextlib.contextmanager
def staged(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, under a temporary name, to be filled and handed to `place`.

    It is removed if the block raises. `parent` is made; UserError if it can't be.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError):
        raise UserError(f"{parent}/ can't be made here: run bnexp in another folder") from None
    _remove_abandoned(parent)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
    try:
        staging.chmod(0o755)
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def place(staging: Path, targets: Iterable[Path]) -> Path | None:
    """Rename `staging` to the first of `targets` that isn't there; None if all are. A rename onto
    a folder that another process made in the meantime fails, and the next one is tried."""
    for target in targets:
        if target.exists():
            continue
        try:
            staging.rename(target)
        except OSError:
            if not target.exists():
                raise
        else:
            return target
    return None


def free_folders(name: str, runs: Path) -> Iterator[Path]:
    """`<runs>/<name>-<number>` from the first number after those there are."""
    pattern = re.compile(re.escape(name) + r"-([0-9]{1,18})")
    there = runs.iterdir() if runs.is_dir() else ()
    taken = [int(match[1]) for path in there if (match := pattern.fullmatch(path.name))]
    return (runs / f"{name}-{n}" for n in itertools.count(1 + max(taken, default=0)))


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError):
            if path.is_dir() and path.lstat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path)
