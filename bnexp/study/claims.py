"""A study's claims: what each of them compares, and what the seeds say of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from bnexp.analysis.judged import Judged
from bnexp.analysis.paired import (
    Differences,
    Verdict,
    equivalence_p,
    judge_direction,
    judge_equality,
    paired_differences,
)
from bnexp.analysis.words import count, percent, signed, signed_interval
from bnexp.config.study import ClaimConfig
from bnexp.config.yaml_text import Scalar
from bnexp.errors import UserError, shown
from bnexp.study.file import Study, levels_of, text_of
from bnexp.study.grid import Point, matches
from bnexp.study.measures import (
    Experiment,
    Measure,
    NoValue,
    Value,
    is_measure,
    parse_measure,
    refuse_unmeasured,
)

Name = Literal["first", "second"]
_EXPECT = re.compile(
    r"(first|second) is (better|higher|lower)(?: by (?:at least )?([0-9.eE+-]+))?"
    r"|equal within ([0-9.eE+-]+)"
    r"|(first|second) diverges"
)
_SIDE_KEYS = ("condition", "measure", "at")


@dataclass(frozen=True)
class Expectation:
    """What a claim says: that `subject` is better, higher or lower than the other by more than
    `margin`, that it diverges, or that both are equal within `margin`."""

    kind: Literal["better", "higher", "lower", "equal", "diverges"]
    subject: Name
    margin: float


@dataclass(frozen=True)
class Side:
    """One of the two things that a claim compares: a part of the grid, and what is measured."""

    label: str
    levels: Mapping[str, list[Any]]
    measure: Measure
    at: float | None


@dataclass(frozen=True)
class Claim:
    config: ClaimConfig
    where: Mapping[str, list[Any]]
    first: Side
    second: Side
    expectation: Expectation

    @property
    def unit(self) -> str:
        return self.second.measure.unit


# ------------------------------------------------------------------------ what is claimed


def claims_of(study: Study, points: Sequence[Point]) -> list[Claim]:
    """The claims of a study, checked against its grid. UserError where one can't be judged."""
    return [
        _claim(study, points, config, f"claim {i + 1} ({shown(config.says, 60)})")
        for i, config in enumerate(study.config.claims)
    ]


def _claim(study: Study, points: Sequence[Point], config: ClaimConfig, said: str) -> Claim:
    where = {name: levels_of(study, name, v, f"{said}: where") for name, v in config.where.items()}
    first, second = (_side(study, config, given, f"{said}: compare") for given in config.compare)
    expectation = parse_expectation(config.expect, said)
    claim = Claim(config, where, first, second, expectation)
    if first.measure.unit != second.measure.unit:
        raise UserError(f"{said}: compare: {first.measure} and {second.measure} differ in unit")
    _refuse_undirected(claim, said)
    if first == second:
        raise UserError(f"{said}: compare names the same thing twice")
    if first.levels.keys() != second.levels.keys():
        raise UserError(f"{said}: compare: both must name the same axes")
    for side in (first, second):
        if set(side.levels) & set(where):
            raise UserError(f"{said}: {', '.join(set(side.levels) & set(where))} is in where, too")
        chosen = [p for p in points if matches(p.levels, where) and matches(p.levels, side.levels)]
        if not chosen:
            raise UserError(f"{said}: the grid has no experiment for {side.label}")
        for point in chosen:
            refuse_unmeasured(side.measure, side.at, point.config, said)
    if not _cells(claim, points):
        raise UserError(f"{said}: no experiment of the first has a partner in the second")
    return claim


def _side(study: Study, config: ClaimConfig, given: Any, said: str) -> Side:
    measure, condition, at = config.measure, config.condition, config.at
    levels: dict[str, list[Any]] = {}
    if isinstance(given, str):
        if is_measure(given):
            measure, label = given, given
        else:
            condition, label = given, given
    elif isinstance(given, dict) and given:
        own = {key: value for key, value in given.items() if key in _SIDE_KEYS}
        measure, condition = own.get("measure", measure), own.get("condition", condition)
        at = own.get("at", at)
        for key in ("measure", "condition"):
            if key in own and not isinstance(own[key], str):
                raise UserError(f"{said}: {key} is {shown(own[key])}, not a text")
        if at is not None and (isinstance(at, bool) or not isinstance(at, int | float) or at <= 0):
            raise UserError(f"{said}: at is {shown(at)}, not a step or a share of the run")
        levels = {
            name: levels_of(study, name, value, said)
            for name, value in given.items()
            if name not in _SIDE_KEYS
        }
        words = [f"{n} {' or '.join(map(text_of, v))}" for n, v in levels.items()]
        words += [str(own[key]) for key in ("condition", "measure") if key in own]
        words += [f"at {at:g}"] if "at" in own and at is not None else []
        label = ", ".join(words)
    else:
        raise UserError(f"{said}: {shown(given)} is neither a condition nor levels of axes")
    if at is not None and at >= 1 and at != int(at):
        raise UserError(f"{said}: at {at:g} is neither a step nor a share of the run")
    return Side(label, levels, parse_measure(measure, said).under(condition), at)


