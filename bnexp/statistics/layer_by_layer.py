"""`exact` as it is defined: BN layer after BN layer, each by a pass over all batches.

Slow, and it needs nothing of a model but that its passes can be repeated. `exact.py` has the same
in one sweep. And the statistics of all calls of a layer together, found in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.nn.inference import random_states_kept
from bnexp.nn.intercept import Normalize, normalized_by
from bnexp.statistics.forward import (
    Done,
    Normalizer,
    Population,
    Task,
    first_non_finite,
    is_wide,
    non_finite,
)
from bnexp.statistics.moments import Moments, moments

# Of a rank without batches, where it doesn't matter.
_ANY = torch.float32


@dataclass(frozen=True)
class Call:
    """One call of one BN layer in the forward pass of one batch.

    held: bytes that the pass held then, where that was counted.
    """

    name: str
    moments: Moments
    dtype: torch.dtype
    device: torch.device
    held: int = 0

    @staticmethod
    def of(name: str, x: Tensor, held: int = 0) -> Call:
        return Call(name, moments(x), x.dtype, x.device, held)


class PathsDiffer(UserError):
    """The pass of batch `number` calls other layers than that of batch 0."""

    def __init__(self, number: int, here: str | None, first: str | None) -> None:
        super().__init__(
            f"batch number {number} (counted from 0) goes on to {_place(here)} where batch 0 goes "
            f"on to {_place(first)}: the model's path depends on its data, so 'exact' is not "
            "defined for it; use method='pooled'"
        )
        self.number = number


class Dependent(Exception):
    """This rank's passes can't be interleaved, for the reason in the text."""


class GivenUp(Exception):
    """All ranks have learned that passes can't be interleaved, for the reason in the text."""


@dataclass(frozen=True)
class PopulationCall:
    """The same call in the passes of all batches: its moments over the population."""

    name: str
    moments: Moments
    normalizer: Normalizer


@dataclass(frozen=True)
class _Arrival:
    """Where all passes of one rank have come: a BN layer and their moments; None is the end."""

    name: str | None
    moments: Moments | None = None


def meet(task: Task, calls: Sequence[Call | None]) -> PopulationCall | None:
    """The population's next call; None where the passes of all ranks have come to their end.

    calls: where the passes of this rank have come, in the order of its batches; None is the end.
    A rank without batches follows the others. Raises PathsDiffer for batches of this rank,
    UserError for those of different ranks, GivenUp.
    """
    names = [None if call is None else call.name for call in calls]
    for number, name in enumerate(names):
        if name != names[0]:
            raise PathsDiffer(number, name, names[0])
    reached = [call for call in calls if call is not None]
    mine = None
    if reached:
        parts = [(number, call.moments) for number, call in enumerate(reached)]
        mine = _Arrival(reached[0].name, _merged(reached[0].name, parts))
    elif calls:
        mine = _Arrival(None)
    arrivals = _gathered(task, mine)
    first = next(iter(arrivals))
    for rank, arrival in arrivals.items():
        if arrival.name != arrivals[first].name:
            raise task.ranks.common(
                UserError(
                    f"rank {rank} goes on to {_place(arrival.name)} where rank {first} goes on to "
                    f"{_place(arrivals[first].name)}: the model's path depends on its data, so "
                    "'exact' is not defined for it; use method='pooled'"
                )
            )
    name = arrivals[first].name
    if name is None:
        return None
    whole = _union(task, name, [a.moments for a in arrivals.values() if a.moments is not None])
    dtype, device = (reached[0].dtype, reached[0].device) if reached else (_ANY, task.device)
    wide = is_wide(whole, device)
    return PopulationCall(name, whole, Normalizer.of(whole, dtype, device, wide))


def give_up(task: Task, dependent: Dependent) -> NoReturn:
    """Tell all ranks, at their next meeting."""
    _gathered(task, str(dependent))
    raise AssertionError("gathering a reason raises")


def _gathered(task: Task, mine: _Arrival | str | None) -> dict[int, _Arrival]:
    """What each rank that has batches brings. Raises GivenUp where one brings a reason."""
    brought = task.ranks.gather(mine, "the next BN layer")
    for rank, item in enumerate(brought):
        if isinstance(item, str):
            raise GivenUp(item if task.ranks.size == 1 else f"rank {rank}: {item}")
    return {rank: item for rank, item in enumerate(brought) if isinstance(item, _Arrival)}


def by_layer(population: Iterable[PopulationCall]) -> dict[str, Population]:
    """Per layer the moments of all its calls, merged."""
    calls: dict[str, list[Moments]] = {}
    for call in population:
        calls.setdefault(call.name, []).append(call.moments)
    return {name: Population.of(parts) for name, parts in calls.items()}


