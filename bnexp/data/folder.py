"""Image folders: one folder per class, with or without a test folder of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bnexp.data.sampling import generator, split_off
from bnexp.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Listing:
    """Image files and their int64 labels (N,), in an order that mixes the classes."""

    paths: list[Path]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> Listing:
        return Listing([self.paths[i] for i in indices], self.labels[indices])


@dataclass(frozen=True)
class Folder:
    train: Listing
    val: Listing | None
    test: Listing
    classes: tuple[str, ...]


def list_folder(root: Path | None) -> Folder:
    """The images under `root`.

    Either `root/train/<class>/` with `root/test/<class>/` or `root/val/<class>/` (with both, val
    is for validation), or `root/<class>/`, of which a fixed, stratified fifth becomes the test
    set. The same files always give the same order and the same test set, whatever the run's seed.
    UserError for a folder that is not laid out like that.
    """
    if root is None:
        raise UserError("data.name image-folder needs data.root, the folder with the images")
    root = root.expanduser()
    if not root.is_dir():
        raise UserError(f"data.root: there is no folder {root}")
    if not (root / "train").is_dir():
        classes = _class_names(root)
        everything = _list_images(root, classes)
        stays, apart = split_off(everything.labels, TEST_FRACTION, generator(0, "folder test"))
        if not len(apart):
            raise UserError(
                f"{root} has {len(everything)} images, too few to set a fifth apart for testing; "
                "add some, or make folders train/ and test/"
            )
        return Folder(everything.take(stays), None, everything.take(apart), classes)
    classes = _class_names(root / "train")
    parts = {
        part: _list_images(root / part, classes)
        for part in ("train", "val", "test")
        if (root / part).is_dir()
    }
    if len(parts) == 1:
        raise UserError(f"{root} has train/ but neither test/ nor val/; add one of them")
    val = parts.get("val")
    if "test" in parts:
        return Folder(parts["train"], val, parts["test"], classes)
    return Folder(parts["train"], None, parts["val"], classes)


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, without decoding it."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is no readable image ({error}); replace or remove it") from None


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"{folder} needs a folder of images per class; it has {len(names)} folders")
    return tuple(names)


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")  # such as ._1.png beside 1.png on disks that macOS wrote
    return path.suffix.lower() in SUFFIXES and not hidden and not path.is_dir()


def _list_images(folder: Path, classes: tuple[str, ...]) -> Listing:
    unknown = sorted(set(_class_names(folder)) - set(classes))
    if unknown:
        raise UserError(f"{folder / unknown[0]} is a class that the training images don't have")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if _is_image(p))
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise UserError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}) in its folders")
    mixed = generator(0, "folder order").permutation(len(paths))
    return Listing(paths, np.array(labels, dtype=np.int64)).take(mixed)