def parse_expectation(text: str, said: str) -> Expectation:
    match = _EXPECT.fullmatch(" ".join(text.split()))
    if not match:
        raise UserError(
            f"{said}: expect: {shown(text)} is not understood; say second is better, second is "
            "better by 0.01, second is lower, equal within 0.002 or second diverges (or first)"
        )
    subject, kind, by, within, diverging = cast(tuple[Any, ...], match.groups())
    margin = Scalar(by or within or "0").value
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1e300:
        raise UserError(f"{said}: expect: {shown(by or within)} is no number")
    if within:
        if margin == 0:
            raise UserError(f"{said}: expect: equal within 0 is never shown by samples")
        return Expectation("equal", "second", float(margin))
    if diverging:
        return Expectation("diverges", diverging, 0.0)
    return Expectation(kind, subject, float(margin))


def _refuse_undirected(claim: Claim, said: str) -> None:
    measure, kind = claim.second.measure, claim.expectation.kind
    better = {side.measure.better for side in (claim.first, claim.second)}
    if kind == "better" and (None in better or len(better) > 1):
        raise UserError(
            f"{said}: of {measure} neither way is better: say second is higher, or lower"
        )
    if measure.unit == "diverged" and kind != "diverges":
        raise UserError(f"{said}: measure diverged goes with expect: second diverges")


# ------------------------------------------------------------------------ what came out


@dataclass(frozen=True)
class _Pair:
    """What one cell of one seed has on both sides: a value, or why there is none."""

    first: Value | str
    second: Value | str


def judge(claim: Claim, experiments: Sequence[Experiment]) -> Judged:
    """What the experiments so far say of a claim."""
    by_point = {id(e.reading.point): e for e in experiments}
    cells = _cells(claim, [e.reading.point for e in experiments])
    seeds = sorted({seed for seed, _, _ in cells})
    pairs = {
        seed: [
            _Pair(_value(by_point[id(a)], claim.first), _value(by_point[id(b)], claim.second))
            for s, a, b in cells
            if s == seed
        ]
        for seed in seeds
    }
    if claim.expectation.kind == "diverges":
        return _judge_divergence(claim, pairs)
    return _judge_values(claim, pairs)


def undecided(claim: Claim, why: str) -> Judged:
    """A claim that can't be judged."""
    return _judged(claim, "undecided", why, None, None, {}, [], [])


def _cells(claim: Claim, points: Sequence[Point]) -> list[tuple[int, Point, Point]]:
    """(seed, first, second): experiments that differ in what is compared alone."""
    compared = claim.first.levels.keys()

    def key(point: Point) -> tuple:
        rest = ((name, text_of(v)) for name, v in point.levels.items() if name not in compared)
        return (point.seed, *sorted(rest))

    inside = [point for point in points if matches(point.levels, claim.where)]
    firsts: dict[tuple, list[Point]] = {}
    for point in inside:
        if matches(point.levels, claim.first.levels):
            firsts.setdefault(key(point), []).append(point)
    return [
        (point.seed, first, point)
        for point in inside
        if matches(point.levels, claim.second.levels)
        for first in firsts.get(key(point), ())
    ]


def _value(experiment: Experiment, side: Side) -> Value | str:
    try:
        return experiment.value(side.measure, side.at)
    except NoValue as none:
        return none.why


