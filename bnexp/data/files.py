"""Finding, checking, reading and downloading the files of the published data sets."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import math
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnexp.errors import UserError
from bnexp.printable import printable

DEBIAN_FOLDER = Path("/usr/share/datasets")
CONNECT_SECONDS = 20.0


@dataclass(frozen=True)
class Arrays:
    """A data set as read: uint8 images (N, H, W, C) and int64 labels (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]


def search_folders(root: Path | None) -> list[Path]:
    """Where files are looked for: `root`, $BNEXP_DATA, ./data, and Debian's folder of data sets.

    The first of them is where downloads go.
    """
    named = [root, os.environ.get("BNEXP_DATA") or None, "data", DEBIAN_FOLDER]
    return list(dict.fromkeys(usable(Path(folder).expanduser()) for folder in named if folder))


def usable(folder: Path) -> Path:
    """`folder`, which need not exist. UserError where no folder can have such a name."""
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # too long, too many links, a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        name = printable(folder)
        name = name if len(name) < 120 else f"{name[:60]}..."
        raise UserError(f"data.root: {name} can't be a folder: {reason}") from None
    return folder


# ------------------------------------------------------------------------------------ IDX files


@dataclass(frozen=True)
class IdxDataSet:
    """A data set in the four IDX files of MNIST."""

    name: str
    torchvision_name: str
    classes: tuple[str, ...]
    md5: dict[str, str]
    """Of the published contents, uncompressed, by part; empty where they are not known."""
    advice: str = ""


IDX_PARTS = {
    "train-images": ("train-images", "idx3"),
    "train-labels": ("train-labels", "idx1"),
    "test-images": ("t10k-images", "idx3"),
    "test-labels": ("t10k-labels", "idx1"),
}
PUBLISHED_IMAGES = {"train": 60_000, "test": 10_000}

