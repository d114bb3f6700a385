"""A split whose images all lie on the training device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnexp.data import sampling
from bnexp.data.augmentation import shift_and_flip
from bnexp.data.grouping import ClassBatches
from bnexp.data.pixels import Normalization
from bnexp.data.settings import Augmentation


class InMemorySplit:
    """uint8 images on the device; see `Split`. On CUDA, no batch waits for the device."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalize: Normalization,
        augmentation: Augmentation,
        seed: int,
        device: torch.device,
        grouping: ClassBatches | None = None,
    ):
        """`images`: uint8 (N, H, W, C), `labels`: int64 (N,), both on the CPU."""
        self.labels = labels
        self._images = images.contiguous().to(device)
        self._labels = labels.to(device)
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
        for whole in passes:
            for part in whole.to(self._device).batches(batch_size, share):
                yield self._gather(part)

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
        for part in whole.shared(batch_size, share).to(self._device).batches(batch_size):
            yield self._gather(part)

    def _gather(self, part: sampling.Pass) -> tuple[Tensor, Tensor]:
        flat = self._images.view(len(self), -1).index_select(0, part.order)
        images = flat.view(-1, *self._images.shape[1:])
        if part.draws is not None:
            images = shift_and_flip(images, part.draws, self._augmentation.crop_padding)
        return self._normalize(images), self._labels.index_select(0, part.order)
