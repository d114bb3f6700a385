"""What is wrong with a model's BN statistics, in words: one function per kind of fault.

Each looks at plain numbers gathered elsewhere (`bnexp.auditing`) and says nothing where it
finds nothing. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

# A share of their initial values that averages still hold is worth saying from here on.
INITIAL_SHARE = 0.01
# Where the decay isn't known to be the one of training, a share of the initial values is inferred
# from the averages themselves if it explains so much of their distance from the population.
SHARE_EXPLAINS = 0.8
# And so much of it in the median layer.
HALF = 0.5
# A running variance below this is that of a channel which never changes.
DEAD = 1e-12
# A running variance this many times the population's is of values that training met and left.
HUGE = 1e3
# Distances count as beyond noise from so many times the noise expected, and from these sizes on:
# in standard deviations for means, in logarithms for variances.
NOISE_FACTOR = 3.0
MEAN_OFF, LOG_VAR_OFF = 0.05, 0.1
# Where no cost can be shown, only statistics as far off as this (in standard deviations, or half
# logarithms of variance ratios) are worth a finding.
FAR_OFF = 0.5
# The first layers count as off by themselves where they are at least this share as far off as the
# median layer; averages that lag are off by more with depth.
FIRST_SHARE = 0.5
SIGNIFICANT = 0.05
# What is looked at besides the conditions counts from this p-value on: nobody asked for it.
BY_THE_WAY = 0.01
# Batch statistics "much" better than both others: by this share of samples at least, or by what
# doesn't count as close among other scores.
MUCH = 0.01


@dataclass(frozen=True)
class Gain:
    """How much better one condition scores than another on the same samples: the difference, its
    95 % interval and the p-value of the paired test. A difference below `close` doesn't matter,
    however certain it is: among real-valued scores the smallest shift of all is certain."""

    difference: float
    low: float
    high: float
    p: float
    close: float = 0.0

    def matters(self, level: float) -> bool:
        return self.p < level and abs(self.difference) >= self.close

    @property
    def better(self) -> bool:
        return self.matters(SIGNIFICANT) and self.difference > 0

    @property
    def worse(self) -> bool:
        return self.matters(SIGNIFICANT) and self.difference < 0


@dataclass(frozen=True, eq=False)
class Values:
    """A number per channel about the mean and one about the variance, float64 (channels,)."""

    mean: np.ndarray
    var: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.mean) & np.isfinite(self.var)


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """What is known of one BN layer.

    momentum: PyTorch's, 1 - decay; None for a cumulative average. tracked: mini-batches the layer
    has counted, None where it keeps no count. running: its running averages, None where it keeps
    none. population: the population's statistics, None where no sample reached the layer. spread:
    the variance between samples of a sample's own mean, and of its mean squared distance from the
    population's mean; None where that wasn't measured. depth: the layer's place in the order of
    calls, None where it is never called. in_file: False where a checkpoint was read that lacks its
    running averages. used: the layer is not called, and yet its statistics change what the model
    predicts.
    """

    name: str
    eps: float
    momentum: float | None
    tracked: int | None
    running: Values | None
    population: Values | None = None
    spread: Values | None = None
    depth: int | None = None
    in_file: bool = True
    training: bool = False
    frozen: bool = False
    used: bool = False

    @property
    def as_constructed(self) -> bool:
        held = self.running
        return held is not None and not held.mean.any() and bool((held.var == 1).all())

    @property
    def initial_share(self) -> float:
        """What weight the initial 0 and 1 still have in the averages: `decay ** tracked`."""
        if self.momentum is None or not self.tracked or not 0 < self.momentum < 1:
            return 0.0
        return (1 - self.momentum) ** self.tracked


@dataclass(frozen=True)
class Distance:
    """How far a layer's running averages are from the population, and how far noise would bring
    them: root mean squares over channels, of `(mean - mean') / sqrt(var' + eps)` and of
    `log((var + eps) / (var' + eps))`. The share of the initial values is taken out before."""

    layer: LayerFacts
    mean: float
    log_var: float
    mean_noise: float
    log_var_noise: float

    @property
    def size(self) -> float:
        return max(self.mean, self.log_var / 2)

    @property
    def beyond_noise(self) -> bool:
        return (self.mean > MEAN_OFF and self.mean > NOISE_FACTOR * self.mean_noise) or (
            self.log_var > LOG_VAR_OFF and self.log_var > NOISE_FACTOR * self.log_var_noise
        )


@dataclass(frozen=True)
class Halves:
    """Statistics from two disjoint parts of the population, halves where it is small: samples in
    each, the score under each, how the second compares with the first, and the layer furthest
    apart (`size` as in `Distance`)."""

    samples: int
    scores: tuple[float, float]
    gain: Gain
    changed: int
    test_samples: int
    worst_layer: str
    worst_distance: float


@dataclass(frozen=True)
class Facts:
    """All that the findings look at. `recomputed`, `batch`: the gain over running averages, and
    `batch_over_recomputed` likewise. `other_eps`: the gain with another eps in all layers.
    `same_averages_as`: where in the file other weights have these very averages. `of_ranks`: of
    several ranks, each one's running averages by layer. `points`: scores are shares of right
    samples, so that differences are percentage points."""

    layers: Sequence[LayerFacts]
    batch_size: int
    population_samples: int
    recomputed: Gain | None = None
    batch: Gain | None = None
    batch_over_recomputed: Gain | None = None
    other_eps: tuple[float, Gain] | None = None
    same_averages_as: str | None = None
    halves: Halves | None = None
    of_ranks: Mapping[str, Sequence[Values]] = field(default_factory=dict)
    points: bool = True

    @property
    def tracking(self) -> list[tuple[LayerFacts, Values]]:
        """Layers that keep running averages, with these."""
        return [(layer, layer.running) for layer in self.layers if layer.running is not None]

    @property
    def known(self) -> list[tuple[LayerFacts, Values, Values]]:
        """Layers with running averages that samples reached: with these and the population's."""
        return [
            (layer, running, layer.population)
            for layer, running in self.tracking
            if layer.population is not None
        ]

    @cached_property
    def inferred_share(self) -> float | None:
        """The weight s of the initial 0 and 1 with which `s·initial + (1 - s)·population` fits the
        running averages of all layers best (least squares, in the population's units); None where
        that doesn't explain them. A checkpoint says how many mini-batches were averaged, and not
        with which decay."""
        x, y = [], []
        for layer, held, population in self.known:
            if not held.finite.all() or layer.as_constructed or not layer.tracked:
                continue
            scale = population.var + layer.eps
            off = [-population.mean / np.sqrt(scale), (1 - population.var) / scale]
            x.append(np.concatenate(off))
            off = [(held.mean - population.mean) / np.sqrt(scale)]
            y.append(np.concatenate([*off, (held.var - population.var) / scale]))
        if not x:
            return None
        initial, distance = np.concatenate(x), np.concatenate(y)
        if not initial.any() or not distance.any():
            return None
        share = float(initial @ distance / (initial @ initial))
        if not INITIAL_SHARE <= share < 1:
            return None
        # Other inputs may look like it in the first layer alone: it must be so in most layers.
        by_layer = [_explained(share, *both) for both in zip(x, y, strict=True)]
        if _explained(share, initial, distance) < SHARE_EXPLAINS or np.median(by_layer) < HALF:
            return None
        return share

    def share_of(self, layer: LayerFacts) -> float:
        """What weight the initial values have in a layer's averages: known from its decay, or
        inferred."""
        if layer.initial_share >= INITIAL_SHARE or not layer.tracked:
            return layer.initial_share
        return self.inferred_share or 0.0


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing: `layers` it is about, `evidence` with figures,
    `effect` on predictions, `remedy`. `harmless`: nothing predicted changes by it.
    `recomputing_helps`: None where that isn't known."""

    code: str
    layers: tuple[str, ...]
    evidence: str
    effect: str
    remedy: str
    harmless: bool = False
    recomputing_helps: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


