"""The configs that come with the package: `bnexp train digits` works in any folder."""

from __future__ import annotations

import difflib
from pathlib import Path

import bnexp
from bnexp.errors import UserError

FOLDER = Path(bnexp.__file__).parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name -> file, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def shipped_studies() -> dict[str, Path]:
    """Name -> file, by name."""
    return {path.stem: path for path in sorted((FOLDER / "studies").glob("*.yaml"))}


def find_config(given: str) -> Path:
    """The file that a user named: by its path, else by the name of a shipped config.

    Raises UserError, with the nearest names, where a bare name is neither.
    """
    return _found(given, shipped_configs(), "config")


def find_study_file(given: str) -> Path:
    """The same of a study."""
    return _found(given, shipped_studies(), "study")


def _found(given: str, shipped: dict[str, Path], kind: str) -> Path:
    path = Path(given)
    if path.exists() and not (path.is_dir() and given in shipped):
        return path
    if path.suffix or len(path.parts) != 1:
        if path.stem in shipped:
            raise UserError(
                f"no {kind} at {given}; the one that comes with bnexp is called {path.stem}"
            )
        return path
    if given in shipped:
        own = Path(f"{given}.yaml")
        # A config and a study may have one name: `bnexp init smoke` is no other study.
        both = [files[given] for files in (shipped_configs(), shipped_studies()) if given in files]
        if own.is_file() and own.read_bytes() not in [path.read_bytes() for path in both]:
            raise UserError(
                f"{own} here is not the {kind} {given} that comes with bnexp: name the file, as in "
                f"{own}, or go to another folder"
            )
        return shipped[given]
    near = difflib.get_close_matches(given, shipped, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(shipped)}"
    raise UserError(f"no {kind} file {given} here, and none of that name comes with bnexp; {hint}")
