"""Judging a finished model: what its running averages cost, what is wrong, and mending it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from bnexp.analysis.comparison import Comparison, compare
from bnexp.analysis.findings import (
    SIGNIFICANT,
    Facts,
    Finding,
    Gain,
    Halves,
    Values,
    find,
    in_words,
)
from bnexp.analysis.layers import LayerCost, LayerRow
from bnexp.analysis.results import Paired
from bnexp.analysis.sample_curve import CurvePoint
from bnexp.analysis.scores import close_scores, compare_scores, gain
from bnexp.analysis.words import capital
from bnexp.condition import Condition
from bnexp.errors import UserError
from bnexp.evaluation.attribution import Attribution, attribute
from bnexp.evaluation.enough import Enough
from bnexp.evaluation.layer_facts import Modes, layer_facts
from bnexp.evaluation.scoring import (
    Alike,
    FirstSamples,
    Forward,
    Score,
    Scores,
    Setting,
    Task,
    other_eps,
    scores_under,
)
from bnexp.evaluation.subsets import Batches
from bnexp.nn.find import batchnorm_layers, layer_eps, original_module, without_layers
from bnexp.ranks import Ranks, choose_ranks
from bnexp.statistics import (
    METHODS,
    Statistics,
    batch_statistics,
    layer_drift,
    recompute_statistics,
    running_statistics,
)
from bnexp.statistics.blend import blend
from bnexp.statistics.forward import NeededAgain, device_of
from bnexp.statistics.progress import Progress
from bnexp.statistics.recompute import Method

if TYPE_CHECKING:
    from bnexp.report.audit_table import Form

# What is looked at besides the conditions is to cost about a fifth of these, so that some of the
# samples must do, evenly spread: of the test set for the attribution and for a curve,
LOOK_SAMPLES = 1000
# for single layers, another eps and two parts of the population, and of the population for each
# part: so many, or this share of them all,
CLOSER_SAMPLES, CLOSER_SHARE = 256, 1 / 16
# and of the population for how far samples differ.
SPREAD_SAMPLES = 128
# Layers whose statistics are exchanged for real.
EXCHANGED = 3
# Another eps is tried on more samples if its gain on a few has such a p-value.
WORTH_TRYING = 0.2
# The eps of PyTorch and of Keras: layers with one are tried with the other.
EPS = {1e-5: 1e-3, 1e-3: 1e-5}

T = TypeVar("T")

RUNNING, BATCH, NONE = Condition("running"), Condition("batch"), Condition("none")
BLENDED = Condition("blended")


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found out about a model.

    comparison: the score under each condition, running averages first, with rows about layers.
    findings: what is wrong or worth knowing, in the order in which to look into it.
    statistics: by condition: "running", "recomputed" (or "recomputed/<method>").
    summary: what the findings come to, in a sentence.
    attribution: which layers and channels a difference of losses hangs on; None where no loss can
        be differentiated.
    halves: how far statistics from two disjoint parts of the population are apart; None for less
        than two batches.
    curve: the score by the number of samples recomputed from, if that was asked for.
    population_samples: samples that statistics were recomputed from.
    """

    comparison: Comparison
    findings: tuple[Finding, ...]
    statistics: dict[str, Statistics]
    summary: str
    attribution: Attribution | None = None
    halves: Halves | None = None
    population_samples: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()

    @property
    def verdict(self) -> str:
        return self.comparison.verdict.text

    def to_dict(self) -> dict[str, Any]:
        """What findings.json holds; the comparison is comparison.json."""
        attribution = self.attribution
        return {
            "summary": self.summary,
            "findings": [finding.to_dict() for finding in self.findings],
            "population_samples": self.population_samples,
            "attribution": None
            if attribution is None
            else {
                "difference": attribution.difference,
                "explained": attribution.explained,
                "samples": attribution.samples,
                "layers": {layer.name: layer.loss for layer in attribution.layers},
                "channels": {
                    layer.name: layer.channels.tolist() for layer in attribution.worst(EXCHANGED)
                },
            },
            "halves": None if self.halves is None else asdict(self.halves),
            "curve": [asdict(point) for point in self.curve],
            "seconds": self.seconds,
        }

    def mend(self, model: nn.Module, *, force: bool = False) -> None:
        """Copy the recomputed statistics into the running averages of `model`.

        With several methods, those of the first; with a prior, the blended ones. Raises UserError
        where there are none, where a finding says that recomputing does not help (unless `force`),
        and where the model has other layers.
        """
        self.mended(force=force).copy_to(model)

    def mended(self, *, force: bool = False) -> Statistics:
        """The statistics that `mend` writes; UserError as there."""
        written = ("blended", *(n for n in self.statistics if n.startswith("recomputed")))
        name = next((n for n in written if n in self.statistics), None)
        if name is None:
            raise UserError("nothing was recomputed, so there is nothing to mend with")
        against = [f.code for f in self.findings if f.recomputing_helps is False]
        if against and not force:
            raise UserError(
                f"not mended: {', '.join(against)} says that recomputing does not help; force=True "
                "(--force) does it all the same"
            )
        return self.statistics[name]

    def report(self, path: str | os.PathLike) -> None:
        """Write a self-contained HTML page, atomically."""
        from bnexp.atomic import write_atomically
        from bnexp.report.audit_page import render

        write_atomically(Path(path), render(self.comparison, self.to_dict()))

    def save(self, folder: str | os.PathLike) -> None:
        """Write the audit's record, made whole or not at all. UserError if `folder` exists."""
        from bnexp.records.audit import write_audit
        from bnexp.report.audit_page import render

        folder, findings = Path(folder), self.to_dict()
        write_audit(
            folder,
            comparison=self.comparison.to_dict(),
            findings=findings,
            statistics=self.statistics,
            page=render(self.comparison, findings, title=folder.name),
        )

    def __str__(self) -> str:
        from bnexp.report.audit_table import PLAIN

        return self._text(PLAIN)

    def markdown(self) -> str:
        """What `print` shows, as Markdown: for a pull request, or the summary of a pipeline."""
        from bnexp.report.audit_table import MARKDOWN

        return self._text(MARKDOWN)

    def _text(self, form: Form) -> str:
        from bnexp.report.audit_table import as_text

        return as_text(
            self.comparison,
            self.findings,
            self.summary,
            self.attribution,
            self.halves,
            self.population_samples,
            self.curve,
            form,
        )

    def _repr_html_(self) -> str:
        from bnexp.report.audit_page import render_part

        return render_part(self.comparison, self.to_dict())


