"""Mini-batches that are not random: each holds images of a few classes only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnexp.errors import UserError


@dataclass(frozen=True)
class ClassBatches:
    """Mini-batches of `classes` classes each, in equal shares; `labels`: int64 (N,).

    As in Ioffe 2017, section 4.3, where a batch of 32 has two images of each of 16 classes.
    """

    labels: np.ndarray
    classes: int

    def steps(self, batch_size: int) -> int:
        """The most batches that can be made without taking an image twice.

        Raises UserError where there are fewer classes, the shares are not equal, or not even one
        batch can be made.
        """
        parts = self._parts(batch_size)
        if len(parts) < self.classes:
            raise UserError(
                f"data.batches.classes is {self.classes}, and the training images have "
                f"{len(parts)} classes"
            )
        # So many batches need so many parts, of which a class can give one to each.
        steps = int(parts.sum()) // self.classes
        while int(np.minimum(parts, steps).sum()) < steps * self.classes:
            steps = int(np.minimum(parts, steps).sum()) // self.classes
        if not steps:
            raise UserError(
                f"data.batches.classes: {self.classes} classes don't have the "
                f"{self._share(batch_size)} training images each that a batch of {batch_size} "
                "takes of them; set a smaller training.batch_size"
            )
        return steps

    def order(self, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """int64 (steps * batch_size,), indices of images, none twice, batch after batch.

        The classes of a batch, its images, their order in it and the order of the batches are
        random; of the classes those that have most images left come first, so that few are left
        over.
        """
        share = self._share(batch_size)
        labels = np.unique(self.labels)
        images = [rng.permutation(np.flatnonzero(self.labels == label)) for label in labels]
        parts, taken = self._parts(batch_size), np.zeros(len(labels), dtype=np.int64)
        batches = []
        for _ in range(self.steps(batch_size)):
            mixed = rng.permutation(len(labels))
            chosen = mixed[np.argsort(-(parts - taken)[mixed], kind="stable")[: self.classes]]
            batch = [images[c][taken[c] * share : (taken[c] + 1) * share] for c in chosen]
            batches.append(rng.permutation(np.concatenate(batch)))
            taken[chosen] += 1
        return np.stack(batches)[rng.permutation(len(batches))].reshape(-1)

    def _share(self, batch_size: int) -> int:
        if batch_size % self.classes:
            raise UserError(
                f"a batch of {batch_size} can't have equal shares of {self.classes} classes; "
                "choose a divisor for data.batches.classes"
            )
        return batch_size // self.classes

    def _parts(self, batch_size: int) -> np.ndarray:
        """How many batches the images of each class suffice for."""
        return np.unique(self.labels, return_counts=True)[1] // self._share(batch_size)