MNIST = IdxDataSet(
    "mnist",
    "MNIST",
    tuple("0123456789"),
    {
        "train-images": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels": "a25bea736e30d166cdddb491f175f624",
        "test-images": "2646ac647ad5339dbf082846283269ea",
        "test-labels": "27ae3e4e09519cfbb04c329615203637",
    },
)
FASHION_MNIST = IdxDataSet(
    "fashion-mnist",
    "FashionMNIST",
    (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    {
        "train-images": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels": "9018921c3c673c538a1fc5bad174d6f9",
        "test-images": "8181f5470baa50b63fa0f6fddb340f0a",
        "test-labels": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    advice="install Debian's package dataset-fashion-mnist, or ",
)
KMNIST = IdxDataSet(
    "kmnist", "KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"), {}
)
IDX = {data_set.name: data_set for data_set in (MNIST, FASHION_MNIST, KMNIST)}
_OWNERS = {
    md5: (data_set.name, part)
    for data_set in (MNIST, FASHION_MNIST)
    for part, md5 in data_set.md5.items()
}


class OtherDataSet(UserError):
    """Good files, of another data set than was asked for: MNIST's names are everybody's."""


def load_idx(data_set: IdxDataSet, root: Path | None) -> Arrays:
    """Read `data_set` from the first place that has its four files, else download them.

    UserError when there are none and none can be downloaded, or when a file is damaged.
    """
    folders = search_folders(root)
    remarks = []
    for folder in folders:
        for place in _idx_places(data_set, folder):
            found = _idx_files(place)
            missing = [part for part in IDX_PARTS if part not in found]
            if not missing:
                try:
                    return _read_idx_files(data_set, found)
                except OtherDataSet as error:
                    remarks.append(str(error))
            elif found:
                remarks.append(f"{place} lacks {_idx_name(missing[0])}")
    target = folders[0] / data_set.torchvision_name / "raw"
    advice = f"{data_set.advice}put the four .gz files into {target}"
    with _downloading(data_set.name, target, folders, remarks, advice):
        import torchvision

        getattr(torchvision.datasets, data_set.torchvision_name)(folders[0], download=True)
    return _read_idx_files(data_set, _idx_files(target))


def idx_files_here(data_set: IdxDataSet, folders: list[Path]) -> dict[str, Path] | None:
    """The four files that `load_idx` reads in `folders`, by their names; None where it would
    download them."""
    for place in [place for folder in folders for place in _idx_places(data_set, folder)]:
        found = _idx_files(place)
        if found.keys() == IDX_PARTS.keys():
            try:
                for part in ("train-labels", "test-labels"):  # small, and they tell the sets apart
                    _check_published(data_set, part, found[part], read_bytes(found[part]))
            except OtherDataSet:
                continue
            return {path.name: path for path in found.values()}
    return None


def _idx_places(data_set: IdxDataSet, folder: Path) -> Iterator[Path]:
    for named in (data_set.torchvision_name, data_set.name, data_set.name.replace("-", "_")):
        yield folder / named / "raw"
        yield folder / named
    if folder != DEBIAN_FOLDER:
        yield folder / "raw"
        yield folder


def _idx_name(part: str) -> str:
    stem, kind = IDX_PARTS[part]
    return f"{stem}-{kind}-ubyte.gz"


def _idx_files(folder: Path) -> dict[str, Path]:
    """The file of each part that `folder` has."""
    found = {}
    for part, (stem, kind) in IDX_PARTS.items():
        names = (f"{stem}{joint}{kind}-ubyte{end}" for joint in "-." for end in ("", ".gz"))
        path = next((p for p in map(folder.joinpath, names) if p.is_file()), None)
        if path:
            found[part] = path
    return found


def _read_idx_files(data_set: IdxDataSet, found: dict[str, Path]) -> Arrays:
    arrays = {}
    for part in sorted(found, key=lambda part: "images" in part):  # labels first: a quick check
        contents = read_bytes(found[part])
        _check_published(data_set, part, found[part], contents)
        arrays[part] = parse_idx(contents, found[part], dimensions=3 if "images" in part else 1)
    for split in "train", "test":
        images, labels = arrays[f"{split}-images"], arrays[f"{split}-labels"]
        if len(images) != len(labels):
            raise UserError(
                f"{found[f'{split}-images']} holds {len(images)} images and "
                f"{found[f'{split}-labels']} {len(labels)} labels; {REPLACE}"
            )
        if not len(labels) or labels.max() >= len(data_set.classes):
            raise UserError(
                f"{found[f'{split}-labels']} should hold labels 0 to "
                f"{len(data_set.classes) - 1}; {REPLACE}"
            )
    train_size, test_size = (arrays[f"{split}-images"].shape[1:] for split in ("train", "test"))
    if train_size != test_size or not min(train_size):
        raise UserError(
            f"{found['train-images']} and {found['test-images']} hold images of "
            f"{' and '.join('x'.join(map(str, size)) for size in (train_size, test_size))} pixels; "
            f"{REPLACE}"
        )
    return Arrays(
        arrays["train-images"][..., None],
        arrays["train-labels"].astype(np.int64),
        arrays["test-images"][..., None],
        arrays["test-labels"].astype(np.int64),
        data_set.classes,
    )


REPLACE = "delete it to have it downloaded again, or replace it"


def read_bytes(path: Path) -> bytes:
    """The contents of `path`, decompressed if it ends in .gz. UserError if it is damaged."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        kind = "truncated" if isinstance(error, EOFError) else "corrupt"
        raise UserError(f"{path} is {kind} ({error}); {REPLACE}") from None


def parse_idx(contents: bytes, path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file's contents; `path` is named in the UserError if it's damaged.

    Format: two zero bytes, type 0x08 (unsigned byte), the number of dimensions, each dimension as
    a big-endian 32-bit integer, then the values in C order.
    """
    header = 4 + 4 * dimensions
    if len(contents) < header or contents[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path} is no IDX file of {dimensions}-dimensional bytes; {REPLACE}")
    shape = np.frombuffer(contents, ">u4", dimensions, offset=4).tolist()
    size = header + math.prod(shape)
    if len(contents) != size:
        raise UserError(
            f"{path} is truncated or corrupt: {len(contents)} bytes where its header "
            f"promises {size}; {REPLACE}"
        )
    return np.frombuffer(contents, np.uint8, offset=header).reshape(shape)


def _check_published(data_set: IdxDataSet, part: str, path: Path, contents: bytes) -> None:
    """Compare a file of a published size with the published contents."""
    sizes = {part: _published_size(part) for part in IDX_PARTS}
    if len(contents) not in sizes.values():
        return
    md5 = hashlib.md5(contents, usedforsecurity=False).hexdigest()
    owner, owned = _OWNERS.get(md5, (data_set.name, part))
    if owner != data_set.name:
        raise OtherDataSet(f"{path} belongs to {owner}")
    if owned != part:
        raise UserError(
            f"{path} holds {owner}'s {owned.replace('-', ' ')} instead of its "
            f"{part.replace('-', ' ')}; {REPLACE}"
        )
    if len(contents) == sizes[part] and data_set.md5.get(part, md5) != md5:
        raise UserError(
            f"{path} is corrupt: it has the size of {data_set.name}'s file and other contents "
            f"(md5 {md5}, not {data_set.md5[part]}); {REPLACE}"
        )


def _published_size(part: str) -> int:
    images = PUBLISHED_IMAGES[part.split("-")[0]]
    return 16 + images * 28 * 28 if "images" in part else 8 + images


# ------------------------------------------------------------- the sets torchvision reads for us


def load_cifar(name: str, root: Path | None) -> Arrays:
    """cifar10 or cifar100, from the extracted folder or the archive, else downloaded."""
    kind, parts, archive = _cifar(name)
    train, test = _load_torchvision(
        name,
        root,
        lambda folder, download: [
            kind(folder, train=train, download=download) for train in (True, False)
        ],
        parts,
        archive,
    )
    return Arrays(
        train.data,
        np.array(train.targets, dtype=np.int64),
        test.data,
        np.array(test.targets, dtype=np.int64),
        tuple(train.classes),
    )


def _cifar(name: str) -> tuple[Any, dict[str, str], tuple[str, str]]:
    """torchvision's class, the md5 of the extracted files, and the archive with its md5."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    meta = [(kind.meta["filename"], kind.meta["md5"])]
    parts = {
        f"{kind.base_folder}/{file}": md5 for file, md5 in kind.train_list + kind.test_list + meta
    }
    return kind, parts, (kind.filename, kind.tgz_md5)


def load_svhn(root: Path | None) -> Arrays:
    """SVHN's cropped digits: train (73,257) and test (26,032), without the extra ones."""
    from torchvision import datasets

    train, test = _load_torchvision(
        "svhn",
        root,
        lambda folder, download: [
            datasets.SVHN(folder, split=split, download=download) for split in ("train", "test")
        ],
        _svhn_parts(),
        None,
    )
    return Arrays(
        train.data.transpose(0, 2, 3, 1),
        train.labels,
        test.data.transpose(0, 2, 3, 1),
        test.labels,
        tuple("0123456789"),
    )


def _svhn_parts() -> dict[str, str]:
    from torchvision import datasets

    lists = datasets.SVHN.split_list
    return {lists[split][1]: lists[split][2] for split in ("train", "test")}


def torchvision_files_here(name: str, folders: list[Path]) -> dict[str, Path] | None:
    """The files that cifar10, cifar100 or svhn are read from in `folders`, by their names below
    the folder that has them; None where they would be downloaded."""
    parts, archive = (_svhn_parts(), None) if name == "svhn" else _cifar(name)[1:]
    for place in torchvision_places(name, folders):
        found = {part: place / part for part in parts if (place / part).is_file()}
        if len(found) == len(parts):
            return found
        if archive is not None and (place / archive[0]).is_file():
            return {archive[0]: place / archive[0]}
    return None


def torchvision_places(name: str, folders: list[Path]) -> list[Path]:
    return [p for f in folders for p in (f, f / name, f / name.upper(), f.parent)]


def _load_torchvision(
    name: str,
    root: Path | None,
    build: Callable,
    parts: dict[str, str],
    archive: tuple[str, str] | None,
) -> list:
    """[training, test] data set as `build(folder, download)` makes them.

    `parts` and `archive` give the md5 of the files torchvision expects; a folder with all of the
    parts, or with the archive, is read, and a damaged file in it is a UserError that names it.
    """
    from torchvision.datasets.utils import check_integrity

    folders = search_folders(root)
    remarks = []
    for place in torchvision_places(name, folders):
        missing = [part for part in parts if not (place / part).is_file()]
        packed = archive is not None and (place / archive[0]).is_file()
        if missing and not packed:
            if len(missing) < len(parts):
                remarks.append(f"{place} lacks {missing[0]}")
            continue
        needed = {archive[0]: archive[1]} if missing and archive else parts
        for file, md5 in needed.items():
            if not check_integrity(place / file, md5):
                raise UserError(f"{place / file} is truncated or corrupt (md5 is wrong); {REPLACE}")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return build(place, bool(missing))
        except OSError as error:
            raise UserError(f"{place}: {name} can't be read or unpacked there: {error}") from None
    files = archive[0] if archive else " and ".join(parts)
    advice = f"put {files} into {folders[0]}"
    with _downloading(name, folders[0], folders, remarks, advice):
        return build(folders[0], True)


# --------------------------------------------------------------------------------- downloading


@contextlib.contextmanager
def _downloading(
    name: str, target: Path, folders: list[Path], remarks: list[str], advice: str
) -> Iterator[None]:
    """Announce a download by torchvision into `target`, with its progress on stderr.

    If it fails: one line, and no empty folders are left behind.
    """
    print(f"{name}: downloading into {target}", file=sys.stderr)
    new_folders = [folder for folder in (target, *target.parents) if not folder.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        for folder in new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        looked = ", ".join(str(folder) for folder in folders)
        looked += f" ({'; '.join(remarks)})" if remarks else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip("<>")
        raise UserError(
            f"{name} is not in {looked}, and can't be downloaded ({reason}); to mend it, {advice}, "
            "or point data.root or $BNEXP_DATA to its folder"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
