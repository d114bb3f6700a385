"""One model under every condition asked for, on the whole test set."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from bnexp.analysis.comparison import Comparison, compare
from bnexp.analysis.layers import LayerRow
from bnexp.analysis.predictions import Predictions
from bnexp.condition import Condition, Weights
from bnexp.evaluation.layer_costs import layer_costs
from bnexp.evaluation.predictions import predict_under
from bnexp.evaluation.subject import Method, Subject
from bnexp.nn.find import batchnorm_layers, layer_eps
from bnexp.statistics import Statistics, layer_drift, recompute_statistics
from bnexp.statistics.progress import Progress

# Known already, to be computed when it is their turn, or None: every mini-batch's own.
Source = Statistics | Callable[[], Statistics] | None


@dataclass
class Evaluation:
    """Predictions by condition, the statistics they were made with, and what each took."""

    predictions: dict[Condition, Predictions] = field(default_factory=dict)
    statistics: dict[Condition, Statistics | None] = field(default_factory=dict)
    seconds: dict[Condition, float] = field(default_factory=dict)

    def __or__(self, other: Evaluation) -> Evaluation:
        """Both together, the first one's conditions first; the second wins where both have one."""
        return Evaluation(
            self.predictions | other.predictions,
            self.statistics | other.statistics,
            self.seconds | other.seconds,
        )

    def rows(self, step: int, split: str) -> list[tuple]:
        """Rows of evals.csv."""
        return [
            (step, split, str(c), found.accuracy, found.mean_loss, len(found), self.seconds[c])
            for c, found in self.predictions.items()
        ]


def sources(
    subject: Subject,
    estimates: Mapping[str, Statistics],
    *,
    methods: Sequence[Method] = (),
    batch: bool = False,
    weights: Weights = "trained",
    memory: int | str | None = None,
    progress: Progress = False,
) -> dict[Condition, Source]:
    """What `evaluate` is to try: `estimates` by name, then recomputed and batch statistics.

    `methods` to recompute by; they are part of the conditions where there are several. `weights`
    are those that the model has. A network without BN has one condition, `none`.
    """
    if not batchnorm_layers(subject.model):
        return {Condition("none", weights): Statistics()}
    found: dict[Condition, Source] = {Condition(n, weights): s for n, s in estimates.items()}
    for method in methods:
        condition = Condition("recomputed", weights, method if len(methods) > 1 else None)
        found[condition] = partial(_recompute, subject, method, memory, progress)
    if batch:
        found[Condition("batch", weights)] = None
    return found


def _recompute(
    subject: Subject, method: Method, memory: int | str | None, progress: Progress
) -> Statistics:
    return recompute_statistics(
        subject.model,
        subject.population(method),
        method=method,
        memory=memory,
        progress=progress,
        ranks=subject.ranks,
    )


def evaluate(
    subject: Subject, sources: Mapping[Condition, Source], *, fold: bool = False
) -> Evaluation:
    """Evaluate the model on all test samples with each of `sources`; time to compute counts.

    `fold`: fold BN into the convolutions before it (`bnexp.nn.folding`). The model is as before
    afterwards, also after an exception. All of `subject.ranks` call this alike, and get the same.
    """
    result = Evaluation()
    for condition, source in sources.items():
        started = time.perf_counter()
        result.statistics[condition] = source() if callable(source) else source
        result.seconds[condition] = time.perf_counter() - started
    started = time.perf_counter()
    result.predictions = predict_under(
        subject.model, lambda: subject.test(None), result.statistics, fold, subject.ranks
    )
    each = (time.perf_counter() - started) / len(result.statistics)
    for condition in result.seconds:
        result.seconds[condition] += each
    return result


def compare_evaluation(
    subject: Subject,
    evaluation: Evaluation,
    made: Mapping[str, str],
    *,
    layer_cost_samples: int = 2000,
    layer_cost_layers: int = 20,
) -> Comparison:
    """The paired comparison with the first condition as baseline, and how single layers differ.

    Every other statistics of the baseline's weights, which `subject.model` has, get their drift by
    layer. For recomputed ones also: what mending one layer alone does, and what spoiling one layer
    alone does where all others are mended, on `layer_cost_samples` test samples. That takes two
    passes over these per layer, and is done for the `layer_cost_layers` layers that are furthest
    off. `made` as in `bnexp.condition.label`.
    """
    baseline, *others = evaluation.predictions
    reference = evaluation.statistics[baseline]
    eps = layer_eps(subject.model)
    layers: dict[Condition, list[LayerRow]] = {}
    for condition in others:
        statistics = evaluation.statistics[condition]
        if reference is None or statistics is None or condition.weights != baseline.weights:
            continue
        drift = layer_drift(reference, statistics, eps)
        mended, spoiled = {}, {}
        if condition.is_recomputed:
            tried = [row.name for row in drift[:layer_cost_layers]]
            costs = partial(
                layer_costs,
                subject.model,
                partial(subject.test, layer_cost_samples),
                names=tried,
                ranks=subject.ranks,
            )
            mended = costs(statistics=reference, other=statistics)
            spoiled = costs(statistics=statistics, other=reference)
        layers[condition] = [
            LayerRow(**asdict(row), mended=mended.get(row.name), spoiled=spoiled.get(row.name))
            for row in drift
        ]
    return compare(evaluation.predictions, baseline, subject.classes, made=made, layers=layers)
