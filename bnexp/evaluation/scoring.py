"""Scores of the user's own tasks: any batches, any forward, any number per sample."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.analysis.predictions import Predictions
from bnexp.errors import UserError
from bnexp.evaluation.predictions import classified
from bnexp.nn.find import batchnorm_layers
from bnexp.nn.inference import inference
from bnexp.ranks import Alone, Ranks, checksum
from bnexp.statistics import batch_statistics

Forward = Callable[[nn.Module, Any], Any]
Score = Callable[[Any, Any], Tensor]
# What a model is evaluated under: a context that sets it up and puts everything back.
Setting = Callable[[nn.Module], contextlib.AbstractContextManager]
Name = TypeVar("Name")

INPUT_KEYS = ("image", "images", "pixel_values", "img", "input", "inputs", "x", "data")
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")


@dataclass(frozen=True, eq=False)
class Scores:
    """A score per sample, float64 (N,); with top-1 accuracy also what was predicted."""

    values: np.ndarray
    predictions: Predictions | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    def changed(self, other: Scores) -> int:
        """How many samples are predicted, or score, otherwise."""
        if self.predictions is not None and other.predictions is not None:
            return int((self.predictions.predicted != other.predictions.predicted).sum())
        return int((self.values != other.values).sum())

    def at(self, places: Sequence[int]) -> Scores:
        """Of the samples at these places alone."""
        p = self.predictions
        taken = p and Predictions(
            p.predicted[places], p.labels[places], p.loss[places], p.confidence[places]
        )
        return Scores(self.values[places], taken)


@dataclass(frozen=True)
class Task:
    """How a batch becomes an output, and an output a number per sample.

    forward: `forward(model, batch)` gives the output; None: the model is called with the batch's
        tensor: the batch itself, the first of a tuple or list, or a dict's image.
    score: `score(output, batch)` gives a tensor (N,), higher being better; None: 1 where the most
        probable class is the batch's label.

    ranks: who works on it; all have the same batches.
    classes: how many the model is to tell apart, where that is known.

    Batches come with their tensors on `device`.
    """

    device: torch.device
    forward: Forward | None = None
    score: Score | None = None
    ranks: Ranks = field(default_factory=Alone)
    classes: int | None = None

    def output(self, model: nn.Module, batch: Any) -> Any:
        batch = to_device(batch, self.device)
        return self.forward(model, batch) if self.forward else model(input_of(batch))

    def rows(self, model: nn.Module, batch: Any) -> Tensor:
        """(4, N): predicted, label, loss, confidence; or (1, N) of the user's own scores."""
        batch = to_device(batch, self.device)
        with torch.inference_mode():
            output = self.output(model, batch)
            if self.score is None:
                return classified(*self._classification(output, batch))
            return _checked(self.score(output, batch), batch).double()[None]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """The sum over samples of the cross-entropy, or of minus the user's score."""
        batch = to_device(batch, self.device)
        output = self.output(model, batch)
        if self.score is None:
            logits, labels = self._classification(output, batch)
            return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)
        values = _checked(self.score(output, batch), batch)
        return -values.sum(), len(values)

    def _classification(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits, labels = _classification(output, batch)
        if self.classes not in (None, logits.shape[1]):
            raise UserError(
                f"the model tells {logits.shape[1]} classes apart, and there are {self.classes} "
                "names of classes: which output is which class can't be told; name one for each "
                "output, in their order (a folder needs an image of every class that the model was "
                "trained for)"
            )
        return logits, labels


def scores_under(
    model: nn.Module,
    batches: Iterable,
    settings: Mapping[Name, Setting],
    task: Task,
) -> dict[Name, Scores]:
    """Scores of the same samples under each of `settings`, in one pass over `batches`.

    Under `batch_statistics` a batch smaller than the one before it is filled up with that one's
    samples where they are tensors, so that every sample is normalized among equally many. The
    model is as before afterwards, also after an exception. Of the task's ranks each scores some of
    the batches, and all get the scores of all, in the order of the batches; UserError where their
    batches are not the same.
    """
    parts: dict[Name, list[Tensor]] = {name: [] for name in settings}
    before: Any = None
    ranks = task.ranks
    with ranks.together("scoring"), inference(model):
        alike = Alike(batches, ranks, "test")
        for number, batch in enumerate(alike):
            missing = 0 if before is None else size_of(before) - size_of(batch)
            if number % ranks.size == ranks.rank:
                for name, setting in settings.items():
                    with setting(model):
                        if setting is batch_statistics and missing > 0:
                            whole = _joined(before, batch, missing)
                            parts[name].append(task.rows(model, whole)[:, missing:])
                        else:
                            parts[name].append(task.rows(model, batch))
            before = batch if missing <= 0 else before
            ranks.heed()
        alike.check()
        every = ranks.gather(parts, "the scores")
    return {name: _scores(_in_order([p[name] for p in every]), task) for name in settings}


class Alike:
    """Batches that all ranks must have alike; once gone through, `check` raises UserError on all
    of them if they don't. what: the batches are, in words."""

    def __init__(self, batches: Iterable, ranks: Ranks, what: str) -> None:
        self._batches, self._ranks, self._what = batches, ranks, what
        self._sum = 0

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self._sum = 0
        for batch in self._batches:
            if self._ranks.size > 1:
                self._sum = checksum(tensors_in(batch), self._sum)
            yield batch

    def check(self) -> None:
        sums = self._ranks.gather(self._sum, f"the {self._what} batches")
        other = next((rank for rank, found in enumerate(sums) if found != sums[0]), None)
        if other is not None:
            raise self._ranks.common(
                UserError(
                    f"rank {other} has other {self._what} batches than rank 0: give all ranks the "
                    "same in the same order, without a DistributedSampler; the work on them is "
                    "split over the ranks here"
                )
            )


@contextlib.contextmanager
def other_eps(model: nn.Module, eps: float) -> Iterator[None]:
    """Within the block all BN layers of `model` have this eps."""
    layers = batchnorm_layers(model).values()
    own = [layer.eps for layer in layers]
    try:
        for layer in layers:
            layer.eps = eps
        yield
    finally:
        for layer, value in zip(layers, own, strict=True):
            layer.eps = value


@dataclass
class FirstSamples:
    """The first batches of an iterable, until they hold so many samples; None: all of it.

    `seen` and `batches_seen` say how many the last pass over them held. A DataLoader that shuffles
    with a generator of its own gives the same order in every pass; one that shuffles with torch's
    does so where the passes begin with the same state of that, as within `inference`.
    """

    batches: Iterable
    samples: int | None
    seen: int = 0
    batches_seen: int = 0
    order: Tensor | None = None

    def __len__(self) -> int:
        """The number of batches. TypeError where it isn't known beforehand."""
        count = len(self.batches)  # type: ignore[arg-type]
        if self.samples is None:
            return count
        size = getattr(self.batches, "batch_size", None)
        if size is None and isinstance(self.batches, Sequence) and count:
            size = size_of(self.batches[0])
        if not isinstance(size, int) or not size:
            raise TypeError("batches of unknown sizes")
        return min(count, -(-self.samples // size))

    def __iter__(self) -> Iterator[Any]:
        self.seen = self.batches_seen = 0
        generator = getattr(self.batches, "generator", None)
        if isinstance(generator, torch.Generator):
            if self.order is None:
                self.order = generator.get_state()
            generator.set_state(self.order)
        for batch in self.batches:
            self.seen += size_of(batch)
            self.batches_seen += 1
            yield batch
            if self.samples is not None and self.seen >= self.samples:
                return


def input_of(batch: Any) -> Tensor:
    """The tensor a batch is for the model; UserError where that can't be told."""
    found = batch
    if isinstance(batch, tuple | list) and batch:
        found = batch[0]
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in INPUT_KEYS if key in batch), batch)
    if isinstance(found, Tensor):
        return found
    what = f"dict with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "batch"
    raise UserError(
        f"what of a {what} the model is to get can't be told: pass "
        "forward=lambda model, batch: model(...)"
    )


def labels_of(batch: Any) -> Tensor:
    """The labels in a batch; UserError where there are none to be told."""
    found = None
    if isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    if isinstance(found, Tensor):
        return found
    raise UserError(
        "the test batches have no labels that could be told: give (input, label) batches, or pass "
        "score=lambda output, batch: ..."
    )


def tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_in(value)


def size_of(batch: Any) -> int:
    """The samples in a batch: the length of its first tensor."""
    for tensor in tensors_in(batch):
        if tensor.dim():
            return len(tensor)
    raise UserError(f"a batch of type {type(batch).__name__} has no tensor in it to count")


def to_device(batch: Any, device: torch.device) -> Any:
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [_mapped(value, function) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _joined(before: Any, batch: Any, count: int) -> Any:
    """The last `count` samples of one batch, and then the samples of another."""
    length, others = size_of(batch), iter(list(tensors_in(before)))

    def join(tensor: Tensor) -> Tensor:
        other = next(others)
        joins = tensor.dim() and len(tensor) == length
        return torch.cat([other[-count:], tensor]) if joins else tensor

    return _mapped(batch, join)


def _classification(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    labels = labels_of(batch)
    if not isinstance(output, Tensor):
        raise UserError(
            f"the model's output is a {type(output).__name__}: pass forward=lambda model, batch: "
            "... that returns logits, or score=lambda output, batch: ..."
        )
    if output.dim() != 2 or labels.shape != output.shape[:1]:
        raise UserError(
            f"top-1 accuracy needs logits (N, classes) and labels (N,), not {tuple(output.shape)} "
            f"and {tuple(labels.shape)}: pass score=lambda output, batch: ... with a number per "
            "sample"
        )
    if output.shape[1] == 1:
        raise UserError(
            "the model gives one number per sample: pass score=lambda output, batch: ... that says "
            "what it is worth"
        )
    if labels.is_floating_point() and not torch.equal(labels, labels.round()):
        raise UserError("the labels are no whole numbers: pass score=lambda output, batch: ...")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < output.shape[1]:
        raise UserError(
            f"labels from {int(labels.min())} to {int(labels.max())} don't fit the model's "
            f"{output.shape[1]} classes"
        )
    return output, labels.long()


def _checked(values: Any, batch: Any) -> Tensor:
    size = size_of(batch)
    if not isinstance(values, Tensor) or values.shape != (size,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(
            f"score gave {shape} for a batch of {size}: a tensor (N,) with a number per sample is "
            "needed"
        )
    return values


def _in_order(parts: list[list[Tensor]]) -> Tensor:
    """The rows of all batches, from those of each rank, which had every so manieth."""
    turns = itertools.zip_longest(*parts)
    rows = [part.cpu() for turn in turns for part in turn if part is not None]
    if not any(row.shape[1] for row in rows):
        raise UserError("there are no samples to test on: is the iterator used up?")
    return torch.cat(rows, dim=1)


def _scores(rows: Tensor, task: Task) -> Scores:
    if task.score is not None:
        return Scores(rows[0].double().numpy())
    predicted, labels, loss, confidence = rows.numpy()
    found = Predictions(predicted.astype(np.int64), labels.astype(np.int64), loss, confidence)
    return Scores(found.correct.astype(np.float64), found)
