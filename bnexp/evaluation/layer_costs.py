"""What exchanging the statistics of one BN layer alone does to the predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from bnexp.analysis.layers import LayerCost, layer_cost
from bnexp.evaluation.predictions import predict_under
from bnexp.evaluation.subject import Batches
from bnexp.ranks import Alone, Ranks
from bnexp.statistics import Statistics


def layer_costs(
    model: nn.Module,
    make_batches: Callable[[], Batches],
    statistics: Statistics,
    other: Statistics,
    names: Sequence[str],
    ranks: Ranks = Alone(),
) -> dict[str, LayerCost]:
    """Swap the statistics of one of the named layers for `other`'s at a time: a pass each, and one.

    What it costs by name, against `statistics` in all layers. The differences need not add
    up to that of exchanging all layers at once: each layer's statistics were made for inputs that
    the layers below had normalized with theirs. Limit `make_batches` to some
    thousand samples where passes are dear. `ranks` as in `predict_under`.
    """
    kinds: dict[str, Statistics | None] = {"": statistics}
    for name in names:
        kinds[name] = replace(
            statistics,
            mean={**statistics.mean, name: other.mean[name]},
            var={**statistics.var, name: other.var[name]},
        )
    predictions = predict_under(model, make_batches, kinds, ranks=ranks)
    reference = predictions.pop("")
    return {name: layer_cost(reference, swapped) for name, swapped in predictions.items()}