RECOMPUTE = "Recompute the statistics (mend writes them into the checkpoint)."


def find(facts: Facts) -> tuple[Finding, ...]:
    """All findings, in the order in which to look into them."""
    found = (check(facts) for check in CHECKS)
    return tuple(finding for finding in found if finding is not None)


def in_words(facts: Facts, findings: Sequence[Finding]) -> str:
    """What the findings come to, in a sentence."""
    harmful = [finding for finding in findings if not finding.harmless]
    if harmful:
        return f"{_number(len(harmful), 'finding')} to look into: " + ", ".join(
            finding.code for finding in harmful
        )
    gain = facts.recomputed
    if gain is None:
        return "Nothing was found in the statistics themselves; there was nothing to compare with."
    change, low, high = (_difference(d, facts) for d in (gain.difference, gain.low, gain.high))
    return (
        "Nothing is wrong with your statistics; look elsewhere. Recomputing them over "
        f"{facts.population_samples:,} samples changes the score by {change} (95 % interval {low} "
        f"to {high})."
    )


# ------------------------------------------------------------------------ the buffers themselves


def not_finite(facts: Facts) -> Finding | None:
    broken = {layer: int((~held.finite).sum()) for layer, held in facts.tracking}
    bad = [layer for layer, channels in broken.items() if channels]
    if not bad:
        return None
    channels = sum(broken.values())
    return Finding(
        "not-finite",
        _names(bad),
        f"{_number(channels, 'channel')} of {_layers(bad)} have NaN or infinity in the running "
        "averages.",
        "Every prediction that passes these channels is NaN or worthless.",
        f"{RECOMPUTE} One mini-batch that overflowed is enough to spoil an average for good: look "
        "for it (float16, a learning rate that was too high, a broken image).",
        recomputing_helps=True,
    )


