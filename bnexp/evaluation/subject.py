"""What is evaluated: a model, and the data it is judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bnexp.statistics.methods import Method

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A classifier and where its batches come from, on the model's device.

    `population(method)`  batches, as `recompute_statistics` takes them, to recompute from by a
                          method; it may be called several times
    `test(samples)`       (inputs, labels) batches of the first so many samples, None: of all
    `classes`             the names of the classes, by label
    """

    model: nn.Module
    population: Callable[[Method], Iterable[Any]]
    test: Callable[[int | None], Batches]
    classes: tuple[str, ...]