def audit(
    model: nn.Module,
    population: Iterable,
    test: Iterable,
    *,
    methods: Sequence[Method] = ("exact",),
    batch: bool = False,
    score: Score | None = None,
    classes: Sequence[str] | None = None,
    forward: Forward | None = None,
    samples: int | None = 10_000,
    memory: int | float | str | None = None,
    device: torch.device | str | None = None,
    ranks: Ranks | None = None,
    progress: Progress = False,
    prior: float | None = None,
    curve: bool = False,
    score_name: str | None = None,
    not_in_file: Sequence[str] = (),
    same_averages_as: str | None = None,
) -> Audit:
    """Judge the running averages of a model's BN layers against the population's statistics.

    The model, in inference mode, is scored on the same test samples with its running averages,
    with statistics recomputed from the population, and on request with every mini-batch's own.
    Then its layers are looked at: what is wrong with them, which of them a difference hangs on,
    and whether the population was large enough.

    Args:
        model: any module with BN layers of `torch.nn` or bnexp. As before afterwards.
        population: batches to recompute from, as in training (`recompute_statistics`); any
            iterable that can be gone through again: a DataLoader, a list, not a generator. Labels
            are not looked at. The size of its first batch is taken for that of training.
        test: batches with labels, likewise.
        methods: how to recompute (`recompute_statistics`); findings are about the first.
        batch: also score with every mini-batch's own statistics, in the test batches as they are.
        score: `score(output, batch)` gives a tensor (N,), higher being better: 0 or 1, or real
            numbers. None: whether the most probable class is right. Where it can be differentiated
            by the output it also serves as (negative) loss for the attribution.
        classes: names of the classes.
        forward: `forward(model, batch)` gives the output, for batches that are not a tensor or
            start with one, or dicts with an image. Tensors are on the device.
        samples: at most about so many of the population (whole batches); None: all.
        memory, device, progress: as in `recompute_statistics`.
        ranks: `bnexp.TorchRanks()`: the ranks of a process group share the work, and all get the
            same audit, but for `seconds`. All are given the same population and test (no
            DistributedSampler; a DataLoader that shuffles by torch's random numbers is given rank
            0's state of these), and go through all of it. The running averages are those of rank
            0, and a finding says where others differ. In a process group of several ranks it must
            be chosen.
        prior: also blend the recomputed statistics with the running averages, as if these were
            those of so many further samples (`blend`): for populations of another domain. 0 is
            AdaBN. Mending then writes the blended ones.
        curve: also score with statistics of less and less of the population, down to one batch, on
            about 1,000 test samples. Recomputing them takes one and a half times what recomputing
            from all does.
        score_name: what the score is called in sentences.
        not_in_file: BN layers whose averages the model's checkpoint lacked.
        same_averages_as: other weights in the checkpoint that have these very averages.

    Raises:
        UserError: batches that can be gone through once only, no samples, or whatever
            `recompute_statistics` says.
    """
    ranks = choose_ranks(ranks, "an audit")
    model = original_module(model)
    for name, batches in (("population", population), ("test", test)):
        if isinstance(batches, Iterator):
            raise UserError(f"{name} is an iterator, which ends after one pass: give a list or a "
                            "DataLoader")  # fmt: skip
    if samples is not None and samples < 1:
        raise UserError(f"samples={samples!r} must be a number of samples from 1 upwards")
    if not methods:
        raise UserError(f"name a method to recompute with: {', '.join(METHODS)}")
    if unknown := [m for m in methods if m not in METHODS]:
        raise UserError(f"method {unknown[0]!r} is unknown: choose {', '.join(METHODS)}")
    device = torch.device(device) if device is not None else device_of(model)
    task = Task(device, forward, score, ranks, len(classes) if classes else None)
    words = score_name or ("accuracy" if score is None else "score")
    # A DataLoader draws from torch's generator whenever it is gone through.
    with ranks.together("an audit"), torch.random.fork_rng([]):
        torch.set_rng_state(ranks.broadcast(torch.get_rng_state(), "the random numbers"))
        judge = _Judge(
            model,
            Batches(population, "population"),
            Batches(test, "test", paired=True),
            task,
            words,
            classes,
            samples,
            memory,
        )
        if not batchnorm_layers(model):
            return judge.without_batchnorm()
        return judge.judged(methods, batch, progress, prior, curve, not_in_file, same_averages_as)


