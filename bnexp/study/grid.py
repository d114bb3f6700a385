"""The grid of a study, and the trainings that it takes: what is free is not run twice.

Running statistics and other estimators of them are read by inference alone. So experiments that
differ in `statistics.decay` or `statistics.estimators` are one training with many estimators, which
`fold` finds wherever that is exact, and `Reading` says under which names the training's record has
what the experiment is about.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from bnexp.condition import Condition
from bnexp.config import Config
from bnexp.config.loading import assign, resolve
from bnexp.config.yaml_text import unshared
from bnexp.errors import UserError, shown
from bnexp.statistics.rules import Ema, Estimator
from bnexp.study.file import Study, same, text_of

MAX_EXPERIMENTS = 10_000
MAX_ESTIMATORS = 500
# What decides nothing about a result.
_NO_PART = ("name", "expect", "logging", "checkpoints")


@dataclass(frozen=True)
class Point:
    """An experiment of the grid: the level of each axis, the seed, and its resolved config."""

    levels: Mapping[str, Any]
    seed: int
    config: Config

    @property
    def label(self) -> str:
        """`training.batch_size 8, seed 0`"""
        words = [f"{name.rpartition('.')[2]} {text_of(v)}" for name, v in self.levels.items()]
        return ", ".join([*words, f"seed {self.seed}"])


@dataclass(frozen=True)
class Reading:
    """An experiment of the grid as the record of a training has it. `names`: what its statistics
    (`running`, its estimators) are called there; `estimators`: all that the training has."""

    point: Point
    names: Mapping[str, str]
    estimators: Mapping[str, Estimator]

    def in_record(self, condition: Condition) -> Condition:
        """The condition under which the training's record has what the experiment calls so."""
        return replace(
            condition, statistics=self.names.get(condition.statistics, condition.statistics)
        )

    def of_record(self, condition: Condition) -> Condition | None:
        """What the experiment calls a condition of the record; None where it is another one's."""
        own = {there: here for here, there in self.names.items()}
        if condition.statistics in own:
            return replace(condition, statistics=own[condition.statistics])
        foreign = condition.statistics == "running" or condition.statistics in self.estimators
        return None if foreign else condition


@dataclass(frozen=True)
class Training:
    """What is run once: a config, its identity, and the experiments that it answers."""

    key: str
    config: Config
    readings: tuple[Reading, ...]

    @property
    def label(self) -> str:
        """What its experiments have in common."""
        points = [reading.point for reading in self.readings]
        shared = {
            name: level
            for name, level in points[0].levels.items()
            if all(same(point.levels[name], level) for point in points)
        }
        return replace(points[0], levels=shared).label


def points_of(study: Study) -> list[Point]:
    """The experiments of the grid, the seeds of one combination side by side. UserError where a
    config is wrong, or where nothing is left."""
    chosen = [
        levels
        for levels in itertools.product(*(axis.levels for axis in study.axes))
        if _is_wanted(study, {a.name: v.value for a, v in zip(study.axes, levels, strict=True)})
    ]
    seeds = study.config.all_seeds
    if not chosen:
        raise UserError(f"study {study.config.name}: only and exclude leave no experiment")
    if len(chosen) * len(seeds) > MAX_EXPERIMENTS:
        raise UserError(
            f"study {study.config.name}: {len(chosen) * len(seeds):,} experiments; "
            f"{MAX_EXPERIMENTS:,} are the most"
        )
    points = []
    for combination in chosen:
        levels = {a.name: v.value for a, v in zip(study.axes, combination, strict=True)}
        tree = unshared(study.base)
        for axis, level in zip(study.axes, combination, strict=True):
            for key, value in level.changes.items():
                assign(tree, key, value, Config, f"vary.{axis.name}")
        tree["name"], tree["seed"] = study.config.name, seeds[0]
        tree.pop("expect", None)
        where = ", ".join(f"{name}={shown(v)}" for name, v in levels.items()) or "base"
        config = resolve(tree, [], f"study {study.config.name}: {where}")
        points += [Point(levels, s, config.model_copy(update={"seed": s})) for s in seeds]
    return points


def _is_wanted(study: Study, levels: Mapping[str, Any]) -> bool:
    if study.only and not any(matches(levels, condition) for condition in study.only):
        return False
    return not any(matches(levels, condition) for condition in study.exclude)


