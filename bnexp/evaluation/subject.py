"""What is evaluated: a model, and the data it is judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bnexp.ranks import Alone, Ranks
from bnexp.statistics.methods import Method

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A classifier and where its batches come from, on the model's device.

    `population(method)`  batches, as `recompute_statistics` takes them, to recompute from by a
                          method; it may be called several times
    `test(samples)`       (inputs, labels) batches of the first so many samples, None: of all
    `classes`             the names of the classes, by label
    `ranks`               who has samples: then both give this rank's part of the batches, maybe
                          none. What is predicted is gathered in rank order, so parts that are runs
                          of consecutive batches give the order of one process
    """

    model: nn.Module
    population: Callable[[Method], Iterable[Any]]
    test: Callable[[int | None], Batches]
    classes: tuple[str, ...]
    ranks: Ranks = field(default_factory=Alone)