@dataclass
class _Judge:
    model: nn.Module
    population: Batches
    test: Batches
    task: Task
    score_name: str
    classes: Sequence[str] | None
    samples: int | None
    memory: int | float | str | None
    seconds: dict[str, float] = field(default_factory=dict)

    def without_batchnorm(self) -> Audit:
        nothing = Statistics()
        scores = scores_under(self.model, self.test, {NONE: nothing.applied_to}, self.task)
        comparison = self._compare(scores, NONE, {}, {})
        return Audit(comparison, (), {}, f"{capital(without_layers(self.model))}.")

    def judged(
        self,
        methods: Sequence[Method],
        batch: bool,
        progress: Progress,
        prior: float | None,
        curve: bool,
        not_in_file: Sequence[str],
        same_averages_as: str | None,
    ) -> Audit:
        model, modes = self.model, Modes.of(self.model)
        ranks = self.task.ranks
        averages = ranks.gather(running_statistics(model), "the running averages")
        running = averages[0]  # what a checkpoint usually holds
        counted = FirstSamples(self.population, self.samples)
        recomputed: dict[Condition, Statistics] = {}
        for method in methods:
            condition = Condition("recomputed", method=method if len(methods) > 1 else None)
            with self._timed(str(condition)):
                recomputed[condition] = self._recompute(counted, method, progress)
        first = next(iter(recomputed))
        reference = recomputed[first]
        if prior is not None:
            recomputed[BLENDED] = blend(running, reference, prior, counted.seen)
        settings: dict[Condition, Setting] = {RUNNING: running.applied_to}
        settings |= {condition: found.applied_to for condition, found in recomputed.items()}
        if batch:
            settings[BATCH] = batch_statistics
        with self._timed("conditions"):
            scores = scores_under(model, self.test, settings, self.task)
        with self._timed("layers"):
            some = self.population.spread(SPREAD_SAMPLES, counted.batches_seen)
            facts = self._once(
                lambda: layer_facts(
                    model,
                    running,
                    reference,
                    self.population.only(some),
                    self.task,
                    modes=modes,
                    not_in_file=not_in_file,
                )
            )
        made = {
            "running": _decay(model),
            "recomputed": methods[0],
            "batch": f"mini-batches of {self.test.sizes[0]}",
        }
        if prior is not None:
            made["blended"] = f"running averages as {prior:g} of {prior + counted.seen:g} samples"
        comparison = self._compare(scores, RUNNING, made, {})
        every = [s.values for s in scores.values()]
        close = 0.0 if self.task.score is None else close_scores(every)
        main = _gain_of(comparison, first, close)
        look = self.test.spread(LOOK_SAMPLES)
        closer = self.test.spread(max(CLOSER_SAMPLES, int(CLOSER_SHARE * self.test.samples)))
        with self._timed("samples"):
            halves: Halves | None = None
            points: tuple[CurvePoint, ...] = ()
            if counted.batches_seen > 1:
                enough = Enough(
                    model,
                    self.population,
                    counted.batches_seen,
                    lambda batches: self._recompute(batches, methods[0], False),
                    self.test,
                    self.task,
                    close,
                )
                if curve:
                    halves, points = enough.curve(self._of(scores[first], look), look)
                else:
                    halves = enough.halves(
                        max(CLOSER_SAMPLES, int(CLOSER_SHARE * counted.seen)), closer
                    )
        attribution = None
        names: list[str] = []
        if main.matters(SIGNIFICANT):
            with self._timed("attribution"):
                attribution = self._once(
                    lambda: attribute(
                        model, lambda: self.test.only(look), self.task.loss, running, reference
                    )
                )
            names = self._worst(attribution, running, reference)
        with self._timed("exchanging layers"):
            base = {c: self._of(scores[c], closer) for c in (RUNNING, first)}
            costs = self._exchanged(running, reference, names, base[RUNNING], base[first], closer)
        with self._timed("eps"):
            eps = self._other_eps(scores[RUNNING], closer, look, close)
        rows = self._rows(running, recomputed, first, costs)
        comparison = replace(comparison, layers=rows)
        found = Facts(
            layers=facts,
            batch_size=next(size for size in self.population.sizes if size),
            population_samples=counted.seen,
            recomputed=main,
            batch=_gain_of(comparison, BATCH, close) if batch else None,
            batch_over_recomputed=gain(scores[first].values, scores[BATCH].values, close)
            if batch
            else None,
            other_eps=eps,
            same_averages_as=same_averages_as,
            halves=halves,
            of_ranks=_of_ranks(averages),
            points=self.task.score is None,
        )
        findings = find(found)
        return Audit(
            comparison,
            findings,
            {"running": running, **{str(c): s for c, s in recomputed.items()}},
            in_words(found, findings),
            attribution,
            halves,
            counted.seen,
            self.seconds,
            points,
        )

    def _timed(self, name: str) -> AbstractContextManager:
        return _Timer(self.seconds, name)

    def _once(self, make: Callable[[], T]) -> T:
        """What the first rank makes, for all of them."""
        ranks = self.task.ranks
        return ranks.broadcast(make() if ranks.rank == 0 else None, "a look at the layers")

    def _recompute(self, batches: Iterable, method: Method, progress: Progress) -> Statistics:
        ranks = self.task.ranks
        alike = Alike(batches, ranks, "population")
        recompute = partial(
            recompute_statistics,
            self.model,
            method=method,
            device=self.task.device,
            memory=self.memory,
            progress=progress,
            forward=lambda model, batch: self.task.output(model, batch),
            ranks=ranks,
        )
        try:
            found = recompute(ranks.share(alike))
        except NeededAgain:  # an audit may read its batches again, and then holds them
            found = recompute(list(ranks.share(alike)))
        alike.check()
        return found

    def _of(self, scores: Scores, numbers: Sequence[int]) -> Scores:
        """The scores of the samples in these batches of the test set."""
        return scores.at(self.test.places(numbers))

    def _scores(self, settings: Mapping[str, Setting], numbers: Sequence[int]) -> dict[str, Scores]:
        return scores_under(self.model, self.test.only(numbers), settings, self.task)

    def _compare(
        self,
        scores: Mapping[Condition, Scores],
        baseline: Condition,
        made: Mapping[str, str],
        layers: Mapping[Condition, Sequence[LayerRow]],
    ) -> Comparison:
        predictions = {c: s.predictions for c, s in scores.items() if s.predictions is not None}
        if self.task.score is not None:
            return compare_scores(
                {c: s.values for c, s in scores.items()},
                baseline,
                name=self.score_name,
                made=made,
                layers=layers,
            )
        most = max(max(p.labels.max(), p.predicted.max()) for p in predictions.values())
        classes = list(self.classes or map(str, range(int(most) + 1)))
        return compare(predictions, baseline, classes, made=made, layers=layers)

    def _worst(
        self, attribution: Attribution | None, running: Statistics, reference: Statistics
    ) -> list[str]:
        """The layers to exchange for real: those with the largest shares of the loss, if known,
        else those furthest off."""
        if attribution is not None:
            return [layer.name for layer in attribution.worst(EXCHANGED)]
        held = _finite(running)
        broken = [n for n in running.names if n in reference.mean and n not in held.mean]
        apart = layer_drift(held, reference, layer_eps(self.model)) if held.mean else []
        return [*broken, *(layer.name for layer in apart)][:EXCHANGED]

    def _exchanged(
        self,
        running: Statistics,
        reference: Statistics,
        names: Sequence[str],
        under_running: Scores,
        under_reference: Scores,
        numbers: Sequence[int],
    ) -> dict[str, tuple[LayerCost, LayerCost]]:
        """What exchanging one layer alone does: mended, and spoiled."""
        settings: dict[str, Setting] = {}
        for name in names:
            settings[f"mended {name}"] = _with_one(running, reference, name).applied_to
            settings[f"spoiled {name}"] = _with_one(reference, running, name).applied_to
        if not settings:
            return {}
        found = self._scores(settings, numbers)
        return {
            name: (
                _cost(under_running, found[f"mended {name}"]),
                _cost(under_reference, found[f"spoiled {name}"]),
            )
            for name in names
        }

    def _other_eps(
        self, running: Scores, few: Sequence[int], more: Sequence[int], close: float
    ) -> tuple[float, Gain] | None:
        """Another framework's eps in all layers, and what it gains: on more samples if the few
        speak for it."""
        own = set(layer_eps(self.model).values())
        if len(own) != 1 or (now := own.pop()) not in EPS:
            return None
        for numbers in (few, more):
            found = self._scores({"eps": partial(other_eps, eps=EPS[now])}, numbers)["eps"]
            gained = gain(self._of(running, numbers).values, found.values, close)
            if gained.difference <= 0 or not gained.matters(WORTH_TRYING):
                break
        return EPS[now], gained

    def _rows(
        self,
        running: Statistics,
        recomputed: Mapping[Condition, Statistics],
        first: Condition,
        costs: Mapping[str, tuple[LayerCost, LayerCost]],
    ) -> dict[Condition, list[LayerRow]]:
        eps = layer_eps(self.model)
        held = _finite(running)
        if not any(name in held.mean for name in recomputed[first].names):
            return {}
        rows = {
            condition: [LayerRow(**asdict(drift)) for drift in layer_drift(held, statistics, eps)]
            for condition, statistics in recomputed.items()
        }
        rows[first] = [
            replace(row, mended=costs[row.name][0], spoiled=costs[row.name][1])
            if row.name in costs
            else row
            for row in rows[first]
        ]
        return rows


