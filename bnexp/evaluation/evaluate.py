"""One trained model under every kind of statistics asked for, on a whole split."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from torch import nn

from bnexp.analysis.comparison import Comparison, compare
from bnexp.condition import NO_BATCHNORM, config_labels, is_recomputed
from bnexp.config import Config
from bnexp.data import Data, Split
from bnexp.evaluation.predictions import Predictions, evaluate, layer_costs
from bnexp.nn.find import batchnorm_layers, layer_eps
from bnexp.statistics import Statistics, layer_drift, recompute_statistics
from bnexp.statistics.progress import Progress

EXACT_CHUNK = 100
LAYER_COST_SAMPLES = 2000


def recompute_population(
    model: nn.Module,
    data: Data,
    config: Config,
    method: str | None = None,
    progress: Progress = False,
) -> Statistics:
    """Population statistics over training images as the config's `statistics.recompute` says.

    `method` replaces the config's where given. The images are the first `samples` of a fixed
    permutation; the model is untouched.
    """
    settings = config.statistics.recompute
    method = method or settings.method
    samples = min(settings.samples or len(data.train), len(data.train))
    batch_size = settings.batch_size
    if batch_size is None:
        mini_batch = config.statistics.normalization_batch or config.training.batch_size
        batch_size = EXACT_CHUNK if method == "exact" else mini_batch
    if method != "exact" and samples % batch_size == 1:
        samples -= 1  # a last mini-batch of one image has no variance of its own
    batches = PopulationBatches(data.train, batch_size, samples, settings.augment)
    return recompute_statistics(
        model, batches, method=method, memory=settings.memory, progress=progress
    )


@dataclass(frozen=True)
class PopulationBatches:
    """The training images that population statistics are computed over, in batches."""

    split: Split
    batch_size: int
    samples: int
    augment: bool

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self):
        return self.split.batches(self.batch_size, samples=self.samples, augment=self.augment)


@dataclass
class Assessment:
    """Predictions by kind of statistics, the statistics themselves, and what each took."""

    predictions: dict[str, Predictions] = field(default_factory=dict)
    statistics: dict[str, Statistics | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def rows(self, step: int, split: str) -> list[tuple]:
        """Rows of evals.csv."""
        return [
            (step, split, kind, found.accuracy, found.mean_loss, len(found), self.seconds[kind])
            for kind, found in self.predictions.items()
        ]


def assess(
    model: nn.Module,
    split: Split,
    config: Config,
    statistics: Mapping[str, Statistics | Callable[[], Statistics] | None],
    prefix: str = "",
) -> Assessment:
    """Evaluate `model` on the whole `split` under each of `statistics`.

    A value is `Statistics`, a function that computes them (its time counts), or None for
    mini-batch statistics. `prefix` goes before the kinds' names. The batch size and whether BN is
    folded are the config's.
    """
    result = Assessment()
    for kind, source in statistics.items():
        started = time.perf_counter()
        result.statistics[prefix + kind] = source() if callable(source) else source
        result.seconds[prefix + kind] = time.perf_counter() - started
    started = time.perf_counter()
    result.predictions = evaluate(
        model,
        lambda: split.batches(config.test.batch_size),
        result.statistics,
        config.performance.fold_batchnorm,
    )
    each = (time.perf_counter() - started) / len(result.statistics)
    for kind in result.seconds:
        result.seconds[kind] += each
    return result


def kinds_to_assess(
    model: nn.Module,
    data: Data,
    config: Config,
    estimated: Mapping[str, Statistics],
    wanted: Sequence[str],
    methods: Sequence[str] = (),
    progress: Progress = False,
) -> dict[str, Statistics | Callable[[], Statistics] | None]:
    """What `assess` is to try: the online estimates, then `recomputed` and `batch` if wanted.

    `estimated` maps `running` and the further estimators to their statistics. With several
    `methods`, recomputed statistics are named `recomputed/<method>`.
    """
    if not batchnorm_layers(model):
        return {NO_BATCHNORM: Statistics(mean={}, var={}, count={})}
    kinds: dict = dict(estimated)
    if "recomputed" in wanted:
        methods = list(methods) or [config.statistics.recompute.method]
        for method in methods:
            name = "recomputed" if len(methods) == 1 else f"recomputed/{method}"
            kinds[name] = lambda method=method: recompute_population(
                model, data, config, method, progress
            )
    if "batch" in wanted:
        kinds["batch"] = None
    return kinds


def merge(first: Assessment, second: Assessment) -> Assessment:
    """Both together, the first one's kinds first; the second wins where both have a kind."""
    return Assessment(
        first.predictions | second.predictions,
        first.statistics | second.statistics,
        first.seconds | second.seconds,
    )


def compare_assessment(
    assessment: Assessment, model: nn.Module, data: Data, config: Config
) -> Comparison:
    """The paired comparison with the first kind as baseline, and how single layers differ.

    Every other kind of statistics of `model` gets its drift by layer; the recomputed ones also
    what exchanging one layer's statistics alone does on `LAYER_COST_SAMPLES` test images.
    """
    baseline, *others = assessment.predictions
    reference = assessment.statistics[baseline]
    batch_size = config.test.batch_size
    layers = {}
    for kind in others:
        statistics = assessment.statistics[kind]
        of_averaged_weights = "/" in kind and not is_recomputed(kind)
        if statistics is None or of_averaged_weights:
            continue
        drift = [asdict(row) for row in layer_drift(reference, statistics, layer_eps(model))]
        if is_recomputed(kind):
            costs = layer_costs(
                model,
                lambda: data.test.batches(batch_size, samples=LAYER_COST_SAMPLES),
                reference,
                statistics,
            )
            by_name = {cost.name: asdict(cost) for cost in costs}
            drift = [{**row, **by_name[row["name"]]} for row in drift]
        layers[kind] = drift
    labels = config_labels(config.model_dump(mode="json"))
    labels[NO_BATCHNORM] = "a network without batch normalization"
    labels |= {f"{name}/{NO_BATCHNORM}": f"{name.upper()} weights" for name in ("ema", "swa")}
    return compare(
        assessment.predictions, baseline, data.info.classes, labels=labels, layers=layers
    )
