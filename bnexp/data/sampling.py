"""Which images, in which order: every choice a pure function of a seed and a purpose."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnexp.data.grouping import ClassBatches
from bnexp.data.settings import Augmentation, DataSettings
from bnexp.errors import UserError


def generator(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """A random stream of its own for each (seed, purpose, number)."""
    return np.random.default_rng((seed, zlib.crc32(purpose.encode()), number))


def stratified_subset(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted indices of `count` samples, each class in proportion to its size.

    `labels`: integers (N,), count <= N. Shares are rounded by largest remainder, so the total is
    exact and every class is within one sample of its exact share.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * (count / len(labels))
    takes = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(takes - shares, kind="stable")
    takes[by_remainder[: count - takes.sum()]] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:take]
        for label, take in zip(classes, takes, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def split_off(
    labels: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of what stays and of the stratified `fraction` that is split off."""
    apart = stratified_subset(labels, round(fraction * len(labels)), rng)
    stays = np.setdiff1d(np.arange(len(labels)), apart, assume_unique=True)
    return stays, apart


def choose_images(
    train_labels: np.ndarray, test_labels: np.ndarray, settings: DataSettings, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted indices of the training, validation and test images; limits come before the split."""
    train = _limited(train_labels, settings.limit_train, generator(seed, "limit train"))
    test = _limited(test_labels, settings.limit_test, generator(0, "limit test"))
    val = np.empty(0, dtype=np.int64)
    if settings.val_fraction:
        stays, apart = split_off(train_labels[train], settings.val_fraction, generator(seed, "val"))
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
    return stratified_subset(labels, limit, rng)


@dataclass(frozen=True)
class Share:
    """The part of every mini-batch that one of several processes takes: consecutive samples.

    The parts differ by at most one unit of `unit` samples that stay together; the last unit of a
    mini-batch may be short.
    """

    rank: int = 0
    size: int = 1
    unit: int = 1

    def of(self, count: int) -> slice:
        """Which of the `count` samples of a mini-batch; none of them, maybe."""
        units = -(-count // self.unit)
        first, end = (units * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(min(first * self.unit, count), min(end * self.unit, count))


EVERYTHING = Share()


def steps_per_epoch(images: int, batch_size: int, grouping: ClassBatches | None = None) -> int:
    """Full batches in one pass over so many images; UserError when not even one fits."""
    if grouping:
        return grouping.steps(batch_size)
    if batch_size > images:
        raise UserError(
            f"a training batch of {batch_size} needs more than the {images} training images "
            f"there are; set training.batch_size to {images} or less"
        )
    return images // batch_size


def draw_augmentation(
    count: int, augmentation: Augmentation, rng: np.random.Generator
) -> Tensor | None:
    """Random augmentation of `count` images for `augmentation.shift_and_flip`.

    int64 (count, 3): row and column at which the crop starts in the padded image, 0 to
    2 * crop_padding, and 1 where the image is mirrored. None when nothing is to be done.
    """
    if not augmentation.crop_padding and not augmentation.flip:
        return None
    draws = np.zeros((count, 3), dtype=np.int64)
    draws[:, :2] = rng.integers(0, 2 * augmentation.crop_padding + 1, (count, 2))
    if augmentation.flip:
        draws[:, 2] = rng.integers(0, 2, count)
    return torch.from_numpy(draws)


@dataclass(frozen=True)
class Pass:
    """One pass over a split: which image comes when, and how it is augmented."""

    order: Tensor
    """int64 (n,), indices of images."""
    draws: Tensor | None
    """int64 (n, 3), see `draw_augmentation`; None: not augmented."""

    def __getitem__(self, part: slice) -> Pass:
        return Pass(self.order[part], None if self.draws is None else self.draws[part])

    def __len__(self) -> int:
        return len(self.order)

    def shared(self, batch_size: int, share: Share) -> Pass:
        """The batches that one of several processes takes: consecutive ones, as they are in the
        whole pass. A last, short one comes with the one before it."""
        whole = max(1, len(self) // batch_size)
        batches = Share(share.rank, share.size).of(whole)
        end = len(self) if batches.stop == whole else batches.stop * batch_size
        return self[min(batches.start * batch_size, end) : end]

    def to(self, device: torch.device) -> Pass:
        return Pass(
            upload(self.order, device),
            None if self.draws is None else upload(self.draws, device),
        )

    def batches(self, batch_size: int, share: Share = EVERYTHING) -> Iterator[Pass]:
        """Parts of `batch_size`, the last one maybe short, and of each what `share` takes."""
        for start in range(0, len(self), batch_size):
            part = self[start : start + batch_size]
            yield part[share.of(len(part))]


def training_pass(
    images: int,
    batch_size: int,
    epoch: int,
    augmentation: Augmentation,
    seed: int,
    grouping: ClassBatches | None = None,
) -> Pass:
    """The shuffle of epoch number `epoch`, full batches only; those of `grouping`, if given."""
    used = steps_per_epoch(images, batch_size, grouping) * batch_size
    rng = generator(seed, "order", epoch)
    order = grouping.order(batch_size, rng) if grouping else rng.permutation(images)[:used]
    draws = draw_augmentation(used, augmentation, generator(seed, "augmentation", epoch))
    return Pass(torch.from_numpy(order), draws)


def training_passes(
    images: int,
    batch_size: int,
    start_step: int,
    augmentation: Augmentation,
    seed: int,
    grouping: ClassBatches | None = None,
) -> Iterator[Pass]:
    """What is left of the epoch that `start_step` falls into, then epoch after epoch."""
    epoch, done = divmod(start_step, steps_per_epoch(images, batch_size, grouping))
    while True:
        whole = training_pass(images, batch_size, epoch, augmentation, seed, grouping)
        yield whole[done * batch_size :]
        epoch, done = epoch + 1, 0


def inference_pass(
    images: int, samples: int | None, augmentation: Augmentation | None, seed: int
) -> Pass:
    """All images in order, or the first `samples` of a fixed shuffle."""
    if samples is None:
        order = np.arange(images)
    else:
        order = generator(seed, "samples").permutation(images)[:samples]
    draws = None
    if augmentation is not None:
        draws = draw_augmentation(len(order), augmentation, generator(seed, "augmented inference"))
    return Pass(torch.from_numpy(order), draws)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the copy where the device is a CUDA one."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
