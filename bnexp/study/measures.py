"""What a claim measures of an experiment: a number from its record, or why there is none."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from bnexp.condition import Condition
from bnexp.config import Config
from bnexp.errors import UserError, shown
from bnexp.records import Run
from bnexp.study.grid import Reading

Kind = Literal["accuracy", "loss", "train_accuracy", "ema_accuracy", "area", "steps_to", "diverged"]
Unit = Literal["points", "loss", "steps", "diverged"]
LOWER_IS_BETTER = ("loss", "steps_to", "diverged")
_TERM = re.compile(r"([a-z_]+)(?:\(([^()]*)\))?")


@dataclass(frozen=True)
class Term:
    """One number of an experiment. `condition`: None is the default one; `reach`: the accuracy of
    `steps_to`."""

    kind: Kind
    condition: str | None = None
    reach: float = 0.0

    def __str__(self) -> str:
        inner = f"{self.reach:g}" if self.kind == "steps_to" else self.condition
        return self.kind + (f"({inner})" if inner else "")


@dataclass(frozen=True)
class Measure:
    """A term, or a first one less a second one, optionally without its sign."""

    term: Term
    minus: Term | None = None
    absolute: bool = False

    @property
    def unit(self) -> Unit:
        units: dict[Kind, Unit] = {"loss": "loss", "steps_to": "steps", "diverged": "diverged"}
        return units.get(self.term.kind, "points")

    @property
    def better(self) -> Literal["higher", "lower"] | None:
        """Which way is better; None where neither is."""
        if self.minus is not None:
            return "lower" if self.absolute else None
        return "lower" if self.term.kind in LOWER_IS_BETTER else "higher"

    @property
    def terms(self) -> list[Term]:
        return [self.term, *([self.minus] if self.minus else [])]

    def under(self, condition: str | None) -> Measure:
        """The same with `condition` where a term names none."""

        def of(term: Term) -> Term:
            takes = term.kind in ("accuracy", "loss", "train_accuracy", "area", "steps_to")
            return replace(term, condition=condition) if takes and not term.condition else term

        return Measure(of(self.term), self.minus and of(self.minus), self.absolute)

    def __str__(self) -> str:
        text = str(self.term) + (f" - {self.minus}" if self.minus else "")
        return f"abs({text})" if self.absolute else text


def parse_measure(text: str, said: str) -> Measure:
    """`accuracy`, `accuracy(recomputed)`, `steps_to(0.9)`, `a - b`, `abs(a - b)`. UserError."""
    inner, absolute = text.strip(), False
    if inner.startswith("abs(") and inner.endswith(")"):
        inner, absolute = inner[4:-1], True
    parts = inner.split(" - ")
    if len(parts) > 2 or (absolute and len(parts) < 2):
        raise UserError(f"{said}: {shown(text)} is no measure: a term, a - b or abs(a - b)")
    terms = [_term(part.strip(), said) for part in parts]
    measure = Measure(terms[0], terms[1] if len(terms) > 1 else None, absolute)
    if len({Measure(term).unit for term in terms}) > 1:
        raise UserError(f"{said}: {shown(text)} subtracts things of different units")
    return measure


def is_measure(text: str) -> bool:
    """Whether a text that a claim compares is a measure; else it is a condition."""
    match = _TERM.match(text.removeprefix("abs("))
    return match is not None and match[1] in _KINDS


def _term(text: str, said: str) -> Term:
    match = _TERM.fullmatch(text)
    if not match or match[1] not in _KINDS:
        raise UserError(f"{said}: {shown(text)} is no measure; there are {', '.join(_KINDS)}")
    kind: Any = match[1]
    inside = (match[2] or "").strip()
    if kind == "steps_to":
        try:
            reach = float(inside)
        except ValueError:
            reach = -1.0
        if not 0 < reach <= 1:
            raise UserError(f"{said}: steps_to takes an accuracy, as in steps_to(0.9)")
        return Term(kind, reach=reach)
    if inside and kind in ("ema_accuracy", "diverged"):
        raise UserError(f"{said}: {kind} has no condition")
    return Term(kind, inside or None)


class NoValue(Exception):
    """Why an experiment has no number: it is not finished, it failed, or it diverged."""

    def __init__(self, why: Literal["diverged", "failed", "unfinished"]) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True)
class Value:
    """`never`: an accuracy that was not reached, counted as the last step."""

    number: float
    never: bool = False


@dataclass(frozen=True)
class Experiment:
    """An experiment of the grid with the record of the training that answers it. `failure`: why
    the study gave it up, where its record does not say so."""

    reading: Reading
    run: Run | None
    failure: str | None = None

    @cached_property
    def state(self) -> dict[str, Any]:
        """`{"state": finished, diverged, failed, running, interrupted, killed or waiting, "step",
        "message"}`"""
        if self.run is None:
            state = "waiting" if self.failure is None else "failed"
            return {"state": state, "step": 0, "message": self.failure}
        found = self.run.state
        state = "diverged" if found["diverged"] else found["state"]
        if self.failure is not None and state not in ("finished", "diverged"):
            return {"state": "failed", "step": found["step"], "message": self.failure}
        return {"state": state, "step": found["step"], "message": found["message"]}

    def _finished(self) -> Run:
        state = self.state["state"]
        if self.run is None or state != "finished":
            raise NoValue(state if state in ("diverged", "failed") else "unfinished")
        return self.run

    @cached_property
    def comparison(self) -> dict[str, Any]:
        """The content of comparison.json."""
        run = self._finished()
        comparison = run.comparison()
        if comparison is None:
            raise UserError(f"{run.path} has finished without a comparison.json")
        return comparison

    @cached_property
    def results(self) -> dict[Condition, dict[str, Any]]:
        """The rows of comparison.json by what the experiment calls their conditions."""
        found = {}
        for row in self.comparison["kinds"]:
            condition = self.reading.of_record(Condition.parse(str(row.get("name"))))
            if condition is not None:
                found[condition] = row
        if self.reading.names.get("running") != "running":  # the baseline comes first
            found = dict(sorted(found.items(), key=lambda item: item[0] != Condition("running")))
        return found

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        return self._finished().evals()

    @cached_property
    def steps(self) -> Any:
        return self._finished().steps()

    def value(self, measure: Measure, at: float | None) -> Value:
        """The measure at the end, at a step (1 and above) or at a share of the run. NoValue."""
        first = self._term(measure.term, at)
        if measure.minus is None:
            return first
        second = self._term(measure.minus, at)
        difference = first.number - second.number
        return Value(abs(difference) if measure.absolute else difference,
                     first.never or second.never)  # fmt: skip

    def _term(self, term: Term, at: float | None) -> Value:
        if term.kind == "diverged":
            self._finished()
            return Value(0.0)
        return _TERMS[term.kind](self, term, at)

    def condition(self, given: str | None) -> Condition:
        """The one that was named; by default the running averages, where there are any."""
        if given is not None:
            return Condition.parse(given)
        return next(iter(self.results))

    def curve(self, condition: Condition, split: str, column: str) -> dict[int, float]:
        """Step -> value of the evaluations of `split` under `condition`."""
        there = str(self.reading.in_record(condition))
        return {
            row["step"]: row[column]
            for row in self.evals
            if row["split"] == split and row["statistics"] == there
        }


def _final_or_at(
    experiment: Experiment, term: Term, at: float | None, column: Literal["accuracy", "loss"]
) -> Value:
    condition = experiment.condition(term.condition)
    if at is None:
        row = next((r for c, r in experiment.results.items() if str(c) == str(condition)), None)
        if row is None or row.get(column) is None:
            known = ", ".join(map(str, experiment.results))
            raise UserError(f"{column} under {condition} was not measured; there are {known}")
        return Value(float(row[column]))
    return Value(_at(experiment, experiment.curve(condition, "test", column), at, str(term)))


def _at(experiment: Experiment, curve: dict[int, float], at: float | None, what: str) -> float:
    """Of a curve by step: its last value, the one at a step, or the last one by a share of the
    run."""
    if not curve:
        raise UserError(f"{what} was not measured in {experiment.reading.point.label}")
    if at is None:
        return curve[max(curve)]
    if at < 1:
        total = experiment.state["step"]
        before = [step for step in curve if step <= at * total]
        if not before:
            raise UserError(
                f"{what} was not measured by {at:g} of the run of {total} steps; the first time is "
                f"at step {min(curve)}"
            )
        return curve[max(before)]
    if int(at) not in curve:
        steps = sorted(curve)
        near = min(steps, key=lambda step: abs(step - at))
        raise UserError(f"{what} was not measured at step {at:g}; the nearest is step {near}")
    return curve[int(at)]


def _train_accuracy(experiment: Experiment, term: Term, at: float | None) -> Value:
    condition = experiment.condition(term.condition)
    return Value(_at(experiment, experiment.curve(condition, "train", "accuracy"), at, str(term)))


def _ema_accuracy(experiment: Experiment, term: Term, at: float | None) -> Value:
    steps = experiment.steps
    if at is None:
        return Value(float(steps["ema_accuracy"][-1]))
    step = at if at >= 1 else max(1, round(at * experiment.state["step"]))
    curve = dict(zip(map(int, steps["step"]), map(float, steps["ema_accuracy"]), strict=True))
    return Value(_at(experiment, curve, step, str(term)))


def _area(experiment: Experiment, term: Term, at: float | None) -> Value:
    """The mean height of the curve of test accuracy between its first and last evaluation, by
    trapezoids."""
    curve = experiment.curve(experiment.condition(term.condition), "test", "accuracy")
    steps = sorted(curve)
    if len(steps) < 2:
        raise UserError("area needs several evaluations: set test.every")
    whole = sum((b - a) * (curve[a] + curve[b]) / 2 for a, b in itertools.pairwise(steps))
    return Value(whole / (steps[-1] - steps[0]))


def _steps_to(experiment: Experiment, term: Term, at: float | None) -> Value:
    curve = experiment.curve(experiment.condition(term.condition), "test", "accuracy")
    if not curve:
        raise UserError(f"{term} was not measured in {experiment.reading.point.label}")
    reached = [step for step, accuracy in curve.items() if accuracy >= term.reach]
    return Value(float(min(reached))) if reached else Value(float(max(curve)), never=True)


_TERMS: dict[str, Callable[[Experiment, Term, float | None], Value]] = {
    "accuracy": lambda e, term, at: _final_or_at(e, term, at, "accuracy"),
    "loss": lambda e, term, at: _final_or_at(e, term, at, "loss"),
    "train_accuracy": _train_accuracy,
    "ema_accuracy": _ema_accuracy,
    "area": _area,
    "steps_to": _steps_to,
}
_KINDS = (*_TERMS, "diverged")


def refuse_unmeasured(measure: Measure, at: float | None, config: Config, said: str) -> None:
    """UserError where experiments of `config` will not have measured it."""
    test, statistics = config.test, config.statistics
    averages = config.training.averages
    for term in measure.terms:
        if term.kind in ("area", "steps_to") and not test.every:
            raise UserError(f"{said}: {term} needs test.every")
        if term.kind == "train_accuracy" and not test.train_accuracy:
            raise UserError(f"{said}: {term} needs test.train_accuracy: true")
        along = at is not None or term.kind in ("area", "steps_to", "train_accuracy")
        if at is not None and term.kind in ("accuracy", "loss", "train_accuracy"):
            if not test.every:
                raise UserError(f"{said}: at needs evaluations along the run: set test.every")
            if at >= 1 and config.training.steps not in (None, at) and at % test.every:
                raise UserError(f"{said}: at {at:g} is no evaluation: test.every is {test.every}")
        if term.condition is None:
            continue
        condition = Condition.parse(term.condition)
        known = ["running", "recomputed", "batch", *statistics.estimators, *statistics.adapted]
        if config.model.norm == "none":
            known = ["none"]
        if condition.statistics not in known:
            raise UserError(
                f"{said}: no condition is called {shown(term.condition)}; there are "
                f"{', '.join(known)}"
            )
        if condition.weights in ("ema", "swa") and (
            along or getattr(averages, condition.weights) is None
        ):
            raise UserError(
                f"{said}: {term} needs training.averages.{condition.weights}, and has it at the "
                "end alone"
            )
        wanted = condition.statistics
        if (wanted == "batch" or (wanted == "recomputed" and along)) and (
            wanted not in test.statistics and term.kind != "train_accuracy"
        ):
            raise UserError(f"{said}: {term} needs {wanted} in test.statistics")
        if term.kind == "train_accuracy" and wanted not in ("running", "none"):
            raise UserError(f"{said}: {term}: training images are looked at under running alone")
