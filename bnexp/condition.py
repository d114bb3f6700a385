"""Under what a model predicts: which statistics its BN layers normalize with, and which weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bnexp.reading import read
from bnexp.statistics.rules import Estimator

Weights = Literal["trained", "best", "best-on-test", "ema", "swa"]
AVERAGED: tuple[Weights, ...] = ("ema", "swa")


@dataclass(frozen=True)
class Condition:
    """`statistics` is `running`, the name of another estimator, `recomputed`, `batch` (every
    mini-batch's own) or `none` (a network without BN). `method` tells recomputed statistics apart
    where several methods were asked for."""

    statistics: str
    weights: Weights = "trained"
    method: str | None = None

    def __str__(self) -> str:
        """As in files: `running`, `recomputed/pooled`, `swa/recomputed`, `swa/recomputed/pooled`.
        The run's own weights, trained or best, are not printed."""
        weights = [self.weights] if self.weights in AVERAGED else []
        return "/".join([*weights, self.statistics, *([self.method] if self.method else [])])

    @classmethod
    def parse(cls, text: str, own: Weights = "trained") -> Condition:
        """What `str` printed; without weights in front it is about the run's `own`."""
        weights, _, rest = text.partition("/")
        if weights not in AVERAGED or not rest:
            weights, rest = own, text
        statistics, _, method = rest.partition("/")
        return cls(statistics, weights, method or None)

    @property
    def is_recomputed(self) -> bool:
        return self.statistics == "recomputed"


def compared_with(baseline: Condition, others: Iterable[Condition]) -> Condition | None:
    """Of all conditions but the baseline, the one it is judged by: recomputed statistics of the
    same weights where there are any, else the first; None where there is none."""
    others = list(others)
    recomputed = (c for c in others if c.is_recomputed and c.weights == baseline.weights)
    return next(recomputed, others[0] if others else None)


def weights_label(condition: Condition) -> str:
    name = condition.weights.upper() if condition.weights in AVERAGED else condition.weights
    return f"{name} weights"


def statistics_label(condition: Condition, made: Mapping[str, str]) -> str:
    """The statistics' name in a sentence, in the plural, with how they were made in brackets."""
    names = {
        "running": "running averages",
        "recomputed": "recomputed statistics",
        "batch": "batch statistics",
    }
    name = names.get(condition.statistics, f"{condition.statistics} statistics")
    how = condition.method or made.get(condition.statistics)
    brackets = f" ({how})" if how else ""
    if condition.weights in AVERAGED and condition.statistics not in ("recomputed", "batch"):
        return f"the trained model's {name}{brackets}"
    return ("" if condition.statistics in names else "the ") + name + brackets


def label(condition: Condition, made: Mapping[str, str]) -> str:
    """What a condition is called in sentences: "SWA weights with recomputed statistics (exact)".

    `made` says how each kind of statistics came about, by its name: {"running": "decay 0.9",
    "recomputed": "exact", "batch": "mini-batches of 250"}.
    """
    if condition.statistics == "none":
        return f"{weights_label(condition)} without batch normalization"
    return f"{weights_label(condition)} with {statistics_label(condition, made)}"


def made_by(config: Mapping[str, Any]) -> dict[str, str]:
    """`made` for `label`, from a run's resolved config as plain data. UserError and LookupError
    where it is damaged."""
    statistics, test = config["statistics"], config["test"]
    rules = read(dict[str, Estimator], statistics["estimators"])
    adapted = read(dict[str, Adapted], statistics.get("adapted", {}))
    return {
        "running": f"decay {statistics['decay']:g}",
        "recomputed": statistics["recompute"]["method"],
        "batch": f"mini-batches of {test['batch_size']}",
        **{name: rule.label() for name, rule in rules.items()},
        **{name: made.label() for name, made in adapted.items()},
    }


@dataclass(frozen=True)
class Adapted:
    """How statistics of test images are made; None stands for all of them."""

    samples: int | None = None
    prior: float = 0.0

    def label(self) -> str:
        images = "all test images" if self.samples is None else f"{self.samples:,} test images"
        return f"of {images}, prior {self.prior:g}" if self.prior else f"of {images}"
