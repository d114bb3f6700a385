"""The evaluations of a training: along the way, at its end, and of its averaged weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from bnexp.analysis.comparison import Comparison
from bnexp.analysis.predictions import Predictions
from bnexp.condition import Condition, Weights, made_by
from bnexp.data import Split
from bnexp.errors import Diverged, NotFinite
from bnexp.evaluation.evaluate import Evaluation, Source, compare_evaluation, evaluate
from bnexp.training.averages import with_parameters
from bnexp.training.build import Training, autocast
from bnexp.training.display import Display
from bnexp.training.logs import Logs
from bnexp.training.state import load_weights
from bnexp.training.subject import run_sources, run_subject


class Evaluations:
    """Evaluates a training's model as its config says, and keeps what the comparison needs."""

    def __init__(self, training: Training, logs: Logs, display: Display) -> None:
        self._training = training
        self._logs = logs
        self._display = display
        self._own = Evaluation()
        self._averaged = Evaluation()

    def evaluate(self, final: bool = False) -> float | None:
        """The model under every condition asked for, and recomputed statistics if `final`; rows
        go into evals.csv. What the best is chosen by, larger being better, comes back; None where
        nothing is to choose by."""
        training, config, model = self._training, self._training.config, self._training.state.model
        data, step = training.data, training.state.step
        with self._inference():
            sources = self._sources(model, recompute=final)
            baseline = next(iter(sources))
            only_baseline = {baseline: sources[baseline]}
            self._own = found = self._evaluate(model, sources)
            rows = found.rows(step, "test")
            on_test = found.predictions[baseline].accuracy
            metric = on_test if config.checkpoints.best == "best-on-test" else None
            if config.test.train_accuracy:
                rows += self._evaluate(model, only_baseline, data.train).rows(step, "train")
            if data.val is not None:
                on_val = self._evaluate(model, only_baseline, data.val)
                rows += on_val.rows(step, "val")
                if config.checkpoints.best == "best":
                    metric = self._metric(on_val.predictions[baseline])
        self._logs.evaluation(rows, found, config.model.eps)
        self._display.test_accuracy(on_test, step)
        return metric if metric is not None and math.isfinite(metric) else None

    def _metric(self, on_val: Predictions) -> float:
        stopping = self._training.config.training.early_stopping
        by_loss = stopping is not None and stopping.metric == "val_loss"
        return -on_val.mean_loss if by_loss else on_val.accuracy

    def evaluate_averages(self) -> None:
        """Averaged weights with recomputed statistics and, to show why, the trained model's."""
        state = self._training.state
        for name, average in state.averages.items():
            if not average.count:
                self._display.line(f"no {name} weights were averaged: the run ended too early")
                continue
            model = with_parameters(state.model, average.average)
            with self._inference():
                sources = self._sources(model, recompute=True, weights=name)
                if state.tracker:
                    shown = (Condition("recomputed", name), Condition("running", name))
                    sources = {condition: sources[condition] for condition in shown}
                self._averaged |= self._evaluate(model, sources)

    def evaluate_best(self, kept: Mapping[str, Any]) -> None:
        """Take the weights of the best evaluation, out of what a checkpoint kept of it, and
        evaluate these instead of the last."""
        state = self._training.state
        load_weights(state.model, state.tracker, kept)
        with self._inference():
            sources = self._sources(state.model, recompute=True, weights="best")
            self._own = self._evaluate(state.model, sources)

    def compare(self) -> Comparison:
        """All that was evaluated last, against the running averages."""
        training, config = self._training, self._training.config
        ranks = training.processes.ranks
        subject = run_subject(training.state.model, training.data, config, ranks=ranks)
        made = made_by(config.model_dump(mode="json"))
        with autocast(config, training.device):
            return compare_evaluation(subject, self._own | self._averaged, made)

    def _sources(
        self, model: nn.Module, recompute: bool, weights: Weights = "trained"
    ) -> dict[Condition, Source]:
        training, wanted = self._training, self._training.config.test.statistics
        own = weights in ("trained", "best")
        return run_sources(
            run_subject(model, training.data, training.config, ranks=training.processes.ranks),
            training.state.estimates(),
            training.config,
            recompute=recompute or "recomputed" in wanted,
            batch=own and "batch" in wanted,
            weights=weights,
        )

    def _evaluate(
        self, model: nn.Module, sources: Mapping[Condition, Source], split: Split | None = None
    ) -> Evaluation:
        training, config = self._training, self._training.config
        ranks = training.processes.ranks
        subject = run_subject(model, training.data, config, split, ranks)
        return evaluate(subject, sources, fold=config.performance.fold_batchnorm)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """As the training computes; Diverged where it has by then."""
        try:
            with autocast(self._training.config, self._training.device):
                yield
        except NotFinite as error:
            raise Diverged(
                f"diverged: at step {self._training.state.step} with learning rate "
                f"{self._logs.lr:.3g} the activations are no longer finite ({error}); "
                "lower training.optimizer.lr"
            ) from None
