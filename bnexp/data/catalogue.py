"""The data sets by name, and how settings become splits on a device."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bnexp.data import files, identity, sampling
from bnexp.data.grouping import ClassBatches
from bnexp.data.image_folder import load_image_folder
from bnexp.data.memory import InMemorySplit
from bnexp.data.pixels import Normalization
from bnexp.data.settings import NO_AUGMENTATION, Augmentation, DataSettings
from bnexp.data.split import Data, data_info
from bnexp.errors import UserError


def load_digits(root: Path | None) -> files.Arrays:
    """The UCI handwritten digits inside the package; see digits.txt for source and licence.

    1,797 images of 8x8 pixels with 17 levels, 0 to 16, stored as 15 times the level: 0 to 240.
    50 images of each class, fixed, are the test set. `root` is ignored.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels, test = stored["images"], stored["labels"], stored["test"]
    images, labels = images[..., None] * np.uint8(15), labels.astype(np.int64)
    return files.Arrays(
        images[~test], labels[~test], images[test], labels[test], tuple("0123456789")
    )


_ARRAYS: dict[str, Callable[[Path | None], files.Arrays]] = {
    "digits": load_digits,
    "mnist": lambda root: files.load_idx(files.MNIST, root),
    "fashion-mnist": lambda root: files.load_idx(files.FASHION_MNIST, root),
    "kmnist": lambda root: files.load_idx(files.KMNIST, root),
    "cifar10": lambda root: files.load_cifar("cifar10", root),
    "cifar100": lambda root: files.load_cifar("cifar100", root),
    "svhn": lambda root: files.load_svhn(root),
}
DATA_SETS = (*_ARRAYS, "image-folder")


def load_data(settings: DataSettings, *, seed: int, device: torch.device | str) -> Data:
    """Training, validation and test split of the data set `settings` name.

    Images that fit lie on `device`. `seed` decides the validation split, the limited training
    images, the order of training and its augmentation; which test images there are does not
    depend on it, so that runs with different seeds are judged by the same images. Raises UserError
    for an unknown name, and for files that are missing or damaged.
    """
    device = torch.device(device)
    if settings.name == "image-folder":
        if settings.binary:
            raise UserError(
                "data.binary: the images of a folder are read as they are; make its files binary"
            )
        return load_image_folder(settings, seed, device)
    if settings.name not in _ARRAYS:
        near = difflib.get_close_matches(settings.name.lower(), DATA_SETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(DATA_SETS)}"
        raise UserError(f"data.name: no data set is called {settings.name!r}; {hint}")

    arrays = _ARRAYS[settings.name](settings.root)
    return data_of(_binary(arrays) if settings.binary else arrays, settings, seed, device)


def _binary(arrays: files.Arrays) -> files.Arrays:
    train, test = (
        (images >= 128) * np.uint8(255) for images in (arrays.train_images, arrays.test_images)
    )
    return replace(arrays, train_images=train, test_images=test)


def data_of(arrays: files.Arrays, settings: DataSettings, seed: int, device: torch.device) -> Data:
    """What `load_data` makes of the images and labels once they are read."""
    train, val, test = sampling.choose_images(
        arrays.train_labels, arrays.test_labels, settings, seed
    )
    train_images, train_labels = arrays.train_images[train], arrays.train_labels[train]
    info = data_info(settings, torch.from_numpy(train_images), arrays.classes)
    height, width = train_images.shape[1:3]
    normalize = Normalization(info.mean, info.std, (height, width), info.image_size, device)
    splits = {}
    classes = settings.classes_per_batch
    grouping = ClassBatches(train_labels, classes) if classes else None

    def split(
        part: str,
        images: np.ndarray,
        labels: np.ndarray,
        augmentation: Augmentation = NO_AUGMENTATION,
        grouping: ClassBatches | None = None,
    ) -> InMemorySplit:
        splits[part] = identity.of_arrays(images, labels, len(arrays.classes))
        pixels = torch.from_numpy(images)
        if part == "test" and settings.corruption:
            pixels = settings.corruption.apply(pixels, test.tolist())
        return InMemorySplit(
            pixels,
            torch.from_numpy(labels),
            normalize,
            augmentation,
            seed,
            device,
            grouping,
        )

    fingerprint: identity.Fingerprint = {
        "name": settings.name,
        "classes": list(arrays.classes),
        "split": "published",
        "compared": "contents",
        "splits": splits,
    }
    return Data(
        info,
        split("train", train_images, train_labels, settings.augmentation, grouping),
        split("val", arrays.train_images[val], arrays.train_labels[val]) if len(val) else None,
        split("test", arrays.test_images[test], arrays.test_labels[test]),
        fingerprint,
    )