def as_constructed(facts: Facts) -> Finding | None:
    bad = [layer for layer in facts.layers if layer.as_constructed]
    if not bad:
        return None
    if absent := [layer for layer in bad if not layer.in_file]:
        why = f"the checkpoint has no running averages for {_layers(absent)}"
        remedy = (
            "Save model.state_dict(), which holds the buffers, not the parameters alone. "
            + RECOMPUTE
        )
    elif any(layer.momentum == 0 for layer in bad):
        why = "their momentum is 0, which keeps the old value for ever (PyTorch: 1 - decay)"
        remedy = f"Set momentum to 0.1 or the like for the next training. {RECOMPUTE}"
    elif not any(layer.tracked for layer in bad):
        why = "they have counted no mini-batch"
        remedy = (
            "Find out why they were never in training mode, or whether the checkpoint was made "
            f"from a model that was never trained. {RECOMPUTE}"
        )
    else:
        why = "they were reset after training"
        remedy = RECOMPUTE
    return Finding(
        "as-constructed",
        _names(bad),
        f"The running averages of {_layers(bad)} are mean 0 and variance 1 in every channel, as "
        f"when the layer is made: {why}.",
        _effect(facts, "These layers don't normalize at all in use, though they did in training"),
        remedy,
        recomputing_helps=True,
    )


def initial_share(facts: Facts) -> Finding | None:
    bad = [
        layer
        for layer, _ in facts.tracking
        if facts.share_of(layer) >= INITIAL_SHARE and not layer.as_constructed
    ]
    if not bad:
        return None
    worst = max(bad, key=facts.share_of)
    if worst.initial_share < INITIAL_SHARE:
        return _inferred(facts, bad, worst)
    decay = 1 - (worst.momentum or 0)
    enough = math.ceil(math.log(INITIAL_SHARE) / math.log(decay))
    return Finding(
        "initial-share",
        _names(bad),
        f"{_layers(bad)} with decay {decay:g} (momentum {worst.momentum:g}): after "
        f"{worst.tracked:,} mini-batches {100 * worst.initial_share:.1f} % of the averages is "
        f"still the initial mean 0 and variance 1; below 1 % it takes {enough:,} mini-batches.",
        _effect(facts, "The averages are pulled towards values that no data ever had"),
        f"{RECOMPUTE} For the next training take a smaller decay (a larger momentum), or averages "
        "without a memory of their start (debiased, or momentum=None).",
        recomputing_helps=True,
    )


