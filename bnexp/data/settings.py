"""What can be asked of a data set, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnexp.data.corruption import Corruption


@dataclass(frozen=True)
class Augmentation:
    """What training does to its images, at random."""

    crop_padding: int = 0
    """Pad by so many black pixels on every side, then crop to the original size."""
    flip: bool = False
    """Mirror left and right with probability one half."""


NO_AUGMENTATION = Augmentation()


@dataclass(frozen=True)
class DataSettings:
    """Which images to load, and how."""

    name: str
    """One of `catalogue.DATA_SETS`."""
    root: Path | None = None
    """Where the files are, or go when downloaded; see `files.search_folders`."""
    val_fraction: float = 0.0
    """Share of the training images kept apart for validation."""
    augmentation: Augmentation = NO_AUGMENTATION
    image_size: int | None = None
    """Side of the square that images are resized to; None leaves them as they are."""
    workers: int = 2
    """Threads that decode the images of a folder; 0 decodes them between the steps."""
    limit_train: int | None = None
    """At most so many training images, chosen by the seed; None for all."""
    limit_test: int | None = None
    """At most so many test images, the same ones whatever the seed; None for all."""
    classes_per_batch: int | None = None
    """Training batches hold images of so many classes each; None for whatever comes."""
    corruption: Corruption | None = None
    """What is done to the test images."""
    binary: bool = False
    """Every value becomes 0 or 255, whichever is nearer; not for a folder of images."""
    split_by_number: bool = False
    """Set a folder's test images apart as runs did that kept no record of their data."""
