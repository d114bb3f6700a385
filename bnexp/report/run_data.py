"""What a report reads of a run folder, parsed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexp.condition import Condition, compared_with, label, made_by

if TYPE_CHECKING:
    from bnexp.records import Run


@dataclass(frozen=True, eq=False)
class RunData:
    """`steps` holds the columns of steps.csv as arrays, `evals` the rows of evals.csv,
    `comparison` the content of comparison.json; None before the final evaluation."""

    name: str
    path: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    state: Mapping[str, Any]
    steps: Mapping[str, np.ndarray]
    evals: Sequence[Mapping[str, Any]]
    comparison: Mapping[str, Any] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Run) -> RunData:
        config = run.config
        return cls(
            name=run.name,
            path=str(run.path),
            config=config,
            environment=run.environment,
            state=run.state,
            steps=run.steps(),
            evals=run.evals(),
            comparison=run.comparison(),
            labels={name: label(Condition.parse(name), made_by(config)) for name in _names(config)},
        )

    def kinds(self, split: str) -> list[str]:
        """The kinds of statistics evaluated on `split`, in order of appearance."""
        return list(dict.fromkeys(row["statistics"] for row in self.evals if row["split"] == split))

    def curve(
        self, split: str, kind: str, column: str = "accuracy"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one kind's evaluations on `split`; the last one of a step counts."""
        points = {
            row["step"]: row[column]
            for row in self.evals
            if row["split"] == split and row["statistics"] == kind
        }
        steps = np.array(sorted(points), dtype=float)
        return steps, np.array([points[step] for step in steps], dtype=float)

    @property
    def baseline(self) -> str:
        """The kind the others are compared with."""
        if self.comparison:
            return self.comparison["baseline"]
        kinds = self.kinds("test")
        return "running" if "running" in kinds or not kinds else kinds[0]


def _names(config: Mapping[str, Any]) -> list[str]:
    names = ["running", *config["statistics"]["estimators"], "recomputed", "batch", "none"]
    return names + [f"{weights}/{name}" for weights in ("ema", "swa") for name in names]


def is_recomputed(kind: str) -> bool:
    condition = Condition.parse(kind)
    return condition.is_recomputed and condition.weights == "trained"


def compared_kind(kinds: Iterable[str]) -> str | None:
    found = compared_with(Condition("running"), map(Condition.parse, kinds))
    return str(found) if found else None