def _inferred(facts: Facts, bad: Sequence[LayerFacts], worst: LayerFacts) -> Finding:
    share, tracked = facts.share_of(worst), worst.tracked or 0
    decay = share ** (1 / tracked)
    return Finding(
        "initial-share",
        _names(bad),
        f"The averages of {_layers(bad)} are what {100 * share:.0f} % of the initial mean 0 and "
        f"variance 1 and {100 - 100 * share:.0f} % of the population would be. They were taken "
        f"over {tracked:,} mini-batches, so that they were made with a decay of about {decay:.4g} "
        f"(momentum {1 - decay:.2g}), whatever the model is built with now.",
        _effect(facts, "The averages are pulled towards values that no data ever had"),
        f"{RECOMPUTE} For the next training take a smaller decay (a larger momentum), or averages "
        "without a memory of their start (debiased, or momentum=None).",
        recomputing_helps=True,
    )


def dead_channels(facts: Facts) -> Finding | None:
    dead = {layer.name: int((held.var < DEAD).sum()) for layer, held in facts.tracking}
    bad = {name: channels for name, channels in dead.items() if channels}
    if not bad:
        return None
    awake = sum(
        int(((held.var < DEAD) & (population.var > 100 * layer.eps)).sum())
        for layer, held, population in facts.known
    )
    evidence = (
        f"{_number(sum(bad.values()), 'channel')} of {_number(len(bad), 'layer')} have a running "
        "variance of nothing"
    )
    if awake:
        return Finding(
            "dead-channels",
            tuple(bad),
            f"{evidence}; over the population {awake} of them do vary.",
            _effect(facts, "What varies is divided by sqrt(eps) and blown up"),
            RECOMPUTE,
            recomputing_helps=True,
        )
    return Finding(
        "dead-channels",
        tuple(bad),
        f"{evidence}, and don't vary over the population either.",
        "They pass on a constant: parameters that do nothing, but no wrong predictions.",
        "Nothing to mend. They can be pruned; a smaller learning rate or less weight decay leaves "
        "fewer of them.",
        harmless=True,
    )


def huge_variance(facts: Facts) -> Finding | None:
    ratios = {
        layer.name: float(((held.var + layer.eps) / (population.var + layer.eps)).max())
        for layer, held, population in facts.known
        if held.finite.all() and not layer.as_constructed and facts.share_of(layer) < INITIAL_SHARE
    }
    bad = {name: ratio for name, ratio in ratios.items() if ratio > HUGE}
    if not bad:
        return None
    worst = max(bad, key=lambda name: bad[name])
    return Finding(
        "huge-variance",
        tuple(bad),
        f"The running variance of a channel of {worst} is {bad[worst]:,.0f} times that of the "
        f"population; {_number(len(bad), 'layer')} have such channels.",
        _effect(facts, "Such a channel is divided down to nothing"),
        f"{RECOMPUTE} A few mini-batches with huge activations are enough: look for outliers in "
        "the data and for a learning rate that was too high.",
        recomputing_helps=True,
    )


# ------------------------------------------------------------------------ against the population


def distances(facts: Facts) -> list[Distance]:
    """Of every layer with running averages that samples reached, in the order of calls."""
    found = [
        _distance(layer, held, population, facts)
        for layer, held, population in facts.known
        if held.finite.all() and not layer.as_constructed and facts.share_of(layer) < 0.99
    ]
    return sorted(found, key=lambda d: math.inf if d.layer.depth is None else d.layer.depth)


def _distance(layer: LayerFacts, held: Values, population: Values, facts: Facts) -> Distance:
    share = facts.share_of(layer)
    mean = held.mean / (1 - share)
    var = np.maximum((held.var - share) / (1 - share), 0)
    scale = population.var + layer.eps
    noise_mean = noise_log_var = 0.0
    if layer.spread is not None:
        samples = _averaged(layer) / facts.batch_size + 1 / facts.population_samples
        noise_mean = _rms(np.sqrt(samples * layer.spread.mean / scale))
        noise_log_var = _rms(np.sqrt(samples * layer.spread.var) / scale)
    return Distance(
        layer,
        _rms((mean - population.mean) / np.sqrt(scale)),
        _rms(np.log((var + layer.eps) / scale)),
        noise_mean,
        noise_log_var,
    )


