"""Gathering what the findings look at: how BN layers are set up, and what the data do in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnexp.analysis.findings import LayerFacts, Values
from bnexp.evaluation.scoring import Task, tensors_in
from bnexp.nn.find import batchnorm_layers
from bnexp.nn.inference import inference
from bnexp.statistics import Statistics
from bnexp.statistics.moments import Moments, moments


@dataclass(frozen=True)
class Modes:
    """Which layers were in training mode, and which were frozen, before the model was looked at."""

    training: frozenset[str]
    frozen: frozenset[str]

    @staticmethod
    def of(model: nn.Module) -> Modes:
        layers = batchnorm_layers(model)
        return Modes(
            frozenset(n for n, layer in layers.items() if layer.training and not model.training),
            frozenset(
                n
                for n, layer in layers.items()
                if getattr(layer, "frozen", False) or (model.training and not layer.training)
            ),
        )


def layer_facts(
    model: nn.Module,
    running: Statistics,
    population: Statistics,
    batches: Iterable,
    task: Task,
    *,
    modes: Modes,
    not_in_file: Collection[str] = (),
) -> tuple[LayerFacts, ...]:
    """What there is to know of each BN layer, in module order.

    `batches`: some hundred samples of the population, for how far samples differ and in which
    order layers are called; one pass over them, and two over the first of them if there are
    layers that nothing reached. The model is as before afterwards.
    """
    seen = _look(model, population, batches, task)
    layers = batchnorm_layers(model)
    idle = [name for name in layers if name not in seen and name in running.mean]
    used = _used(model, idle, running, batches, task) if idle else False
    facts = []
    for name, layer in layers.items():
        depth, spread = seen.get(name, (None, None))
        tracked = running.count.get(name)
        facts.append(
            LayerFacts(
                name=name,
                eps=layer.eps,
                momentum=layer.momentum,
                tracked=tracked if layer.num_batches_tracked is not None else None,
                running=_values(running, name),
                population=_values(population, name),
                spread=spread,
                depth=depth,
                in_file=name not in not_in_file,
                training=name in modes.training,
                frozen=name in modes.frozen,
                used=used and name in idle,
            )
        )
    return tuple(facts)


def _values(statistics: Statistics, name: str) -> Values | None:
    if name not in statistics.mean:
        return None
    return Values(
        *(t[name].detach().double().cpu().numpy() for t in (statistics.mean, statistics.var))
    )


def _look(
    model: nn.Module, population: Statistics, batches: Iterable, task: Task
) -> dict[str, tuple[int, Values | None]]:
    """By name, in the order of their first calls: that order, and how far samples differ."""
    found: dict[str, list[tuple[Moments, Moments]]] = {}

    def watch(name: str, x: Tensor) -> None:
        parts = found.setdefault(name, [])
        if name not in population.mean:
            return
        mean = population.mean[name].to(x.device, torch.float32)
        centred = x.float().flatten(2) if x.dim() > 2 else x.float()[..., None]
        centred = centred - mean.view(1, -1, 1)
        parts.append((moments(centred.mean(2)), moments(centred.square().mean(2))))

    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: watch(name, args[0]))
        for name, layer in batchnorm_layers(model).items()
    ]
    try:
        with inference(model), population.applied_to(model):
            for batch in batches:
                task.output(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (depth, _spread(parts)) for depth, (name, parts) in enumerate(found.items())}


def _spread(parts: list[tuple[Moments, Moments]]) -> Values | None:
    if sum(mean.count for mean, _ in parts) < 2:
        return None
    of_means, of_squares = (Moments.merge(list(p)) for p in zip(*parts, strict=True))
    return Values(of_means.unbiased_var.cpu().numpy(), of_squares.unbiased_var.cpu().numpy())


def _used(
    model: nn.Module, idle: list[str], running: Statistics, batches: Iterable, task: Task
) -> bool:
    """Whether layers that are never called change the output by their statistics all the same."""
    other = Statistics(
        {n: running.mean[n] + (running.var[n] + 1).sqrt() for n in idle},
        {n: 4 * running.var[n] + 1 for n in idle},
        dict.fromkeys(idle, 0),
    )
    first = next(iter(batches))
    outputs = []
    for statistics in (Statistics(), other):
        with inference(model), statistics.applied_to(model):
            outputs.append([t.clone() for t in tensors_in(task.output(model, first))])
    return any(not torch.equal(a, b) for a, b in zip(*outputs, strict=True))
