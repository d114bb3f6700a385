"""Which data sets there are, and whether their files are here; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bnexp.data import files


@dataclass(frozen=True)
class DataSet:
    """A published data set: how many images, (height, width, channels), megabytes to download."""

    name: str
    training_images: int
    test_images: int
    shape: tuple[int, int, int]
    classes: int
    megabytes: int
    files: tuple[tuple[str, ...], ...]
    """Alternatives, each the names of all files that it takes; () for an IDX data set."""


def _batches(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


DIGITS = DataSet("digits", 1_297, 500, (8, 8, 1), 10, 0, ())
DATA_SETS = (
    DIGITS,
    DataSet("mnist", 60_000, 10_000, (28, 28, 1), 10, 12, ()),
    DataSet("fashion-mnist", 60_000, 10_000, (28, 28, 1), 10, 31, ()),
    DataSet("kmnist", 60_000, 10_000, (28, 28, 1), 10, 21, ()),
    DataSet(
        "cifar10", 50_000, 10_000, (32, 32, 3), 10, 170,
        (
            _batches(
                "cifar-10-batches-py",
                *(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta",
            ),
            ("cifar-10-python.tar.gz",),
        ),
    ),
    DataSet(
        "cifar100", 50_000, 10_000, (32, 32, 3), 100, 169,
        (_batches("cifar-100-python", "train", "test", "meta"), ("cifar-100-python.tar.gz",)),
    ),
    DataSet(
        "svhn", 73_257, 26_032, (32, 32, 3), 10, 246, (("train_32x32.mat", "test_32x32.mat"),)
    ),
)  # fmt: skip


def place_of(data_set: DataSet, root: Path | None) -> Path | None:
    """The first folder with all of its files, looked for where `load_data` looks; None where there
    is none. Whether the files are whole is not looked at, but for the labels of an IDX data set:
    UserError where these are damaged. `digits` is in the package."""
    if data_set is DIGITS:
        return Path(files.__file__).parent
    folders = files.search_folders(root)
    if data_set.name in files.IDX:
        found = files.idx_files_here(files.IDX[data_set.name], folders)
        return None if found is None else next(iter(found.values())).parent
    for place in files.torchvision_places(data_set.name, folders):
        if any(all((place / name).is_file() for name in names) for names in data_set.files):
            return place
    return None