def _averaged(layer: LayerFacts) -> float:
    """The variance of the running average in units of a mini-batch's: the sum of squared weights,
    `m / (2 - m)` for an exponential average with momentum m, 1/t for the mean of t."""
    if layer.momentum is None:
        return 1 / max(layer.tracked or 1, 1)
    return layer.momentum / (2 - layer.momentum)


def _off(facts: Facts) -> list[Distance]:
    """The layers whose averages are beyond noise, where that costs something or is a lot."""
    off = [
        d
        for d in distances(facts)
        if d.beyond_noise and facts.share_of(d.layer) < INITIAL_SHARE  # has a finding of its own
    ]
    gain = facts.recomputed
    matters = gain is not None and (gain.better or gain.worse)
    return off if matters or any(d.size > FAR_OFF for d in off) else []


def _first_are_off(facts: Facts) -> bool:
    """Whether the very first layer is off, and not much less than those behind it."""
    everything, off = distances(facts), _off(facts)
    if not off or everything[0] not in off:
        return False
    return everything[0].size >= FIRST_SHARE * float(np.median([d.size for d in off]))


def inputs_differ(facts: Facts) -> Finding | None:
    if not _first_are_off(facts):
        return None
    first, off = distances(facts)[0], _off(facts)
    domain = (
        "If they are, this population is another domain than the test images."
        if facts.recomputed is not None and facts.recomputed.worse
        else "If this is another domain, recomputed statistics adapt to it (AdaBN), or blend them "
        "with those of training (prior=...). If the inputs are the same, the averages lag behind "
        "the first layer's weights."
    )
    return Finding(
        "inputs-differ",
        _names([d.layer for d in off]),
        f"The very first BN layer, {first.layer.name}, is off already: {_figures(first, facts)}. "
        f"In all, {len(off)} of {len(distances(facts))} layers are.",
        _effect(facts, "The averages belong to other inputs than these"),
        "Look at the inputs first: mean and std, the range (0 to 1, or 0 to 255), RGB or BGR, size "
        f"and augmentation must be those of training. {domain}",
        recomputing_helps=_helps(facts),
    )


def lagging(facts: Facts) -> Finding | None:
    off = _off(facts)
    if not off or _first_are_off(facts):
        return None
    worst = max(off, key=lambda d: d.size)
    return Finding(
        "lagging",
        _names([d.layer for d in off]),
        f"{len(off)} of {len(distances(facts))} layers are further from the population than noise "
        f"explains, most of all {worst.layer.name}: {_figures(worst, facts)}. The first layer is "
        f"off by {distances(facts)[0].size:.2f} only.",
        _effect(facts, "The averages are of weights, or of data, that the model has left behind"),
        f"{RECOMPUTE} If they lag: a smaller decay (larger momentum), or a learning rate that ends "
        "small. If the population is not what was trained on (without augmentation, say), "
        "recomputed statistics fit the new data.",
        recomputing_helps=_helps(facts),
    )


def noisy(facts: Facts) -> Finding | None:
    gain = facts.recomputed
    if gain is None or not gain.better or _off(facts):
        return None
    others = (not_finite, as_constructed, initial_share, dead_channels, huge_variance)
    if any((found := check(facts)) and not found.harmless for check in others):
        return None
    everything = distances(facts)
    if not everything:
        return None
    worst = max(everything, key=lambda d: d.size)
    return Finding(
        "noisy",
        (worst.layer.name,),
        f"No layer is further off than this decay and mini-batches of {facts.batch_size} explain; "
        f"most {worst.layer.name}: {_figures(worst, facts)}.",
        _effect(facts, "The noise of the averages is enough to change predictions"),
        f"{RECOMPUTE} For the next training: a larger decay (smaller momentum) at the end, or "
        "larger mini-batches.",
        recomputing_helps=True,
    )


def recomputing_hurts(facts: Facts) -> Finding | None:
    gain = facts.recomputed
    if gain is None or not gain.worse:
        return None
    return Finding(
        "recomputing-hurts",
        (),
        f"With recomputed statistics the score is {_size(-gain.difference, facts)} lower "
        f"(95 % interval {_size(-gain.high, facts)} to {_size(-gain.low, facts)}).",
        "Mending would make the model worse.",
        "Don't mend. The population is probably not what the model was trained on and is tested "
        f"on, or {facts.population_samples:,} samples are too few.",
        recomputing_helps=False,
    )


