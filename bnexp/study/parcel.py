"""A record on its way between machines that share no disk: its files as one string of bytes.

What is packed while a training goes on can be gone on with: the checkpoint is read before the logs,
which then reach at least as far. Unpacking keeps that order, so that whoever is killed between two
files leaves a record that can be gone on with, too.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path

from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.records.making import place, staged

_LAST = ("comparison.json", "state.json")
_NEVER = (".lock",)


def pack(folder: Path) -> bytes:
    """All files of the record in `folder`, but for its lock and what is being written."""
    checkpoints: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or name.name in _NEVER:
            continue
        if name.name.startswith(".") and name.suffix == ".tmp":
            continue
        (checkpoints if name.parts[0] == "checkpoints" else others).append(name)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in [*checkpoints, *others]:
            with contextlib.suppress(FileNotFoundError):  # replaced by a newer one meanwhile
                data = (folder / name).read_bytes()
                entry = tarfile.TarInfo(name.as_posix())
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Make the record in `folder` that of the parcel, whether or not it is there."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {entry.name: _data(archive, entry) for entry in archive.getmembers()}
    if not folder.exists():
        with staged(folder.parent) as staging:
            (staging / "checkpoints").mkdir()
            _write(files, staging)
            if place(staging, [folder]) is not None:
                return
    _write(files, folder)
    if any(name.startswith("checkpoints/step-") for name in files):
        for old in (folder / "checkpoints").glob("*.pt"):
            if f"checkpoints/{old.name}" not in files:
                old.unlink(missing_ok=True)


def _data(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    parts = Path(entry.name).parts
    opened = archive.extractfile(entry) if entry.isfile() else None
    if opened is None or Path(entry.name).is_absolute() or ".." in parts:
        raise UserError(f"a parcel has {entry.name[:100]!r} in it, which no record has")
    return opened.read()


def _write(files: dict[str, bytes], folder: Path) -> None:
    """Logs first, which may reach beyond a checkpoint but not fall behind it."""

    def order(name: str) -> tuple[bool, bool, str]:
        return name in _LAST, name.startswith("checkpoints/"), name

    for name in sorted(files, key=order):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, files[name], follow_links=False)
