"""The data sets by name, and how settings become splits on a device."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bnexp.data import files, sampling
from bnexp.data.folder import Listing, list_folder, size_of
from bnexp.data.memory import InMemorySplit
from bnexp.data.pixels import Normalization, pixel_mean_and_std
from bnexp.data.settings import Augmentation, DataSettings
from bnexp.data.split import Data, DataInfo, Split
from bnexp.data.stream import ImageFiles, StreamedSplit
from bnexp.errors import UserError

IN_MEMORY_BYTES = 1 << 30
"""An image folder whose decoded images take more than this is streamed."""
STATISTICS_IMAGES = 4096
"""So many training images of a streamed folder give its mean and standard deviation."""
NO_AUGMENTATION = Augmentation()


def load_digits(root: Path | None) -> files.Arrays:
    """The UCI handwritten digits inside the package; see digits.txt for source and licence.

    1 797 images of 8x8 pixels with 17 levels, 0 to 16, stored as 15 times the level: 0 to 240.
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
        return _load_folder(settings, seed, device)
    if settings.name not in _ARRAYS:
        near = difflib.get_close_matches(settings.name.lower(), DATA_SETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(DATA_SETS)}"
        raise UserError(f"data.name: no data set is called {settings.name!r}; {hint}")

    return data_of(_ARRAYS[settings.name](settings.root), settings, seed, device)


def data_of(arrays: files.Arrays, settings: DataSettings, seed: int, device: torch.device) -> Data:
    """What `load_data` makes of the images and labels once they are read."""
    train, val, test = _choose(arrays.train_labels, arrays.test_labels, settings, seed)
    train_images = torch.from_numpy(arrays.train_images[train])
    info = _info(settings, train_images, arrays.classes)
    height, width = train_images.shape[1:3]
    normalize = Normalization(info.mean, info.std, (height, width), info.image_size, device)

    def split(images: Tensor, labels: np.ndarray, augmentation: Augmentation) -> InMemorySplit:
        return InMemorySplit(
            images, torch.from_numpy(labels), normalize, augmentation, seed, device
        )

    def held_out(images: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> InMemorySplit:
        return split(torch.from_numpy(images[chosen]), labels[chosen], NO_AUGMENTATION)

    return Data(
        info,
        split(train_images, arrays.train_labels[train], settings.augmentation),
        held_out(arrays.train_images, arrays.train_labels, val) if len(val) else None,
        held_out(arrays.test_images, arrays.test_labels, test),
    )


def _choose(
    train_labels: np.ndarray, test_labels: np.ndarray, settings: DataSettings, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted indices of the training, validation and test images; limits come before the split."""
    train = _limited(train_labels, settings.limit_train, sampling.generator(seed, "limit train"))
    test = _limited(test_labels, settings.limit_test, sampling.generator(0, "limit test"))
    val = np.empty(0, dtype=np.int64)
    if settings.val_fraction:
        stays, apart = sampling.split_off(
            train_labels[train], settings.val_fraction, sampling.generator(seed, "val")
        )
        if not len(stays) or not len(apart):
            raise UserError(
                f"data.val_fraction {settings.val_fraction:g} of {len(train)} images leaves none "
                f"for {'validation' if len(stays) else 'training'}"
            )
        train, val = train[stays], train[apart]
    return train, val, test


def _limited(labels: np.ndarray, limit: int | None, rng: np.random.Generator) -> np.ndarray:
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    return sampling.stratified_subset(labels, limit, rng)


def _info(settings: DataSettings, pixels: Tensor, classes: tuple[str, ...]) -> DataInfo:
    """`pixels`: uint8 (N, H, W, C), training images that mean and standard deviation come from."""
    height, width, channels = pixels.shape[1:]
    size = (settings.image_size,) * 2 if settings.image_size else (height, width)
    mean, std = pixel_mean_and_std(pixels)
    return DataInfo(settings.name, channels, size, classes, mean, std)


# ------------------------------------------------------------------------------- image folders


def _load_folder(settings: DataSettings, seed: int, device: torch.device) -> Data:
    folder = list_folder(settings.root)
    if folder.val is not None and settings.val_fraction:
        raise UserError(
            f"{settings.root} has a folder val/ of its own; take data.val_fraction from the config"
        )
    chosen = _choose(folder.train.labels, folder.test.labels, settings, seed)
    train, val, test = (
        listing.take(indices)
        for listing, indices in zip((folder.train, folder.train, folder.test), chosen, strict=True)
    )
    val = folder.val or val
    size = (settings.image_size,) * 2 if settings.image_size else size_of(train.paths[0])
    images = len(train) + len(val) + len(test)
    in_memory = images * size[0] * size[1] * 3 <= IN_MEMORY_BYTES

    def image_files(listing: Listing) -> ImageFiles:
        return ImageFiles(listing.paths, size, resize=settings.image_size is not None)

    def pixels(listing: Listing, count: int) -> Tensor:
        """uint8 (N, H, W, 3) of the first `count`; listings mix the classes."""
        indices = torch.arange(min(count, len(listing)))
        return torch.cat(list(image_files(listing).load(indices.split(64), settings.workers)))

    def split(listing: Listing, augmentation: Augmentation) -> Split:
        labels = torch.from_numpy(listing.labels)
        if in_memory:
            held = train_pixels if listing is train else pixels(listing, len(listing))
            return InMemorySplit(held, labels, normalize, augmentation, seed, device)
        return StreamedSplit(
            image_files(listing), labels, normalize, augmentation, seed, device, settings.workers
        )

    train_pixels = pixels(train, len(train) if in_memory else STATISTICS_IMAGES)
    info = _info(settings, train_pixels, folder.classes)
    normalize = Normalization(info.mean, info.std, size, info.image_size, device)
    return Data(
        info,
        split(train, settings.augmentation),
        split(val, NO_AUGMENTATION) if len(val) else None,
        split(test, NO_AUGMENTATION),
    )
