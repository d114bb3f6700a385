"""Opening the user's data: a folder of images, or a Dataset or DataLoader of their own code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from bnexp.data.folder import PARTS, LeftOut, images_below, images_by_class, shown_classes
from bnexp.data.images import SUFFIXES, read_image
from bnexp.data.sampling import generator
from bnexp.errors import UserError
from bnexp.importing import call, import_object, is_object_name
from bnexp.printable import printable

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preparation:
    """How an image of a folder becomes a tensor: shorter side to `resize` pixels (bilinear), the
    middle square of `crop` pixels, values from 0 to 1, then `(x - mean) / std` per channel."""

    resize: int | None = None
    crop: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def transform(self) -> Transform:
        from torchvision.transforms import v2

        channels = len(self.mean) if self.mean is not None else 3
        steps: list[Any] = [v2.Grayscale()] if channels == 1 else []
        if self.resize is not None:
            steps.append(v2.Resize(self.resize, antialias=True))
        if self.crop is not None:
            steps.append(v2.CenterCrop(self.crop))
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        if self.mean is not None and self.std is not None:
            steps.append(v2.Normalize(list(self.mean), list(self.std)))
        return v2.Compose(steps)

    @property
    def empty(self) -> bool:
        return self == Preparation()

    @property
    def words(self) -> str:
        """What it does to an image, whether or not it was asked for."""
        size = [] if self.resize is None else [f"shorter side {self.resize} px"]
        size += [] if self.crop is None else [f"middle {self.crop} px"]
        scale = "values from 0 to 1, no mean or std taken off (data.mean, data.std)"
        if self.mean is not None and self.std is not None:
            scale = f"mean {_listed(self.mean)}, std {_listed(self.std)}"
        return f"{', '.join(size) or 'their own size'}; {scale}"


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def transform_of(name: str) -> tuple[Transform, str]:
    """The transform that a library's weights of this name ask for, and what it does, in words.

    `torchvision/NAME` or `torchvision/NAME.WEIGHTS`, and `timm/NAME`. Nothing is downloaded.
    """
    library, _, model = name.partition("/")
    if library == "torchvision" and model:
        from torchvision import models

        model, _, weights = model.partition(".")
        try:
            entry = models.get_model_weights(model)[weights or "DEFAULT"]
        except (ValueError, KeyError):
            raise UserError(f"torchvision has no weights {name!r} to prepare images for") from None
        return entry.transforms(), f"as for torchvision's {model} weights {entry.name}"
    if library == "timm" and model:
        try:
            from timm.data import create_transform, resolve_data_config
            from timm.models import get_pretrained_cfg
        except ModuleNotFoundError:
            raise UserError(f"{name} needs timm: pip install timm") from None
        found = get_pretrained_cfg(model)
        if found is None:
            raise UserError(f"timm has no model {model!r} to prepare images for")
        return (
            create_transform(**resolve_data_config({}, pretrained_cfg=found.to_dict())),
            f"as timm's data config of {model} says",
        )
    raise UserError(f"{name!r}: images are prepared as for torchvision/NAME or timm/NAME")


class ImageFolder(Dataset):
    """`root/<class>/...` (labels are the classes' places in `classes`), or, with `classes=None`,
    all images below `root`, whose labels are -1. (image, label), in a fixed, mixed order. Files are
    found and read as those of a run: see docs/data.md."""

    def __init__(self, root: Path, classes: tuple[str, ...] | None, transform: Transform) -> None:
        if classes is None:
            found = [(path, -1) for path, _ in images_below(root, LeftOut())]
        else:
            found = []
            for name, images in sorted(images_by_class(root, LeftOut()).items()):
                if printable(name) not in classes:
                    raise UserError(
                        f"{printable(root / name)} is a class that the others don't have"
                    )
                found += [(path, classes.index(printable(name))) for path, _ in images]
        if not found:
            raise UserError(f"{printable(root)} has no images ({', '.join(sorted(SUFFIXES))})")
        order = generator(0, "folder order").permutation(len(found))
        self.items = [found[i] for i in order]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        return self.transform(read_image(path)), label


@dataclass(frozen=True)
class Opened:
    """Batches that can be gone through again and again, and the classes where folders say them."""

    batches: Iterable
    classes: tuple[str, ...] | None
    description: str


def classes_of(source: str) -> tuple[str, ...] | None:
    """The class names if `source` is a folder with a folder per class, else None."""
    root = Path(source).expanduser()
    if is_object_name(source) or not root.is_dir():
        return None
    names = sorted(images_by_class(root, LeftOut()))
    splits = [name for name in names if name.lower() in PARTS]
    if len({PARTS[name.lower()] for name in splits}) > 1:
        raise UserError(
            f"{source} has {' and '.join(f'{name}/' for name in splits)}, which are no classes: "
            f"name the one that is meant, as in {root / splits[0]}"
        )
    return shown_classes(names) or None


def open_batches(
    source: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    classes: tuple[str, ...] | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> Opened:
    """The batches that `source` stands for.

    A folder of images, which `transform` (one is needed) makes tensors of; or
    `package.module:object`, a `Dataset`, a `DataLoader` or another iterable of batches, or a
    callable that gives one, called with `arguments`. A `DataLoader` is used as it is; of a
    `Dataset` batches of `batch_size` are made, in an order mixed once and for all. `classes` are
    the labels' names for a folder; None: its images have no labels.

    Raises UserError for what is none of these, and for iterators, which end after one pass.
    """
    if is_object_name(source):
        return _own(source, dict(arguments or {}), batch_size, workers)
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UserError(
            f"there is no folder {source}; data are a folder of images or package.module:callable"
        )
    if transform is None:
        raise UserError(
            f"{source}: say how its images are prepared: data.transforms=torchvision/resnet18, or "
            "data.resize, data.crop, data.mean and data.std"
        )
    images = ImageFolder(root, classes, transform)
    return Opened(
        DataLoader(images, batch_size=batch_size, num_workers=workers),
        classes,
        f"{len(images)} images in {source}",
    )


def _own(source: str, arguments: dict[str, Any], batch_size: int, workers: int) -> Opened:
    found = import_object(source)
    if callable(found) and not isinstance(found, Dataset | DataLoader):
        found = call(source, found, arguments)
    elif arguments:
        raise UserError(f"{source} is no callable: arguments have nothing to go to")
    if isinstance(found, Dataset) and hasattr(found, "__len__"):
        order = generator(0, "audit order").permutation(len(found))  # type: ignore[arg-type]
        named = getattr(found, "classes", None)
        mixed: Dataset = Subset(found, order.tolist())  # type: ignore[arg-type]
        return Opened(
            DataLoader(mixed, batch_size=batch_size, num_workers=workers),
            tuple(map(str, named)) if isinstance(named, list | tuple) else None,
            f"{len(order)} samples of {source}",
        )
    if not isinstance(found, Iterable):
        raise UserError(
            f"{source} gave a {type(found).__name__}: a Dataset, a DataLoader or another iterable "
            "of batches is needed"
        )
    if iter(found) is found:
        raise UserError(
            f"{source} gave an iterator, which ends after one pass and is needed several times: "
            "return a DataLoader, a Dataset or a list of batches"
        )
    dataset = getattr(found, "dataset", None)
    named = getattr(dataset, "classes", None)
    return Opened(
        found,
        tuple(map(str, named)) if isinstance(named, list | tuple) else None,
        f"the batches of {source}",
    )
