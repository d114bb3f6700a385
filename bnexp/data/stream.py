"""A split whose images are decoded by worker processes as they are needed."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bnexp.data import sampling
from bnexp.data.augmentation import shift_and_flip
from bnexp.data.pixels import Normalization
from bnexp.data.settings import Augmentation
from bnexp.errors import UserError


def decode(path: Path, image_size: tuple[int, int], resize: bool) -> np.ndarray:
    """The image at `path` as RGB, uint8 (height, width, 3).

    With `resize`, its shorter side is scaled (bilinear, antialiased) so that it just covers
    `image_size`, and the middle is cut out; without, it must already have that size. Raises
    UserError with the file's name when it can't be decoded or has another size.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "").strip(" '\"") or type(error).__name__
        raise UserError(f"{path} can't be decoded ({reason}); replace or remove it") from None
    height, width = image_size
    if resize:
        covering = (
            max(width, image.width * height // image.height),
            max(height, image.height * width // image.width),
        )
        image = image.resize(covering, Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    elif (image.height, image.width) != image_size:
        raise UserError(
            f"{path} has {image.width}x{image.height} pixels and the first image has "
            f"{width}x{height}; set data.image_size to bring all to one size"
        )
    return np.array(image)


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Image files as a map-style data set for worker processes."""

    paths: list[Path]
    image_size: tuple[int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        """uint8 (H, W, 3), or what is wrong with the file.

        An exception would reach the main process with the worker's traceback in its message.
        """
        try:
            return decode(self.paths[index], self.image_size, self.resize)
        except UserError as error:
            return str(error)

    def load(
        self, batches: Iterable[Tensor], workers: int, pin_memory: bool = False
    ) -> Iterator[Tensor]:
        """uint8 (B, H, W, 3) for each int64 (B,) of indices, in order, decoded by `workers`."""
        loader: DataLoader = DataLoader(
            self,
            batch_sampler=(indices.tolist() for indices in batches),
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=pin_memory,
            worker_init_fn=_leave_interrupts_to_the_parent,
            generator=torch.Generator(),  # otherwise the loader draws from the global one
        )
        for images in loader:
            if isinstance(images, str):
                raise UserError(images)
            yield images


def _leave_interrupts_to_the_parent(_: int) -> None:
    """Ctrl-C reaches workers too, and a run that means to stop after its step still needs them.
    SIGTERM ends them, whatever handler they inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stack(images: list[np.ndarray | str]) -> Tensor | str:
    wrong = [image for image in images if isinstance(image, str)]
    return wrong[0] if wrong else torch.from_numpy(np.stack(images))


class StreamedSplit:
    """Image files read again in every pass; see `Split`. Augmentation happens on the device."""

    def __init__(
        self,
        files: ImageFiles,
        labels: Tensor,
        normalize: Normalization,
        augmentation: Augmentation,
        seed: int,
        device: torch.device,
        workers: int,
    ):
        self.labels = labels
        self._files = files
        self._normalize = normalize
        self._augmentation = augmentation
        self._seed = seed
        self._device = device
        self._workers = workers

    def __len__(self) -> int:
        return len(self.labels)

    def steps_per_epoch(self, batch_size: int) -> int:
        return sampling.steps_per_epoch(len(self), batch_size)

    def training_batches(
        self, batch_size: int, start_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        def parts() -> Iterator[sampling.Pass]:
            for whole in sampling.training_passes(
                len(self), batch_size, start_step, self._augmentation, self._seed
            ):
                yield from whole.batches(batch_size)

        return self._load(parts(), parts())

    def batches(
        self, batch_size: int, samples: int | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        whole = sampling.inference_pass(
            len(self), samples, self._augmentation if augment else None, self._seed
        )
        return self._load(whole.batches(batch_size), whole.batches(batch_size))

    def _load(
        self, parts: Iterator[sampling.Pass], ahead: Iterator[sampling.Pass]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for `parts`; `ahead` is the same sequence, for the workers to run ahead on."""
        loaded = self._files.load(
            (part.order for part in ahead), self._workers, self._device.type == "cuda"
        )
        for part, pixels in zip(parts, loaded, strict=False):
            images = pixels.to(self._device, non_blocking=pixels.is_pinned())
            if part.draws is not None:
                draws = sampling.upload(part.draws, self._device)
                images = shift_and_flip(images, draws, self._augmentation.crop_padding)
            labels = sampling.upload(self.labels[part.order], self._device)
            yield self._normalize(images), labels
