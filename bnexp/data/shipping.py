"""Data sets and weights as files that can be sent to a machine that lacks them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bnexp.data import files
from bnexp.errors import UserError

MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Shipment:
    """Files by their names below a folder that serves as data.root, and a hash of names and
    contents."""

    contents: dict[str, bytes]

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for name in sorted(self.contents):
            found.update(f"{name}\0{len(self.contents[name])}\0".encode())
            found.update(self.contents[name])
        return found.hexdigest()[:16]


def is_here(name: str, root: Path | None) -> bool:
    """Whether this machine has the files of a data set, so that nothing is downloaded."""
    return name == "digits" or _found(name, root) is not None


def shipment(name: str, root: Path | None) -> Shipment | None:
    """The files of a data set, to be sent; None where none need be, or none are here. UserError
    where they are too many."""
    if name == "digits" or (found := _found(name, root)) is None:
        return None
    size = sum(path.stat().st_size for path in found.values())
    if size > MAX_BYTES:
        raise UserError(
            f"data.name: the {size:,} bytes of {name} are too many to be sent to each node: put "
            "them there, where data.root says"
        )
    return Shipment({key: path.read_bytes() for key, path in found.items()})


def weights_shipment(path: Path) -> Shipment:
    """A file of weights, to be sent. UserError where it can't be read."""
    try:
        return Shipment({path.name: path.read_bytes()})
    except OSError as error:
        raise UserError(f"model.weights: {path} can't be read ({error.strerror})") from None


def _found(name: str, root: Path | None) -> dict[str, Path] | None:
    if name == "image-folder":
        return dict(_below(root)) if root is not None and root.is_dir() else None
    folders = files.search_folders(root)
    if name in files.IDX:
        return files.idx_files_here(files.IDX[name], folders)
    return files.torchvision_files_here(name, folders)


def _below(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(folder) / name
            yield str(path.relative_to(root)), path
