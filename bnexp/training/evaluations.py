"""The evaluations of a training: along the way, at its end, and of its averaged weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from bnexp.analysis.comparison import Comparison
from bnexp.errors import NotFinite, RunFailed
from bnexp.evaluation.evaluate import (
    Assessment,
    assess,
    compare_assessment,
    kinds_to_assess,
    merge,
)
from bnexp.training.averages import with_parameters
from bnexp.training.build import Training, autocast
from bnexp.training.checkpoints import load_checkpoint
from bnexp.training.display import Display
from bnexp.training.logs import Logs
from bnexp.training.state import load_weights


class Evaluations:
    """Evaluates a training's model as its config says, and keeps what the comparison needs."""

    def __init__(self, training: Training, logs: Logs, display: Display) -> None:
        self._training = training
        self._logs = logs
        self._display = display
        self._found = Assessment()
        self._averaged = Assessment()

    def evaluate(self, final: bool = False) -> float | None:
        """The model under every kind of statistics asked for, and recomputed ones if `final`;
        rows go into evals.csv. What the best is chosen by, larger being better, comes back."""
        training, config, model = self._training, self._training.config, self._training.state.model
        data, step = training.data, training.state.step
        with autocast(config, training.device), self._diverged_if_not_finite():
            kinds = self._kinds(model, list(config.test.statistics) + ["recomputed"] * final)
            baseline = next(iter(kinds))
            only_baseline = {baseline: kinds[baseline]}
            self._found = found = assess(model, data.test, config, kinds)
            rows = found.rows(step, "test")
            metric = found.predictions[baseline].accuracy
            if config.test.train_accuracy:
                rows += assess(model, data.train, config, only_baseline).rows(step, "train")
            if data.val is not None:
                on_val = assess(model, data.val, config, only_baseline)
                rows += on_val.rows(step, "val")
                predictions = on_val.predictions[baseline]
                stopping = config.training.early_stopping
                by_loss = stopping and stopping.metric == "val_loss"
                metric = -predictions.mean_loss if by_loss else predictions.accuracy
        self._logs.evaluation(rows, found, config.model.eps)
        self._display.test_accuracy(found.predictions[baseline].accuracy, step)
        return metric if math.isfinite(metric) else None

    def evaluate_averages(self) -> None:
        """Averaged weights with recomputed statistics and, to show why, the trained model's."""
        training, state = self._training, self._training.state
        for name, average in state.averages.items():
            if not average.count:
                self._display.line(f"no {name} weights were averaged: the run ended too early")
                continue
            model = with_parameters(state.model, average.average)
            with autocast(training.config, training.device), self._diverged_if_not_finite():
                kinds = self._kinds(model, ["recomputed"])
                if state.tracker:
                    kinds = {kind: kinds[kind] for kind in ("recomputed", "running")}
                found = assess(model, training.data.test, training.config, kinds, prefix=f"{name}/")
            self._averaged = merge(self._averaged, found)

    def evaluate_best(self, checkpoints: Path) -> None:
        """Take the weights of the best evaluation, and evaluate these instead of the last."""
        training, state = self._training, self._training.state
        load_weights(state.model, state.tracker, load_checkpoint(checkpoints / "best.pt"))
        wanted = [*training.config.test.statistics, "recomputed"]
        with autocast(training.config, training.device):
            kinds = self._kinds(state.model, wanted)
            self._found = assess(state.model, training.data.test, training.config, kinds)

    def compare(self) -> Comparison:
        """All that was evaluated last, against the running averages."""
        training = self._training
        found = merge(self._found, self._averaged)
        with autocast(training.config, training.device):
            return compare_assessment(found, training.state.model, training.data, training.config)

    def _kinds(self, model: nn.Module, wanted: Sequence[str]) -> dict:
        training = self._training
        return kinds_to_assess(
            model, training.data, training.config, training.state.estimates(), wanted
        )

    @contextlib.contextmanager
    def _diverged_if_not_finite(self) -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            raise RunFailed(
                f"diverged: at step {self._training.state.step} with learning rate "
                f"{self._logs.lr:.3g} the activations are no longer finite ({error}); "
                "lower training.optimizer.lr"
            ) from None
