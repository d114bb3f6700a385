"""From a folder of images to splits on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from bnexp.data import identity, sampling
from bnexp.data.folder import Folder, Listing, list_folder
from bnexp.data.grouping import ClassBatches
from bnexp.data.identity import FileHashes
from bnexp.data.images import read_image
from bnexp.data.memory import InMemorySplit
from bnexp.data.pixels import Normalization
from bnexp.data.settings import NO_AUGMENTATION, Augmentation, DataSettings
from bnexp.data.split import Data, Split, data_info
from bnexp.data.stream import ImageFiles, StreamedSplit
from bnexp.errors import UserError
from bnexp.printable import printable

IN_MEMORY_BYTES = 1 << 30
"""A folder whose decoded images take more than this is streamed."""
STATISTICS_IMAGES = 4096
"""So many training images of a streamed folder give its mean and standard deviation."""


def load_image_folder(settings: DataSettings, seed: int, device: torch.device) -> Data:
    """See `load_data`; UserError for a folder or an image that can't be read."""
    folder = list_folder(settings.root, settings.split_by_number)
    listings = _listings(folder, settings, seed)
    first = read_image(listings["train"].paths[0])
    size = (settings.image_size,) * 2 if settings.image_size else (first.height, first.width)
    images = sum(map(len, listings.values()))
    in_memory = images * size[0] * size[1] * 3 <= IN_MEMORY_BYTES
    files = {
        part: ImageFiles(
            listing.paths,
            size,
            settings.image_size is not None,
            settings.workers,
            settings.corruption if part == "test" else None,
            listing.names,
        )
        for part, listing in listings.items()
    }
    classes = settings.classes_per_batch
    grouping = ClassBatches(listings["train"].labels, classes) if classes else None
    count = len(listings["train"]) if in_memory else STATISTICS_IMAGES
    train_pixels = files["train"].read(count)
    info = data_info(settings, train_pixels, folder.classes)
    normalize = Normalization(info.mean, info.std, size, info.image_size, device)

    def split(
        part: str,
        augmentation: Augmentation = NO_AUGMENTATION,
        grouping: ClassBatches | None = None,
    ) -> Split:
        labels = torch.from_numpy(listings[part].labels)
        if not in_memory:
            return StreamedSplit(
                files[part], labels, normalize, augmentation, seed, device, grouping
            )
        pixels = train_pixels if part == "train" else files[part].read(len(labels))
        return InMemorySplit(pixels, labels, normalize, augmentation, seed, device, grouping)

    train, test = split("train", settings.augmentation, grouping), split("test")
    val = split("val") if "val" in listings else None
    hashes = identity.hash_files(listings.values(), settings.workers)
    splits = {
        part: identity.of_files(listing, hashes, len(folder.classes))
        for part, listing in listings.items()
    }
    fingerprint: identity.Fingerprint = {
        "name": settings.name,
        "classes": list(folder.classes),
        "split": folder.split,
        "compared": hashes.compared,
        "splits": splits,
    }
    counts = {part: of_part["images"] for part, of_part in splits.items()}
    remarks = _remarks(folder, counts, listings, hashes)
    return Data(info, train, val, test, fingerprint, tuple(remarks))


def _listings(folder: Folder, settings: DataSettings, seed: int) -> dict[str, Listing]:
    """The images of each split there is: train, test and maybe val."""
    if folder.val is not None and settings.val_fraction:
        raise UserError(
            f"{printable(settings.root)} has a folder of validation images of its own; take "
            "data.val_fraction from the config"
        )
    train, val, test = sampling.choose_images(
        folder.train.labels, folder.test.labels, settings, seed
    )
    found = {"train": folder.train.take(train), "test": folder.test.take(test)}
    if folder.val is not None:
        found["val"] = folder.val
    elif len(val):
        found["val"] = folder.train.take(val)
    return found


def _remarks(
    folder: Folder,
    counts: Mapping[str, list[int]],
    listings: Mapping[str, Listing],
    hashes: FileHashes,
) -> Iterator[str]:
    """What was found and what was left out, a line each."""
    yield _class_sizes(folder.classes, counts)
    if folder.left_out:
        yield f"left out: {folder.left_out}"
    if missing := [name for name, n in zip(folder.classes, counts["test"], strict=True) if not n]:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        yield f"no test images of class {missing[0]}{more}"
    if hashes.compared != "contents":
        yield (
            "so many bytes of images are told from others by their names and sizes; whether a "
            "picture is in two splits was not looked for"
        )
    for one, other, words in _PAIRS:
        if one not in listings or other not in listings:
            continue
        if both := hashes.in_both(listings[one], listings[other]):
            first, second = (_below(path) for path in both[0])
            yield f"{len(both):,} {words}, such as {first} and {second}"


_PAIRS = (
    ("train", "test", "test images are training images, too"),
    ("val", "test", "test images are validation images, too"),
    ("train", "val", "validation images are training images, too"),
)


def _below(path: Path) -> str:
    return printable(Path(*path.parts[-3:]))


def _class_sizes(classes: tuple[str, ...], counts: Mapping[str, list[int]]) -> str:
    parts = [part for part in ("train", "val", "test") if part in counts]

    def of(label: int) -> str:
        sizes = " + ".join(f"{counts[part][label]:,}" for part in parts)
        return f"{classes[label]} {sizes}"

    labels = range(len(classes))
    if len(classes) <= 12:
        said = ", ".join(map(of, labels))
    else:
        sizes = counts["train"]
        said = f"from {of(min(labels, key=sizes.__getitem__))} to "
        said += of(max(labels, key=sizes.__getitem__))
    words = " + ".join({"train": "training", "val": "validation"}.get(p, p) for p in parts)
    return f"{len(classes):,} classes ({words} images): {said}"