def layer_by_layer(task: Task, batches: Sequence) -> list[PopulationCall]:
    """The population's calls in order: for each a pass over all batches, and one for the end.

    Passes run one after the other, each to its end, each from the model as it was given, and
    with the same random numbers every time.
    """
    population: list[PopulationCall] = []

    def arrive(batch: Any) -> Call | None:
        """Where a batch comes to behind the calls that are known."""
        number, arrived = 0, None

        def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
            nonlocal number, arrived
            number += 1
            if number <= len(population):
                known = population[number - 1]
                if name != known.name:
                    raise UserError(
                        f"the model goes on to {_place(name)} where it went on to "
                        f"{_place(known.name)} before, with the same batch: 'exact' is not "
                        "defined for it; use method='pooled'"
                    )
                return known.normalizer.normalize(x, weight, bias, eps)
            call = Call.of(name, x)
            arrived = arrived or call
            if name == task.stop_after:
                raise Done
            return Normalizer.by_its_own(call.moments, x).normalize(x, weight, bias, eps)

        _run(task, batch, normalize)
        return arrived

    while True:
        if population and population[-1].name == task.stop_after:
            calls: list[Call | None] = [None] * len(batches)
        else:
            with random_states_kept(task.model):
                calls = [arrive(batch) for batch in batches]
        call = meet(task, calls)
        if call is None:
            return population
        population.append(call)


# Rounds until the statistics of all calls together must have settled, beyond one per layer.
_ROUNDS = 100


def all_calls_together(task: Task, batches: Sequence) -> dict[str, Population]:
    """Statistics with which inference meets these very statistics, over all calls of each layer.

    A fixed point, found by rounds: in each, every layer normalizes with what the round before
    found (in the first, each call with its batch's own). Where no call depends on an earlier one
    of the same layer, one round per layer brings it to rounding. Where calls do (recurrence), it
    settles or it doesn't: then UserError.
    """
    found: dict[str, Moments] = {}
    change = float("inf")
    for _ in range(len(task.layers) + _ROUNDS):
        before, found = found, _round(task, batches, found)
        last, change = change, _change(before, found)
        if change <= 1e-6 or (last <= change <= 1e-4):  # rounding goes on for ever
            return {name: Population.of([m]) for name, m in found.items()}
    raise UserError(
        f"the statistics of all calls together do not settle (they still change by {change:.1g} "
        "standard deviations from round to round), since calls of a layer depend on earlier ones: "
        "use calls='each'"
    )


def _round(task: Task, batches: Sequence, known: dict[str, Moments]) -> dict[str, Moments]:
    """Each layer's moments over all its calls, with layers normalizing with what is `known`."""
    parts: dict[str, list[tuple[int, Moments]]] = {}
    normalizers: dict[tuple[str, torch.dtype], Normalizer] = {}
    number = 0

    def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
        m = moments(x)
        parts.setdefault(name, []).append((number, m))
        if name not in known:
            return Normalizer.by_its_own(m, x).normalize(x, weight, bias, eps)
        if (name, x.dtype) not in normalizers:
            wide = is_wide(known[name], x.device)
            normalizers[name, x.dtype] = Normalizer.of(known[name], x.dtype, x.device, wide)
        return normalizers[name, x.dtype].normalize(x, weight, bias, eps)

    with random_states_kept(task.model):
        for number, batch in enumerate(batches):  # noqa: B007
            _run(task, batch, normalize)
    mine = {name: _merged(name, calls) for name, calls in parts.items()}
    everyone = task.ranks.gather(mine, "the end of a round")
    return {
        name: _union(task, name, [found[name] for found in everyone if name in found])
        for name in dict.fromkeys(name for found in everyone for name in found)
    }


def _change(a: dict[str, Moments], b: dict[str, Moments]) -> float:
    """The largest change of a mean or a standard deviation, in standard deviations."""
    if a.keys() != b.keys():
        return float("inf")
    worst = 0.0
    for name, after in b.items():
        std = after.var.sqrt()
        scale = std + 1e-5 * after.mean.abs() + 1e-12
        changes = (a[name].mean - after.mean).abs(), (a[name].var.sqrt() - std).abs()
        worst = max(worst, *(float((c / scale).max()) for c in changes))
    return worst


def _run(task: Task, batch: Any, normalize: Normalize) -> None:
    task.given.restore()
    with normalized_by(task.layers, normalize):
        task.run(batch)
    task.report.advance()


def _merged(name: str, calls: Sequence[tuple[int, Moments]]) -> Moments:
    """The union of (batch number, moments) of one layer, in the passes of this rank."""
    bad = first_non_finite([m for _, m in calls])
    if bad is not None:
        raise non_finite(name, calls[bad][0])
    return Moments.merge([m for _, m in calls if m.count] or [calls[0][1]])


def _union(task: Task, name: str, parts: Sequence[Moments]) -> Moments:
    """What the ranks have of one layer, merged in their order."""
    parts = [m for m in parts if m.count]
    if sum(part.count for part in parts) < 2:
        raise task.ranks.common(
            UserError(
                f"BN layer {name!r} has one value per channel over all batches: a variance needs "
                "at least two"
            )
        )
    return Moments.merge(parts)


def _place(name: str | None) -> str:
    return "the end" if name is None else f"BN layer {name!r}"
