"""What a report reads of a run folder, parsed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

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
        from bnexp.condition import config_labels

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
            labels=config_labels(config),
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
