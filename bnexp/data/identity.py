"""What a run remembers of its data, so that other data are not taken for them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnexp.data.ahead import ahead
from bnexp.data.folder import Listing
from bnexp.errors import UserError
from bnexp.printable import printable

COMPARED_BYTES = 2 << 30
"""The contents of image files are compared where they have no more than so many bytes in all;
otherwise their names and sizes are."""

Fingerprint = dict[str, Any]
"""As JSON has it: `name` of the data set; `classes`; `split`, how the test images were chosen;
`compared`, "contents" or "names and sizes"; `splits`: for train, val (where there is one) and test,
the number of images and a hash of them for each class, in the order of `classes`, and a hash of
all labels in their order."""


def of_arrays(images: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """A split's part of a fingerprint; `images`: (N, H, W, C), `labels`: int64 (N,)."""
    per_class = (images[labels == label] for label in range(classes))
    return _of_split(labels, classes, [[np.ascontiguousarray(part)] for part in per_class])


def of_files(listing: Listing, files: FileHashes, classes: int) -> dict[str, Any]:
    """The same of image files, named within their class, so that folders can move and classes be
    renamed."""
    per_class: list[list[bytes]] = [[] for _ in range(classes)]
    for path, name, label in zip(listing.paths, listing.names, listing.labels, strict=True):
        encoded = os.fsencode(name.replace(os.sep, "/"))
        per_class[label].append(b"\0".join((encoded, files.of[path], b"")))
    return _of_split(listing.labels, classes, [sorted(of_class) for of_class in per_class])


def _of_split(labels: np.ndarray, classes: int, per_class: list[list[Any]]) -> dict[str, Any]:
    return {
        "images": np.bincount(labels, minlength=classes).tolist(),
        "hashes": [_hash(parts) for parts in per_class],
        "order": _hash([np.ascontiguousarray(labels)]),
    }


def _hash(parts: Iterable[Any]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


@dataclass(frozen=True)
class FileHashes:
    """What tells image files from others: a hash of their contents, or their size."""

    of: Mapping[Path, bytes]
    compared: str
    """"contents" or "names and sizes"."""

    def in_both(self, one: Listing, other: Listing) -> list[tuple[Path, Path]]:
        """Files of `other` with the contents of a file of `one`, each with that one; none where
        the contents are not known."""
        if self.compared != "contents":
            return []
        first = {self.of[path]: path for path in reversed(one.paths)}
        return [(first[self.of[path]], path) for path in other.paths if self.of[path] in first]


def hash_files(listings: Iterable[Listing], workers: int) -> FileHashes:
    """Raises UserError for a file that can't be read."""
    paths = [path for listing in listings for path in listing.paths]
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    sizes = _of_each(_size, chunks, workers)
    if sum(map(int, sizes.values())) > COMPARED_BYTES:
        return FileHashes(sizes, "names and sizes")
    return FileHashes(_of_each(_contents, chunks, workers), "contents")


def _of_each(
    make: Callable[[Path], bytes], chunks: list[list[Path]], workers: int
) -> dict[Path, bytes]:
    made = ahead(chunks, lambda chunk: list(map(make, chunk)), workers)
    try:
        return {path: of for chunk, ofs in made for path, of in zip(chunk, ofs, strict=True)}
    except OSError as error:
        raise UserError(f"{printable(error.filename)} can't be read: {error.strerror}") from None


def _size(path: Path) -> bytes:
    return str(path.stat().st_size).encode()


def _contents(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


# ----------------------------------------------------------------------------------- comparing


def split_by_number(recorded: Fingerprint | None) -> bool:
    """Whether a run's test images were chosen as before runs kept a record of their data: without
    `recorded`, or where it says so."""
    return recorded is None or recorded.get("split") == "by number"


def describe_change(before: Fingerprint, now: Fingerprint) -> str | None:
    """What became of the data between two fingerprints, in one line; None if they are the same.

    `before` may come from a damaged file: what can't be compared has changed.
    """
    if before == now:
        return None
    try:
        changes = _changes(before, now)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return "the record of the data is damaged, so they can't be compared"
    if not changes:
        return "the same classes and images are split in another way"
    more = f"; {len(changes) - 5:,} more changes" if len(changes) > 5 else ""
    return "; ".join(changes[:5]) + more


def describe_renumbering(before: Fingerprint, now: Fingerprint) -> str | None:
    """A class that is still there and has another number, so that a model from before would be
    held to other classes' outputs; None where there is none, or where it can't be told."""
    try:
        was, became = _by_class(before), _by_class(now)
        for number, name in enumerate(before["classes"]):
            alike = (n for n in became if n not in was and became[n] == was[name] != {})
            there = name if name in became else next(alike, None)
            if there is not None and now["classes"].index(there) != number:
                return f"class {there} is number {now['classes'].index(there)} now, not {number}"
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        pass
    return None


_WORDS = {"train": "training", "val": "validation", "test": "test"}


def _changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    if before["name"] != now["name"]:
        return [f"the data set was {printable(before['name'])} and is {printable(now['name'])}"]
    was, became = _by_class(before), _by_class(now)
    gone = [name for name in was if name not in became]
    new = [name for name in became if name not in was]
    changes = []
    for name in gone:
        if renamed := next((n for n in new if became[n] == was[name]), None):
            new.remove(renamed)
            changes.append(f"class {printable(name)} is called {renamed} now")
        else:
            changes.append(f"class {printable(name)} is gone")
    changes += [f"class {name} is new" for name in new]
    for name in (n for n in was if n in became):
        for part in dict.fromkeys((*was[name], *became[name])):
            (count, of_files), (count_now, of_files_now) = (
                split[name].get(part, (0, "")) for split in (was, became)
            )
            if count != count_now:
                changes.append(
                    f"class {printable(name)} has {count_now:,} {_WORDS[part]} images, not "
                    f"{count:,}"
                )
            elif of_files != of_files_now:
                changes.append(
                    f"the {count:,} {_WORDS[part]} images of class {printable(name)} are others, "
                    "or have other contents"
                )
    if not changes and before["classes"] != now["classes"]:
        changes.append("the classes come in another order")
    return changes


def _by_class(data: Fingerprint) -> dict[str, dict[str, tuple[int, str]]]:
    """class -> split -> (number, hash), without the splits that have none of the class."""
    return {
        name: {
            part: (int(of_part["images"][label]), str(of_part["hashes"][label]))
            for part, of_part in data["splits"].items()
            if of_part["images"][label]
        }
        for label, name in enumerate(data["classes"])
    }