def _judge_divergence(claim: Claim, pairs: Mapping[int, Sequence[_Pair]]) -> Judged:
    """Supported where all trainings of the subject diverged and none of the other did,
    contradicted where none of the subject did; a count, not a test."""
    subject = claim.expectation.subject
    other: Name = "second" if subject == "first" else "first"
    found = {
        name: [getattr(pair, name) for each in pairs.values() for pair in each]
        for name in ("first", "second")
    }
    missing = sum(v in ("failed", "unfinished") for values in found.values() for v in values)
    diverged = {name: sum(_has_diverged(v) for v in values) for name, values in found.items()}
    total = len(found[subject])
    text = (
        f"{_label(claim, subject)} diverged in {diverged[subject]} of {total} experiments, "
        f"{_label(claim, other)} in {diverged[other]} of {len(found[other])}"
    )
    verdict: Verdict = "undecided"
    if missing:
        text += f"; {missing} are not finished"
    elif diverged[subject] == 0:
        verdict = "contradicted"
    elif diverged[subject] == total and diverged[other] == 0:
        verdict = "supported"
    share = {
        name: [
            sum(_has_diverged(getattr(p, name)) for p in each) / len(each)
            for each in pairs.values()
        ]
        for name in ("first", "second")
    }
    return _judged(claim, verdict, text, None, None, pairs, share["first"], share["second"])


def _has_diverged(value: Value | str) -> bool:
    return value == "diverged"


def _judge_values(claim: Claim, pairs: Mapping[int, Sequence[_Pair]]) -> Judged:
    values: dict[str, list[float | None]] = {"first": [], "second": []}
    for each in pairs.values():
        for name in ("first", "second"):
            numbers = [getattr(pair, name) for pair in each]
            whole = all(isinstance(n, Value) for n in numbers)
            mean = sum(n.number for n in numbers) / len(numbers) if whole else None
            values[name].append(mean)
    differences = [
        b - a
        for a, b in zip(values["first"], values["second"], strict=True)
        if a is not None and b is not None
    ]
    everything = [pair for each in pairs.values() for pair in each]
    if reason := _no_verdict(claim, everything):
        found = paired_differences(differences) if differences else None
        verdict: Verdict = "undecided"
        if divergent := _one_diverged(claim, everything, len(pairs)):
            verdict, reason = divergent
        return _judged(claim, verdict, reason, found, None, pairs, *values.values())
    found = paired_differences(differences)
    verdict, p, text = _by_interval(claim, found)
    never = {
        name: sum(getattr(pair, name).never for pair in everything) for name in ("first", "second")
    }
    if any(never.values()):
        way = _way_of_truth(claim, never)
        text += "; " + _about_never(claim, never, way * found.mean if way else None)
        if not _withstands(claim, verdict, way, found.mean):
            verdict = "undecided"
    return _judged(claim, verdict, text, found, p, pairs, *values.values())


def _no_verdict(claim: Claim, pairs: Sequence[_Pair]) -> str | None:
    """Why the values can't be judged: something is missing, and not at random."""
    reasons = []
    for word, said in (
        ("unfinished", "not finished"),
        ("failed", "failed"),
        ("diverged", "diverged"),
    ):
        for name in ("first", "second"):
            number = sum(getattr(pair, name) == word for pair in pairs)
            if number:
                reasons.append(
                    f"{_label(claim, name)}: {number} of {len(pairs)} experiments {said}"
                )
    return "; ".join(reasons) or None


def _one_diverged(claim: Claim, pairs: Sequence[_Pair], seeds: int) -> tuple[Verdict, str] | None:
    """Where every training of one side diverged and all of the other finished, that one is
    worse."""
    for name, other in (("first", "second"), ("second", "first")):
        all_of_one = all(getattr(pair, name) == "diverged" for pair in pairs)
        if all_of_one and all(isinstance(getattr(pair, other), Value) for pair in pairs):
            kind, subject = claim.expectation.kind, claim.expectation.subject
            text = (
                f"{_label(claim, name)} diverged in all of {len(pairs)} experiments, "
                f"{_label(claim, other)} in none"
            )
            if kind == "equal":
                return "contradicted", text
            if kind == "better" and seeds > 1:
                return ("supported" if subject == other else "contradicted"), text
    return None