def matches(levels: Mapping[str, Any], condition: Mapping[str, Sequence[Any]]) -> bool:
    """Whether each axis that `condition` names has one of the levels it lists."""
    return all(any(same(levels[name], v) for v in wanted) for name, wanted in condition.items())


def trainings_of(points: Iterable[Point], fold: bool = True) -> list[Training]:
    """The trainings that answer `points`: identical ones once and, with `fold`, those that differ
    in what training does not read."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(identity(point.config, free=fold), []).append(point)
    return [
        training
        for group in groups.values()
        for training in (_folded(group) if fold else [_alone(group)])
    ]


def identity(config: Config, free: bool = False) -> str:
    """A hash of what determines the result of a training; with `free`, of what determines its
    weights alone, where the averages that it feeds have no part in them."""
    tree = config.model_dump(mode="json")
    for section in _NO_PART:
        tree.pop(section)
    if config.checkpoints.best == "best-on-test":
        tree["checkpoints"] = {"best": "best-on-test"}
    tree["data"].pop("workers")
    if config.data.name != "image-folder":  # the contents of the others are published
        tree["data"].pop("root")
    if config.model.weights:
        tree["model"]["weights"] = _contents(config.model.weights)
    if free:
        del tree["statistics"]["estimators"]
        if reader_of_averages(config) is None:
            del tree["statistics"]["decay"]
    text = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _contents(path: str) -> str:
    """What tells the file at `path` from others: a hash of its contents, else its name."""
    try:
        with open(Path(path).expanduser(), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return path


def reader_of_averages(config: Config) -> str | None:
    """The setting by which the running averages decide more than the rows of their own condition.

    Training reads them when they are frozen, and in normalizations that go by them; early stopping
    and the best checkpoint go by evaluations under them; and only they are looked at on training
    and validation images, beside averaged weights, and by statistics that adapt them.
    """
    readers = {
        "model.norm": config.model.norm not in ("batch", "none"),
        "statistics.freeze_from_step": config.statistics.freeze_from_step is not None,
        "statistics.adapted": bool(config.statistics.adapted),
        "training.averages.ema": config.training.averages.ema is not None,
        "training.averages.swa": config.training.averages.swa is not None,
        "training.early_stopping": config.training.early_stopping is not None,
        "data.val_fraction": config.data.val_fraction != 0,
        "checkpoints.best": config.checkpoints.best != "best",
        "test.train_accuracy": config.test.train_accuracy,
    }
    return next((name for name, reads in readers.items() if reads), None)


def _alone(group: Sequence[Point]) -> Training:
    config = group[0].config
    own = config.statistics.estimators
    names = {"running": "running", **{name: name for name in own}}
    return Training(identity(config), config, tuple(Reading(point, names, own) for point in group))


def _folded(group: Sequence[Point]) -> list[Training]:
    """Trainings whose weights are those of all `group`; one, but for very many estimators."""
    first = group[0].config
    estimators: dict[str, Estimator] = {}
    readings = []
    for i, point in enumerate(group):
        statistics = point.config.statistics
        wanted: dict[str, Estimator] = dict(statistics.estimators)
        names = {}
        if statistics.decay == first.statistics.decay:
            names["running"] = "running"
        else:
            name = f"decay-{statistics.decay:g}"
            names["running"] = _add(
                estimators, name, Ema(statistics.decay), first.statistics.adapted
            )
        for name, rule in wanted.items():
            names[name] = _add(estimators, name, rule, first.statistics.adapted)
        if len(estimators) > MAX_ESTIMATORS and i:
            return [*_folded(group[:i]), *_folded(group[i:])]
        readings.append(Reading(point, names, estimators))
    statistics = first.statistics.model_copy(update={"estimators": estimators})
    config = first.model_copy(update={"statistics": statistics})
    return [Training(identity(config), config, tuple(readings))]


def _add(
    estimators: dict[str, Estimator], name: str, rule: Estimator, taken: Container[str]
) -> str:
    """Have `rule` among the estimators, by `name` or one like it; which one comes back."""
    for number in itertools.count(1):
        candidate = name if number == 1 else f"{name}.{number}"
        if candidate not in taken and estimators.setdefault(candidate, rule) == rule:
            return candidate
    raise AssertionError