# ------------------------------------------------------------------------ how layers are set up


def other_eps(facts: Facts) -> Finding | None:
    if facts.other_eps is None:
        return None
    eps, gain = facts.other_eps
    if not (gain.matters(BY_THE_WAY) and gain.difference > 0):
        return None
    return Finding(
        "eps",
        _names(facts.layers),
        f"With eps {eps:g} instead of {facts.layers[0].eps:g} in all layers the score is "
        f"{_size(gain.difference, facts)} higher (95 % interval {_size(gain.low, facts)} to "
        f"{_size(gain.high, facts)}).",
        "Channels with a small variance are scaled otherwise than in training.",
        "Build the layers with the eps of the framework the weights come from: Keras and "
        "TensorFlow 1e-3, PyTorch 1e-5.",
        recomputing_helps=None,
    )


def no_running_statistics(facts: Facts) -> Finding | None:
    bad = [layer for layer in facts.layers if layer.running is None]
    if not bad:
        return None
    return Finding(
        "no-running-statistics",
        _names(bad),
        f"No running averages in {_layers(bad)} (track_running_stats=False).",
        "In use they normalize with whatever samples share the mini-batch: a prediction depends "
        "on its neighbours, and a single sample may not work at all.",
        "Build them with track_running_stats=True and copy recomputed statistics into them.",
        recomputing_helps=None,
    )


def cumulative(facts: Facts) -> Finding | None:
    bad = [layer for layer, _ in facts.tracking if layer.momentum is None and layer.tracked]
    if not bad:
        return None
    gain = facts.recomputed
    return Finding(
        "cumulative",
        _names(bad),
        f"Averages over all {bad[0].tracked or 0:,} mini-batches since the start (momentum=None): "
        f"{_layers(bad)}.",
        _effect(facts, "Early weights count as much as the last ones"),
        f"{RECOMPUTE} For training itself, take a momentum.",
        harmless=gain is None or not gain.better,
        recomputing_helps=_helps(facts),
    )


def training_mode(facts: Facts) -> Finding | None:
    bad = [layer for layer in facts.layers if layer.training]
    if not bad or len(bad) == len(facts.layers):
        return None
    return Finding(
        "training-mode",
        _names(bad),
        f"In training mode, not so the other {len(facts.layers) - len(bad)}: {_layers(bad)}.",
        "In training mode layers normalize with the mini-batch and go on changing their averages "
        "while the model is in use. (Here all of them were judged in inference mode.)",
        "Call model.eval() after whatever switches them, before validating and before saving.",
        recomputing_helps=None,
    )


def frozen(facts: Facts) -> Finding | None:
    bad = [layer for layer in facts.layers if layer.frozen]
    if not bad:
        return None
    gain = facts.recomputed
    return Finding(
        "frozen",
        _names(bad),
        f"Frozen: {_layers(bad)}, whose averages don't follow the weights.",
        _effect(facts, "What is normalized with is what they were frozen at"),
        "Right where training normalized with them too (FrozenBN); otherwise unfreeze them, or "
        "recompute.",
        harmless=gain is None or not gain.better,
        recomputing_helps=_helps(facts),
    )


def ranks_differ(facts: Facts) -> Finding | None:
    """Averages of one rank that are further from those of the other ranks than their mini-batches
    being different explains."""
    apart = [
        (distance, rank)
        for layer in facts.layers
        if layer.name in facts.of_ranks and layer.population is not None
        for rank, distance in enumerate(_from_the_others(layer, layer.population, facts))
    ]
    beyond = [(distance, rank) for distance, rank in apart if distance.beyond_noise]
    if not beyond:
        return None
    worst, rank = max(beyond, key=lambda item: item[0].size)
    layers = list(dict.fromkeys(distance.layer.name for distance, _ in beyond))
    ranks = sorted({rank for _, rank in beyond})
    size = len(next(iter(facts.of_ranks.values())))
    figures = "which holds NaN or infinity" if math.isinf(worst.mean) else _figures(worst, facts)
    return Finding(
        "ranks-differ",
        tuple(layers),
        f"Of {size} ranks, the running averages of "
        f"{_number(len(ranks), 'rank')} ({', '.join(map(str, ranks))}) are not those of the "
        f"others, furthest at {worst.layer.name} of rank {rank}: {figures}.",
        "What a checkpoint predicts depends on the rank that wrote it; this audit is of rank 0's "
        "averages.",
        "Recompute the statistics over the samples of all ranks before writing a checkpoint, and "
        "see whether that rank has other data, or layers that don't average.",
        recomputing_helps=_helps(facts),
    )


