"""A split whose images are decoded from their files as they are needed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bnexp.data import sampling
from bnexp.data.ahead import ahead
from bnexp.data.augmentation import shift_and_flip
from bnexp.data.corruption import Corruption
from bnexp.data.grouping import ClassBatches
from bnexp.data.images import decode
from bnexp.data.pixels import Normalization
from bnexp.data.settings import Augmentation

CHUNK = 64
"""So many images are decoded at a time where all are wanted."""


@dataclass(frozen=True)
class ImageFiles:
    paths: list[Path]
    image_size: tuple[int, int]
    resize: bool
    workers: int
    corruption: Corruption | None = None
    names: list[str] | None = None
    """Of the images, which a corruption goes by."""

    def decode(self, indices: Tensor, out: Tensor) -> Tensor:
        """Write the images into `out`, uint8 (B, H, W, 3), and return it."""
        pixels = out.numpy()
        for row, index in enumerate(indices.tolist()):
            pixels[row] = decode(self.paths[index], self.image_size, self.resize)
        if self.corruption is not None and self.names is not None:
            numbers = [zlib.crc32(os.fsencode(self.names[i])) for i in indices.tolist()]
            filled = out[: len(numbers)]
            filled.copy_(self.corruption.apply(filled, numbers))
        return out

    def read(self, count: int) -> Tensor:
        """The first `count` images, or as many as there are, uint8 (N, H, W, 3)."""
        count = min(count, len(self.paths))
        images = torch.empty((count, *self.image_size, 3), dtype=torch.uint8, device="cpu")
        chunks = torch.arange(count, device="cpu").split(CHUNK)
        for _ in ahead(chunks, lambda chunk: self.decode(chunk, images[chunk[0] :]), self.workers):
            pass
        return images


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
        grouping: ClassBatches | None = None,
    ):
        self.labels = labels
        self._files = files
        self._normalize = normalize
        self._augmentation = augmentation
        self._seed = seed
        self._device = device
        self._grouping = grouping

    def __len__(self) -> int:
        return len(self.labels)

    def steps_per_epoch(self, batch_size: int) -> int:
        return sampling.steps_per_epoch(len(self), batch_size, self._grouping)

    def training_batches(
        self, batch_size: int, start_step: int = 0, share: sampling.Share = sampling.EVERYTHING
    ) -> Iterator[tuple[Tensor, Tensor]]:
        passes = sampling.training_passes(
            len(self), batch_size, start_step, self._augmentation, self._seed, self._grouping
        )
        return self._load(part for whole in passes for part in whole.batches(batch_size, share))

    def batches(
        self,
        batch_size: int,
        samples: int | None = None,
        augment: bool = False,
        share: sampling.Share = sampling.EVERYTHING,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        whole = sampling.inference_pass(
            len(self), samples, self._augmentation if augment else None, self._seed
        )
        return self._load(whole.shared(batch_size, share).batches(batch_size))

    def _load(self, parts: Iterable[sampling.Pass]) -> Iterator[tuple[Tensor, Tensor]]:
        for part, pixels in ahead(parts, self._decode, self._files.workers):
            images = pixels.to(self._device, non_blocking=True)
            if part.draws is not None:
                draws = sampling.upload(part.draws, self._device)
                images = shift_and_flip(images, draws, self._augmentation.crop_padding)
            labels = sampling.upload(self.labels[part.order], self._device)
            yield self._normalize(images), labels

    def _decode(self, part: sampling.Pass) -> Tensor:
        shape = (len(part), *self._files.image_size, 3)
        pinned = self._device.type == "cuda"
        return self._files.decode(
            part.order, torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        )
