"""Image folders: one folder per class, with or without a test folder of their own."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bnexp.data.files import usable
from bnexp.data.images import SUFFIXES
from bnexp.data.sampling import generator, split_off
from bnexp.errors import UserError
from bnexp.printable import printable

TEST_FRACTION = 0.2
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What the folders of a split may be called, in any case."""
ByClass = dict[str, list[tuple[Path, str]]]
"""Images by the name of their class's folder: the path, and the one relative to that folder."""
FOREIGN = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}
"""Folders that systems and programs leave among others' files."""


@dataclass(frozen=True)
class Listing:
    """Image files and their int64 labels (N,), in an order that mixes the classes.

    `names`: the files' paths within their class's folder.
    """

    paths: list[Path]
    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> Listing:
        return Listing(
            [self.paths[i] for i in indices], [self.names[i] for i in indices], self.labels[indices]
        )


@dataclass(frozen=True)
class Folder:
    train: Listing
    val: Listing | None
    test: Listing
    classes: tuple[str, ...]
    """Printable, in the order of the labels."""
    split: str
    """How the test images were chosen: "own folder", "by name", or "by number"."""
    left_out: str
    """What else was there, such as "3 .txt files, 1 hidden"; empty where nothing was."""


@dataclass
class LeftOut:
    """What was met that is no image of a class."""

    files: Counter[str] = field(default_factory=Counter)
    """Number of files by their suffix."""
    hidden: int = 0
    links: int = 0
    """Links to nothing, to a folder that holds the link, or to one that was read already."""
    folders: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """As in "3 .txt files, 1 hidden, the folder empty/"; empty where nothing was left out."""
        common = dict(self.files.most_common(3))
        others = self.files.total() - sum(common.values())
        counted = [
            *((n, f"{printable(suffix) or 'suffixless'} file") for suffix, n in common.items()),
            (others, "other file"),
            (self.links, "link"),
        ]
        said = [f"{n:,} {what}{'s' if n > 1 else ''}" for n, what in counted if n]
        said += [f"{self.hidden:,} hidden"] if self.hidden else []
        names = [f"{printable(name)}/" for name in self.folders]
        if names:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            said.append(f"the folder{'s' if len(names) > 1 else ''} {', '.join(names[:5])}{more}")
        return ", ".join(said)


def list_folder(root: Path | None, split_by_number: bool = False) -> Folder:
    """The images under `root`; docs/data.md says what is read and what is left out.

    Either `root/train/<class>/` with `root/test/<class>/` or `root/val/<class>/` (with both, val
    is for validation), or `root/<class>/`, of which about a fifth becomes the test set: each file
    by its own name, so that files that come or go leave the others where they are. A class of two
    or more images has at least one on each side. `split_by_number` instead draws the fifth from
    the whole list, as runs did that kept no record of their data. The same files always give the
    same order and the same test set, whatever the run's seed. UserError for a folder that is not
    laid out like that.
    """
    if root is None:
        raise UserError("data.name image-folder needs data.root, the folder with the images")
    root = usable(root.expanduser())
    if not os.path.isdir(root):
        raise UserError(
            f"data.root: there is no folder {printable(root)}; if it has moved, say where to: "
            "data.root=..."
        )
    if Path(os.path.realpath(root)).parts[1:2] in (("proc",), ("sys",)):
        raise UserError(f"data.root: {printable(root)} holds the system's state, not images")
    left_out = LeftOut()
    folders, _ = _entries(root, left_out)
    parts: dict[str, Path] = {}
    for folder in folders:
        part = PARTS.get(folder.name.lower())
        if part is None:
            continue
        if part in parts:
            raise UserError(
                f"{printable(root)} has {printable(parts[part].name)}/ and "
                f"{printable(folder.name)}/; leave one of them"
            )
        parts[part] = folder
    if not parts:
        return _set_apart(root, split_by_number)

    there = " and ".join(f"{folder.name}/" for folder in parts.values())
    if "train" not in parts:
        raise UserError(
            f"{printable(root)} has {there} but no train/; add it, or give a class of that name "
            "another one"
        )
    if len(parts) == 1:
        raise UserError(f"{printable(root)} has {there} but neither test/ nor val/; add one")
    left_out.folders += [f.name for f in folders if f not in parts.values()]
    found = {part: images_by_class(folder, left_out) for part, folder in parts.items()}
    classes = _class_names(parts["train"], found["train"])
    listings = {}
    for part, by_class in found.items():
        if unknown := sorted(by_class.keys() - set(classes)):
            raise UserError(
                f"{printable(parts[part] / unknown[0])} is a class that the training images don't "
                "have"
            )
        if not by_class:
            raise UserError(f"{printable(parts[part])} has no images in folders of its classes")
        listings[part] = _mixed(by_class, classes)
    test, val = listings.get("test"), listings.get("val")
    if test is None:
        test, val = listings["val"], None
    return Folder(listings["train"], val, test, shown_classes(classes), "own folder", str(left_out))


