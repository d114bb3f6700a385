"""Statistics of another domain, pulled towards those of the training data."""

from __future__ import annotations

import math

from bnexp.errors import UserError
from bnexp.statistics.statistics import Statistics


def blend(
    source: Statistics, target: Statistics, prior: float, samples: int | None = None
) -> Statistics:
    """`target`, as if `prior` further samples with the statistics `source` had been among its own.

    With `n` = `samples` and `N` = `prior`, per layer and channel (Schneider et al. 2020, eq. 1-2):

        mean = N/(N+n)·mean_s + n/(N+n)·mean_t,    var = N/(N+n)·var_s + n/(N+n)·var_t

    prior=0 gives the target's own statistics, those of AdaBN (Li et al. 2016), and prior=inf the
    source's. The distance between the means adds nothing to the variance, as in the paper.

    Args:
        source: statistics the weights were trained for: running averages, say.
        target: statistics of images of the place where the model is to work.
        prior: N, in samples (images, not values per channel); from 0 to infinity.
        samples: n, how many samples `target` was computed over. Its `count` can't say: that
            counts values per channel, places within an image included. Needed unless prior is 0
            or infinite.

    Returns:
        Statistics with the target's layers and counts, in float64 on the CPU. Layers that the
        source lacks keep the target's statistics. Mutates nothing.

    Raises:
        UserError: prior is negative or no number, samples is missing or not positive, or a layer
            has another number of channels in the source.
    """
    if not prior >= 0:
        raise UserError(f"prior={prior!r} must be a number of samples from 0 upwards")
    if prior == 0:
        share = 0.0
    elif math.isinf(prior):
        share = 1.0
    elif samples is None or samples < 1:
        raise UserError("blend: say how many samples the target statistics are of: samples=...")
    else:
        share = prior / (prior + samples)
    mean, var = {}, {}
    for name in target.names:
        mean[name], var[name] = target.mean[name].double().cpu(), target.var[name].double().cpu()
        if name not in source.mean:
            continue
        if source.mean[name].shape != mean[name].shape:
            raise UserError(
                f"layer {name!r} has {source.mean[name].numel()} channels in the source and "
                f"{mean[name].numel()} in the target: they are of different models"
            )
        if share:
            mean[name] = share * source.mean[name].double().cpu() + (1 - share) * mean[name]
            var[name] = share * source.var[name].double().cpu() + (1 - share) * var[name]
    return Statistics(mean, var, dict(target.count))