def _by_interval(claim: Claim, found: Differences) -> tuple[Verdict, float | None, str]:
    expectation, text = claim.expectation, _difference_text(claim, found)
    if len(found.values) < 2:
        return "undecided", None, f"{text}: a single seed says nothing about the next one"
    if expectation.kind == "equal":
        verdict = judge_equality(found, expectation.margin)
        p = equivalence_p(found.values, expectation.margin)
        if not found.spread and verdict == "undecided":
            text += "; all seeds differ by the same, so that chance can't be judged: take more"
        return verdict, p, text
    sign = _sign(claim)
    beyond = paired_differences([sign * value - expectation.margin for value in found.values])
    verdict = judge_direction(beyond)
    if not found.spread:
        same = "do not differ at all" if found.absent else "all differ by the same"
        text += f"; the seeds {same}, so that chance can't be judged"
    return verdict, beyond.p, text


def _sign(claim: Claim) -> int:
    """Of second less first where the claim holds."""
    kind, subject = claim.expectation.kind, claim.expectation.subject
    up = kind == "higher" or (kind == "better" and claim.second.measure.better == "higher")
    return (1 if up else -1) * (1 if subject == "second" else -1)


def _difference_text(claim: Claim, found: Differences) -> str:
    seeds = len(found.values)
    over = f"{seeds} seed{'s' * (seeds != 1)}"
    if claim.unit == "points":
        text = f"{signed(found.mean)} points"
        interval = found.interval and signed_interval(found.interval)
    else:
        unit = {"steps": " steps", "loss": ""}[claim.unit]
        text = f"{found.mean:+.4g}{unit}".replace("-", "−")
        interval = found.interval and (
            f"{found.interval[0]:+.4g} to {found.interval[1]:+.4g}".replace("-", "−")
        )
    within = f" (95 % interval {interval}, {over})" if interval else f" ({over})"
    return f"second less first: {text}{within}"


def _way_of_truth(claim: Claim, never: Mapping[str, int]) -> int:
    """Where the true difference lies from the one counted: 1 above, -1 below, 0 either way."""
    name: Name = "second" if never["second"] else "first"
    if all(never.values()) or getattr(claim, name).measure.minus is not None:
        return 0
    return 1 if name == "second" else -1


def _withstands(claim: Claim, verdict: Verdict, way: int, mean: float) -> bool:
    """Whether a verdict on the difference counted holds of a true one that lies that `way`."""
    if claim.expectation.kind == "equal":
        return verdict == "contradicted" and way * mean > 0
    return way * _sign(claim) == (1 if verdict == "supported" else -1)


def _about_never(claim: Claim, never: Mapping[str, int], outward: float | None) -> str:
    """`outward`: not below 0 where the true difference is the larger one; None: unknown."""
    parts = [
        f"{_label(claim, name)} in {count(n)} experiment{'s' * (n != 1)}"
        for name, n in never.items()
        if n
    ]
    if outward is None:
        follows = "nothing can be said"
    elif outward >= 0:
        follows = "the true difference is larger"
    else:
        follows = "the true difference may be smaller, or of the other sign"
    return (
        f"never reached by {' and '.join(parts)}, which count as reaching it at the last step: "
        + follows
    )


def _label(claim: Claim, name: str) -> str:
    return getattr(claim, name).label


def _judged(
    claim: Claim,
    verdict: Verdict,
    text: str,
    found: Differences | None,
    p: float | None,
    pairs: Mapping[int, Sequence[_Pair]],
    first: Sequence[float | None],
    second: Sequence[float | None],
) -> Judged:
    cells = max((len(each) for each in pairs.values()), default=0)
    if cells > 1:
        text += f"; each seed's value is the mean over {count(cells)} experiments"
    measure = claim.second.measure
    if claim.expectation.kind == "diverges":
        shown_measure = "diverged"
    elif measure == claim.first.measure:
        shown_measure = str(measure)
    else:
        shown_measure = f"{claim.first.measure}; {measure}"
    return Judged(
        says=claim.config.says,
        source=claim.config.source,
        where=", ".join(f"{n} {' or '.join(map(text_of, v))}" for n, v in claim.where.items()),
        first=claim.first.label,
        second=claim.second.label,
        measure=shown_measure + _at_text(claim),
        expect=claim.config.expect,
        verdict=verdict,
        text=text,
        unit=claim.unit,
        difference=found.mean if found else None,
        interval=found.interval if found else None,
        p=p,
        seeds=list(pairs),
        first_values=list(first),
        second_values=list(second),
        cells=cells,
    )


def _at_text(claim: Claim) -> str:
    if claim.first.at != claim.second.at or claim.second.at is None:
        return ""
    at = claim.second.at
    return f" at step {count(int(at))}" if at >= 1 else f" at {percent(at, 0)} of the run"