def _set_apart(root: Path, by_number: bool) -> Folder:
    """A folder that has only classes."""
    left_out = LeftOut()
    by_class = images_by_class(root, left_out)
    classes = _class_names(root, by_class)
    everything = _mixed(by_class, classes)
    if by_number:
        stays, apart = split_off(everything.labels, TEST_FRACTION, generator(0, "folder test"))
    else:
        is_test = chosen_by_name(everything.names, everything.labels)
        stays, apart = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if not len(apart):
        raise UserError(
            f"{printable(root)} has {len(everything)} images, too few to set a fifth apart for "
            "testing; add some, or make folders train/ and test/"
        )
    split = "by number" if by_number else "by name"
    train, test = everything.take(stays), everything.take(apart)
    return Folder(train, None, test, shown_classes(classes), split, str(left_out))


def chosen_by_name(names: list[str], labels: np.ndarray) -> np.ndarray:
    """bool (N,), which images are for testing: those whose name's hash, as a number from 0 to 1,
    lies below `TEST_FRACTION`; where a class would have none on one side, the one nearest to it."""
    numbers = np.array([_number(name) for name in names])
    is_test = numbers < TEST_FRACTION
    for label in np.unique(labels):
        ours = np.flatnonzero(labels == label)
        by_number = ours[np.argsort(numbers[ours], kind="stable")]
        if len(ours) > 1:
            is_test[by_number[0]], is_test[by_number[-1]] = True, False
        else:
            is_test[ours] = False
    return is_test


def _number(name: str) -> float:
    """Uniform in 0 <= x < 1, of a file's name alone."""
    name = name.replace(os.sep, "/")
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8, person=b"bnexp test").digest()
    return int.from_bytes(digest, "big") / 2**64


def _class_names(folder: Path, by_class: ByClass) -> list[str]:
    if len(by_class) > 1:
        return sorted(by_class)
    inside = [folder / only for only in by_class if len(_entries(folder / only, LeftOut())[0]) > 1]
    hint = f"; is it {printable(inside[0])} that you mean?" if inside else ""
    raise UserError(
        f"{printable(folder)} needs a folder of images per class; it has {len(by_class)} with "
        f"images ({', '.join(sorted(SUFFIXES))}){hint}"
    )


def shown_classes(classes: Iterable[str]) -> tuple[str, ...]:
    """Their printable names. UserError where two have the same."""
    shown = tuple(map(printable, classes))
    if len(set(shown)) < len(shown):
        twice = next(name for name in shown if shown.count(name) > 1)
        raise UserError(f"two folders of classes are both shown as {twice}; rename one of them")
    return shown


def _mixed(by_class: ByClass, classes: list[str]) -> Listing:
    files = [file for name in classes for file in by_class.get(name, [])]
    counts = [len(by_class.get(name, [])) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    everything = Listing([path for path, _ in files], [name for _, name in files], labels)
    return everything.take(generator(0, "folder order").permutation(len(files)))


# ------------------------------------------------------------------------------- reading folders


def images_by_class(folder: Path, left_out: LeftOut) -> ByClass:
    """For each folder in `folder` that has images, at any depth, those; sorted."""
    by_class = {}
    folders, beside = _entries(folder, left_out)
    left_out.files.update(_suffix(file) for file in beside)
    for of_class in folders:
        if images := images_below(of_class, left_out):
            by_class[of_class.name] = images
        else:
            left_out.folders.append(of_class.name)
    return by_class


def images_below(folder: Path, left_out: LeftOut) -> list[tuple[Path, str]]:
    """The images at any depth below `folder`, with their paths relative to it, sorted by these.

    Links are followed, each folder is read once: under its own name where it has one here.
    """
    found: list[tuple[Path, str]] = []
    visited = set()
    pending: list[Path] = [folder]
    links: list[Path] = []
    while pending or links:
        here = pending.pop() if pending else links.pop()
        with _readable(here):
            status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:
            left_out.links += 1
            continue
        visited.add((status.st_dev, status.st_ino))
        folders, files = _entries(here, left_out)
        for inner in reversed(folders):
            (links if inner.is_symlink() else pending).append(inner)
        for file in files:
            if (suffix := _suffix(file)) not in SUFFIXES:
                left_out.files[suffix] += 1
            else:
                found.append((file, os.path.relpath(file, folder)))
    return sorted(found, key=lambda file: file[1].split(os.sep))


def _entries(folder: Path, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """The folders and the files in `folder`, sorted, without what is hidden or leads back."""
    folders, files = [], []
    with _readable(folder), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                left_out.hidden += 1
            elif entry.is_dir():
                if entry.name in FOREIGN:
                    left_out.folders.append(entry.name)
                elif entry.is_symlink() and _leads_back(path):
                    left_out.links += 1
                else:
                    folders.append(path)
            elif entry.is_file():
                files.append(path)
            else:  # a broken link, or a pipe, socket or device
                left_out.links += entry.is_symlink()
                left_out.files[_suffix(path)] += not entry.is_symlink()
    return folders, files


def _leads_back(link: Path) -> bool:
    """Whether `link` leads to a folder that holds it."""
    target, here = os.path.realpath(link), os.path.realpath(link.parent)
    return os.path.commonpath((target, here)) == target


def _suffix(file: Path) -> str:
    return file.suffix.lower()


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(folder)} can't be read: {error.strerror}") from None