class _Timer:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = round(time.perf_counter() - self._started, 3)


def _of_ranks(averages: Sequence[Statistics]) -> dict[str, list[Values]]:
    """Per layer the running averages of each rank, where there are several."""
    if len(averages) == 1:
        return {}
    return {
        name: [
            Values(held.mean[name].double().cpu().numpy(), held.var[name].double().cpu().numpy())
            for held in averages
        ]
        for name in averages[0].names
        if all(name in held.mean for held in averages)
    }


def _gain_of(comparison: Comparison, condition: Condition, close: float) -> Gain:
    """The difference to the baseline, its p-value corrected as in the comparison."""
    pair: Paired = next(p for r, p in comparison.others if r.condition == condition)
    return Gain(pair.difference, *pair.difference_interval, pair.p_holm, close)


def _with_one(most: Statistics, one: Statistics, name: str) -> Statistics:
    """`most`, but for one layer."""
    return replace(
        most, mean={**most.mean, name: one.mean[name]}, var={**most.var, name: one.var[name]}
    )


def _cost(reference: Scores, exchanged: Scores) -> LayerCost:
    found = gain(reference.values, exchanged.values)
    loss = None
    if reference.predictions is not None and exchanged.predictions is not None:
        difference = exchanged.predictions.mean_loss - reference.predictions.mean_loss
        loss = difference if np.isfinite(difference) else None
    return LayerCost(
        found.difference,
        (found.low, found.high),
        reference.changed(exchanged),
        loss,
        len(reference),
    )


def _decay(model: nn.Module) -> str:
    momenta = {layer.momentum for layer in batchnorm_layers(model).values()}
    if len(momenta) > 1:
        return "several decays"
    momentum = momenta.pop()
    return (
        "a cumulative average"
        if momentum is None
        else f"the layers' decay {round(1 - momentum, 12):g}"
    )


def _finite(statistics: Statistics) -> Statistics:
    """The layers whose statistics are finite numbers."""
    names = [
        name
        for name in statistics.names
        if bool(torch.isfinite(statistics.mean[name]).all())
        and bool(torch.isfinite(statistics.var[name]).all())
    ]
    return Statistics(
        {n: statistics.mean[n] for n in names},
        {n: statistics.var[n] for n in names},
        {n: statistics.count[n] for n in names},
    )