_KINDS = ("mean", "var")


def _from_the_others(layer: LayerFacts, population: Values, facts: Facts) -> list[Distance]:
    """How far each rank's averages are from the median of all, in the population's units. Of two
    ranks, how far they are apart, for the one that is further from the population."""
    held = facts.of_ranks[layer.name]
    scale = population.var + layer.eps
    noise_mean = noise_log_var = 0.0
    if layer.spread is not None:
        # of one rank's averages and of one other's
        samples = 2 * _averaged(layer) / facts.batch_size
        noise_mean = _rms(np.sqrt(samples * layer.spread.mean / scale))
        noise_log_var = _rms(np.sqrt(samples * layer.spread.var) / scale)

    def distance(one: Values, mean: np.ndarray, var: np.ndarray) -> Distance:
        if not one.finite.all():
            return Distance(layer, math.inf, math.inf, noise_mean, noise_log_var)
        return Distance(
            layer,
            _rms((one.mean - mean) / np.sqrt(scale)),
            _rms(np.log((np.maximum(one.var, 0) + layer.eps) / (np.maximum(var, 0) + layer.eps))),
            noise_mean,
            noise_log_var,
        )

    finite = [one for one in held if one.finite.all()]
    if len(held) == len(finite) == 2:
        off = [distance(one, population.mean, population.var).size for one in held]
        worse = int(np.argmax(off))
        nothing = Distance(layer, 0.0, 0.0, noise_mean, noise_log_var)
        apart = distance(held[worse], held[1 - worse].mean, held[1 - worse].var)
        return [apart if rank == worse else nothing for rank in range(2)]
    mean, var = (np.median([getattr(one, k) for one in finite or held], axis=0) for k in _KINDS)
    return [distance(one, mean, var) for one in held]


def of_other_weights(facts: Facts) -> Finding | None:
    if facts.same_averages_as is None:
        return None
    gain = facts.recomputed
    return Finding(
        "of-other-weights",
        _names([layer for layer, _ in facts.tracking]),
        f"The running averages are bit for bit those of the weights under "
        f"{facts.same_averages_as!r} in the same file, which are others.",
        _effect(facts, "Averages taken with one set of weights normalize for another"),
        "Averaged weights need statistics of their own: recompute them after averaging (what "
        "torch.optim.swa_utils.update_bn is for).",
        harmless=gain is not None and not gain.better,
        recomputing_helps=_helps(facts),
    )


def depends_on_batch(facts: Facts) -> Finding | None:
    batch, over = facts.batch, facts.batch_over_recomputed
    if batch is None or over is None or not (batch.better and over.better):
        return None
    if min(batch.low, over.low) < (batch.close or MUCH):
        return None
    return Finding(
        "depends-on-batch",
        (),
        f"With every mini-batch's own statistics the score is {_size(batch.difference, facts)} "
        f"higher than with running averages and {_size(over.difference, facts)} higher than with "
        f"recomputed statistics (at least {_size(over.low, facts)}).",
        "The network has learned to use what shares its mini-batch; no fixed statistics can give "
        "it that.",
        "Recomputing doesn't help. Train with larger or better mixed mini-batches (shuffle, no "
        "batches of one class or one scene), with SyncBatchNorm over several devices, or finish "
        "training with frozen statistics.",
        recomputing_helps=False,
    )


def unreached(facts: Facts) -> Finding | None:
    bad = [layer for layer in facts.layers if layer.depth is None and not layer.used]
    if not bad or len(bad) == len(facts.layers):
        return None
    return Finding(
        "unreached",
        _names(bad),
        f"No sample reached {_layers(bad)}.",
        "They take no part in these predictions: heads that only train, branches not taken.",
        "Nothing to mend, unless they should have been reached.",
        harmless=True,
    )


