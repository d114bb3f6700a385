"""What a report reads of a run folder, parsed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnexp.analysis.comparison import Comparison
from bnexp.condition import Condition, Weights, label, made_by
from bnexp.errors import UserError
from bnexp.printable import all_printable
from bnexp.reading import naming
from bnexp.records.experiment import described_data
from bnexp.records.files import read_json

if TYPE_CHECKING:
    from bnexp.records import Run


@dataclass(frozen=True)
class Evaluation:
    """A row of evals.csv: always of the weights as training had them at that step."""

    step: int
    split: str
    condition: Condition
    accuracy: float
    loss: float
    samples: int
    seconds: float


@dataclass(frozen=True)
class Setup:
    """What a report says of a run's config."""

    model: str
    data: str
    seed: int
    batch_size: int
    ema_decay: float
    label_smoothing: float
    augmented: bool


@dataclass(frozen=True, eq=False)
class RunData:
    """`steps` holds the columns of steps.csv as arrays; `comparison` is None before the final
    evaluation; `made` is as in `bnexp.condition.label`. Every text is printable."""

    name: str
    path: str
    config: Mapping[str, Any]
    setup: Setup
    environment: Mapping[str, Any]
    state: Mapping[str, Any]
    steps: Mapping[str, np.ndarray]
    evals: Sequence[Evaluation]
    comparison: Comparison | None = None
    made: Mapping[str, str] = field(default_factory=dict)
    test_images: str | None = None  # tells them from others; None where the record does not

    @classmethod
    def read(cls, run: Run) -> RunData:
        """UserError, naming the file, where one of the run's files is damaged."""
        config = all_printable(run.config)
        try:
            setup, made = _setup(config), made_by(config)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{run.path}/config.yaml is damaged: {all_printable(why)}") from None
        return cls(
            name=all_printable(run.name),
            path=all_printable(str(run.path)),
            config=config,
            setup=setup,
            environment=all_printable(run.environment),
            state=all_printable(run.state),
            steps=run.steps(),
            evals=[_evaluation(all_printable(row)) for row in run.evals()],
            comparison=_comparison(run),
            made=made,
            test_images=_test_images(run),
        )

    def conditions(self, split: str) -> list[Condition]:
        """The conditions evaluated on `split`, in order of appearance."""
        return list(dict.fromkeys(row.condition for row in self.evals if row.split == split))

    def curve(
        self, split: str, condition: Condition, column: Literal["accuracy", "loss"] = "accuracy"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a condition's evaluations on `split`; the last of a step counts."""
        points = {
            row.step: row.accuracy if column == "accuracy" else row.loss
            for row in self.evals
            if row.split == split and row.condition == condition
        }
        steps = sorted(points)
        return np.array(steps, dtype=float), np.array([points[s] for s in steps], dtype=float)

    @property
    def baseline(self) -> Condition:
        """The condition the others are compared with along the run."""
        if self.comparison:
            return replace(self.comparison.baseline, weights="trained")
        found = self.conditions("test")
        running = Condition("running")
        return running if running in found or not found else found[0]

    @property
    def recomputed(self) -> Condition | None:
        """The first recomputed statistics that the trained weights were tested under."""
        return next((c for c in self.trained if c.is_recomputed), None)

    @property
    def trained(self) -> list[Condition]:
        """The conditions of the trained weights that were tested."""
        return [c for c in self.conditions("test") if c.weights == "trained"]

    @property
    def step(self) -> int:
        return int(self.state["step"] or 0)

    def label(self, condition: Condition) -> str:
        return label(condition, self.made)


def _setup(config: Mapping[str, Any]) -> Setup:
    training = config["training"]
    decay = float(training["ema_accuracy_decay"])
    if not 0 <= decay < 1:
        raise ValueError("training.ema_accuracy_decay is not below 1")
    return Setup(
        model=str(config["model"]["name"]),
        data=described_data(config["data"]),
        seed=int(config.get("seed", 0)),
        batch_size=int(training["batch_size"]),
        ema_decay=decay,
        label_smoothing=float(training.get("label_smoothing", 0.0)),
        augmented=any(config["data"].get("augment", {}).values()),
    )


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    values = {key: value for key, value in row.items() if key != "statistics"}
    return Evaluation(condition=Condition.parse(row["statistics"]), **values)


def _test_images(run: Run) -> str | None:
    try:
        hashes = (read_json(run.path / "data.json") or {})["splits"]["test"]["hashes"]
        worse = run.config["data"].get("corruption")
        return f"{hashes} {worse}" if worse else repr(hashes)
    except (LookupError, TypeError):  # a run made before this was recorded
        return None


def _comparison(run: Run) -> Comparison | None:
    content = all_printable(run.comparison())
    if content is None:
        return None
    with naming(run.path / "comparison.json"):
        own: Weights = "best" if content.get("weights") == "best" else "trained"
        return Comparison.from_dict(content, own)
