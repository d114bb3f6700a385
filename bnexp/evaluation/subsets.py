"""Going through the user's batches again and again, in one order: all of them, or some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from bnexp.errors import UserError
from bnexp.evaluation.scoring import labels_of, size_of
from bnexp.ranks import checksum


class Batches:
    """The batches of an iterable in one order, whichever of them are asked for.

    Of a DataLoader over a Dataset the order is drawn once, and of what isn't asked for nothing is
    loaded; a sequence is indexed. Anything else is gone through and what isn't asked for passed
    over: it must give the same order in every pass, as a loader does that shuffles with a generator
    of its own (whose state is put back) or with torch's (within `inference`). UserError from a
    pass that ends at once after one that didn't and, with `paired`, from one that gives other
    labels than before: scores of several passes are compared sample by sample.

    what: the batches are, in words.
    sizes: the samples in each batch, as far as a pass has come.
    """

    def __init__(self, source: Iterable, what: str = "the iterable", paired: bool = False) -> None:
        self.sizes: list[int] = []
        self._source = source
        self._what = what
        self._labels: dict[int, int] | None = {} if paired else None
        self._order = _order(source)
        generator = getattr(source, "generator", None)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        self._state = self._generator.get_state() if self._generator is not None else None

    def __len__(self) -> int:
        """TypeError where it isn't known beforehand."""
        return len(self._source)  # type: ignore[arg-type]

    @property
    def batch_size(self) -> int | None:
        size = getattr(self._source, "batch_size", None)
        if size is None and isinstance(self._source, Sequence) and self._source:
            size = size_of(self._source[0])
        return size

    @property
    def samples(self) -> int:
        """How many samples there are in the batches seen so far."""
        return sum(self.sizes)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._pass(None)):
            if number == len(self.sizes):
                self.sizes.append(size_of(batch))
            yield batch

    def only(self, numbers: Sequence[int]) -> Iterable:
        """The batches of these numbers, rising from 0."""
        return _Some(self, numbers)

    def spread(self, samples: int, among: int | None = None) -> list[int]:
        """Numbers of batches that hold about so many samples together, evenly spread over the
        first `among` of those seen so far (None: all)."""
        sizes = self.sizes[:among]
        wanted = max(1, round(samples * len(sizes) / sum(sizes)))
        return evenly(wanted, len(sizes))

    def places(self, numbers: Sequence[int]) -> list[int]:
        """Where the samples of these batches are among all."""
        starts = [sum(self.sizes[:n]) for n in numbers]
        return [
            place
            for start, number in zip(starts, numbers, strict=True)
            for place in range(start, start + self.sizes[number])
        ]

    def _pass(self, numbers: Sequence[int] | None) -> Iterator[Any]:
        if self._order is not None:
            order = self._order
            yield from _reordered(
                self._source, order if numbers is None else [order[n] for n in numbers]
            )
        elif isinstance(self._source, Sequence):
            for number in range(len(self._source)) if numbers is None else numbers:
                yield self._source[number]
        else:
            if self._generator is not None and self._state is not None:
                self._generator.set_state(self._state)
            wanted = None if numbers is None else set(numbers)
            last = None if numbers is None else max(numbers) + 1
            number = -1
            for number, batch in enumerate(islice(self._source, last)):
                if wanted is None or number in wanted:
                    self._compare(number, batch)
                    yield batch
            if self.sizes and (number < 0 or (self._labels and number + 1 < (last or 0))):
                raise self._other(f"which ends after {number + 1} batches")

    def _compare(self, number: int, batch: Any) -> None:
        """UserError where this batch has other samples than in a pass before, by their labels."""
        if self._labels is None:
            return
        try:
            labels = checksum([labels_of(batch)], size_of(batch))
        except UserError:  # none that could be told
            labels = size_of(batch)
        if self._labels.setdefault(number, labels) != labels:
            raise self._other(f"whose batch number {number} is another")

    def _other(self, how: str) -> UserError:
        return UserError(
            f"{self._what} is gone through several times, and gave a pass {how}: it must give the "
            "same samples in the same order every time, as a DataLoader or a list of batches does"
        )


class _Some:
    def __init__(self, batches: Batches, numbers: Sequence[int]) -> None:
        self._batches, self._numbers = batches, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Any]:
        return self._batches._pass(self._numbers)


def evenly(count: int, total: int) -> list[int]:
    """`count` different numbers below `total` (all of them, if there are no more), evenly spread,
    rising."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _order(source: Iterable) -> list | None:
    """What a DataLoader's batches consist of; None for all else, subclasses included."""
    if type(source) is not DataLoader or isinstance(source.dataset, IterableDataset):
        return None
    if source.batch_sampler is None:
        return None
    try:
        count = len(source)
    except TypeError:
        return None
    generator = getattr(source.sampler, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    order = list(islice(source.batch_sampler, count))
    if generator is not None and state is not None:
        generator.set_state(state)
    return order


def _reordered(source: Any, order: list) -> Iterable:
    return DataLoader(
        source.dataset,
        batch_sampler=order,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        pin_memory=source.pin_memory,
        timeout=source.timeout,
        worker_init_fn=source.worker_init_fn,
        multiprocessing_context=source.multiprocessing_context,
        prefetch_factor=source.prefetch_factor,
    )