def used_uncalled(facts: Facts) -> Finding | None:
    bad = [layer for layer in facts.layers if layer.used]
    if not bad:
        return None
    return Finding(
        "used-uncalled",
        _names(bad),
        f"Never called: {_layers(bad)}, whose running averages change what the model predicts all "
        "the same: some code reads them directly (fused or folded layers).",
        "Nothing that goes through the layers can recompute them: their statistics are as they "
        "were.",
        "Judge the model in a form that calls its layers, or pass forward=... that does.",
        recomputing_helps=None,
    )


def halves_differ(facts: Facts) -> Finding | None:
    halves = facts.halves
    if halves is None or not halves.gain.matters(BY_THE_WAY):
        return None
    return Finding(
        "too-few-samples",
        (halves.worst_layer,),
        f"Statistics from two disjoint parts of {halves.samples:,} samples score "
        f"{_value(halves.scores[0], facts)} and {_value(halves.scores[1], facts)} "
        f"({halves.changed:,} of {halves.test_samples:,} samples fare otherwise); furthest apart "
        f"is {halves.worst_layer}, by {halves.worst_distance:.3f}.",
        "The recomputed statistics themselves depend on which samples they are from.",
        "Recompute over more samples.",
        recomputing_helps=None,
    )


CHECKS: tuple[Callable[[Facts], Finding | None], ...] = (
    not_finite,
    as_constructed,
    no_running_statistics,
    used_uncalled,
    initial_share,
    of_other_weights,
    ranks_differ,
    other_eps,
    inputs_differ,
    lagging,
    huge_variance,
    noisy,
    depends_on_batch,
    recomputing_hurts,
    halves_differ,
    training_mode,
    frozen,
    cumulative,
    dead_channels,
    unreached,
)


# ------------------------------------------------------------------------ words


def _explained(share: float, initial: np.ndarray, distance: np.ndarray) -> float:
    """What part of a distance (squared) a share of the initial values accounts for."""
    left = distance - share * initial
    return 1 - float(left @ left / max(distance @ distance, 1e-30))


def _names(layers: Sequence[LayerFacts]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _number(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _layers(layers: Sequence[LayerFacts]) -> str:
    return f"layer {layers[0].name}" if len(layers) == 1 else f"{len(layers)} layers"


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _helps(facts: Facts) -> bool | None:
    gain = facts.recomputed
    return None if gain is None or not gain.matters(SIGNIFICANT) else gain.better


def _effect(facts: Facts, what: str) -> str:
    gain = facts.recomputed
    if gain is None:
        return f"{what}."
    if gain.better:
        return (
            f"{what}; against recomputed statistics that costs {_size(gain.difference, facts)} "
            f"(95 % interval {_size(gain.low, facts)} to {_size(gain.high, facts)})."
        )
    if gain.worse:
        return f"{what}; recomputed statistics do worse all the same."
    shown = (
        "no cost can be shown" if gain.p >= SIGNIFICANT else "no cost worth speaking of is there"
    )
    return (
        f"{what}; {shown} on these samples (95 % interval "
        f"{_difference(gain.low, facts)} to {_difference(gain.high, facts)})."
    )


def _figures(distance: Distance, facts: Facts) -> str:
    d = distance
    return (
        f"means off by {d.mean:.2f} standard deviations (noise: {d.mean_noise:.2f}), variances by "
        f"a factor of {math.exp(d.log_var):.2f} (noise: {math.exp(d.log_var_noise):.2f}; assuming "
        f"mini-batches of {facts.batch_size} in training)"
    )


def _value(score: float, facts: Facts) -> str:
    return f"{100 * score:.2f} %" if facts.points else f"{score:.4g}"


def _size(difference: float, facts: Facts) -> str:
    text = f"{100 * difference:.2f} points" if facts.points else f"{difference:.3g}"
    return text.replace("-", "−")


def _difference(difference: float, facts: Facts) -> str:
    text = f"{100 * difference:+.2f} points" if facts.points else f"{difference:+.3g}"
    return text.replace("-", "−")
