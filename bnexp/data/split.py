"""What the rest of bnexp sees of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from bnexp.data.identity import Fingerprint
from bnexp.data.pixels import pixel_mean_and_std
from bnexp.data.sampling import EVERYTHING, Share
from bnexp.data.settings import DataSettings


@dataclass(frozen=True)
class DataInfo:
    """What a model and a reader of its results need to know about the images.

    `image_size` is (height, width) of what batches hold. `mean` and `std` are per channel, of
    training pixels scaled to 0..1; batches are normalized with them.
    """

    name: str
    channels: int
    image_size: tuple[int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def data_info(settings: DataSettings, pixels: Tensor, classes: tuple[str, ...]) -> DataInfo:
    """`pixels`: uint8 (N, H, W, C), training images that mean and standard deviation come from."""
    height, width, channels = pixels.shape[1:]
    size = (settings.image_size,) * 2 if settings.image_size else (height, width)
    mean, std = pixel_mean_and_std(pixels)
    return DataInfo(settings.name, channels, size, classes, mean, std)


class Split(Protocol):
    """Images with labels, as batches `(x, y)` on the training device.

    `x` is float32 (batch, channels, height, width), normalized, channels_last; `y` is int64
    (batch,). Nothing here draws from the global random generators.
    """

    labels: Tensor
    """int64 (N,), on the CPU, in the order of `batches`."""

    def __len__(self) -> int: ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in one pass; the remainder is dropped. UserError when there is none."""

    def training_batches(
        self, batch_size: int, start_step: int = 0, share: Share = EVERYTHING
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless shuffled, augmented batches from step `start_step` on, and of each the samples
        that `share` takes: the same ones, augmented in the same way, whoever takes the others.

        Every epoch has an order of its own. Batch t depends on the seed, the batch size and t
        alone, so a run that resumes at step t sees what an uninterrupted one would have seen.
        """

    def batches(
        self,
        batch_size: int,
        samples: int | None = None,
        augment: bool = False,
        share: Share = EVERYTHING,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, or the first `samples` of a fixed seeded shuffle of them.

        The last batch may be short; more samples than there are mean all of them. `augment`
        applies training augmentation, fixed by the seed and the position in the pass. Every call
        with the same arguments yields the same batches. `share` takes consecutive ones of them, a
        last, short one with the one before it.
        """


@dataclass
class Data:
    """A data set ready for a device; `val` is None unless data.val_fraction or a folder has it."""

    info: DataInfo
    train: Split
    val: Split | None
    test: Split
    fingerprint: Fingerprint = field(default_factory=dict)
    """What tells these images and labels from others; see `identity`."""
    remarks: tuple[str, ...] = ()
    """Lines to be said when training starts: what was found in a folder, and what was left out."""
