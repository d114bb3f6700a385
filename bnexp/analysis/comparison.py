"""What the predictions under several conditions say, and how sure that is.

Every number comes with its uncertainty at 95 %. The samples are the same under every condition, so
differences are paired: a sample that is right under both, or wrong under both, says nothing about
the difference, however many of them there are.

| quantity | method | source |
| --- | --- | --- |
| accuracy, also per class | score interval | Wilson 1927 |
| difference of accuracies | score interval for paired proportions | Tango 1998 |
| is there a difference | exact McNemar test | McNemar 1947, binomial form |
| difference of a class's accuracies | exact McNemar test, corrected over classes and conditions | |
| several conditions at once | step-down correction of the p-values | Holm 1979 |
| mean loss and its paired difference | Student's t interval | |
| calibration | expected calibration error, 15 bins | Guo et al. 2017 |
| is a model at chance | balanced accuracy, and likelihood ratio with BIC | Schwarz 1978 |
| runs with several seeds | Student's t interval, differences paired by seed | |

Tango's interval rather than Newcombe's (1998, method 10): the statistics under comparison often
disagree on a handful of 10,000 samples only. There (2 to 5 gains and losses expected, all
outcomes enumerated) Tango's covers the truth with probability 0.93 to 0.96 and Newcombe's with
0.98 to 0.995, being wider than need be. Besides, it inverts the score test whose value at zero is
McNemar's chi-square, so interval and test tell the same story up to the exact test's caution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bnexp.analysis.consistency import check_numbers
from bnexp.analysis.intervals import (
    expected_calibration_error,
    finite,
    holm,
    information,
    mcnemar_p,
    paired_counts,
    paired_interval,
    t_interval,
    wilson_interval,
)
from bnexp.analysis.layers import LayerRow
from bnexp.analysis.predictions import Predictions
from bnexp.analysis.results import Paired, Result, compared_result, paired_results
from bnexp.analysis.verdict import Outcome, Verdict, judge, outcome, worst_moment
from bnexp.condition import Condition, Weights, label
from bnexp.errors import UserError
from bnexp.reading import read


@dataclass(frozen=True)
class Comparison:
    """All conditions of one model on one set of samples, the baseline first.

    `chance` is the accuracy of always naming the most frequent class. `layers` holds, per
    condition, how far the baseline's statistics are from its own in each layer. `score` is what
    `accuracy` is in the results: with other scores than top-1 (`bnexp.analysis.scores`) their
    mean, and there are no classes.
    """

    samples: int
    classes: list[str]
    class_samples: list[int]
    chance: float
    baseline: Condition
    results: list[Result]
    layers: dict[Condition, list[LayerRow]]
    verdict: Verdict
    score: str = "accuracy"

    def __getitem__(self, condition: Condition) -> Result:
        return next(r for r in self.results if r.condition == condition)

    @property
    def base(self) -> Result:
        return self.results[0]

    @property
    def others(self) -> list[tuple[Result, Paired]]:
        """All but the baseline, each with its difference to it."""
        return paired_results(self.results)

    @property
    def compared(self) -> tuple[Result, Paired] | None:
        """The one that the verdict judges the baseline by; None where it stands alone."""
        return compared_result(self.results)

    def along_the_run(self, rows: Iterable[tuple[int, Condition, float]]) -> Comparison:
        """With the worst moment of the run in the verdict (`worst_moment`): step, condition and
        accuracy of its evaluations on the test set."""
        return replace(self, verdict=worst_moment(self.verdict, self.results, rows, self.samples))

    def to_dict(self) -> dict[str, Any]:
        """What comparison.json holds: lists, strings, numbers and None only; no NaN."""
        return {
            "samples": self.samples,
            "classes": self.classes,
            "class_samples": self.class_samples,
            "chance": self.chance,
            "baseline": str(self.baseline),
            "kinds": [_result_to_dict(result) for result in self.results],
            "layers": {str(c): [row.to_dict() for row in rows] for c, rows in self.layers.items()},
            "score": self.score,
            "outcome": self.verdict.outcome,
            "verdict": self.verdict.text,
            "remarks": list(self.verdict.remarks),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], own: Weights = "trained") -> Comparison:
        """What `to_dict` gave, also in records of older versions. `own` are the weights that the
        record is about where it doesn't say otherwise. UserError where it is damaged."""
        try:
            kinds = [
                {**kind, "condition": asdict(Condition.parse(kind["name"], own))}
                for kind in content["kinds"]
            ]
            results = read(list[Result], kinds)
            classes = read(list[str], content["classes"])
            class_samples = read(list[int], content["class_samples"])
            baseline = Condition.parse(content["baseline"], own)
            score = read(str, content.get("score", "accuracy"))
            if bool(classes) != (score == "accuracy"):
                raise UserError("an accuracy has classes, and other scores have none")
            samples, chance = read(int, content["samples"]), read(float, content["chance"])
            _check(results, baseline, classes, class_samples)
            check_numbers(results, samples, class_samples, chance)
            return cls(
                samples=samples,
                classes=classes,
                class_samples=class_samples,
                chance=chance,
                baseline=baseline,
                results=results,
                layers={
                    Condition.parse(name, own): [LayerRow.from_dict(row) for row in rows]
                    for name, rows in content.get("layers", {}).items()
                },
                verdict=Verdict(
                    _outcome_in(content, results, class_samples),
                    read(str, content["verdict"]),
                    read(tuple[str, ...], content.get("remarks", [])),
                ),
                score=score,
            )
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"it is not a comparison ({type(error).__name__}: {error})") from None


def _check(
    results: Sequence[Result],
    baseline: Condition,
    classes: Sequence[str],
    class_samples: Sequence[int],
) -> None:
    """UserError where parts of a record do not belong together."""
    pairs = paired_results(results)
    if [r.condition for r in results] != [baseline, *(result.condition for result, _ in pairs)]:
        raise UserError("the baseline comes first, and the others are paired with it")
    lists = [pair.class_gained for _, pair in pairs] + [pair.class_lost for _, pair in pairs]
    lengths = {len(classes), len(class_samples), *map(len, lists)}
    lengths |= {len(pair.class_difference) for _, pair in pairs}
    tested = [n > 0 for n in class_samples]
    if len(lengths) > 1 or (classes and not any(tested)) or min(class_samples, default=0) < 0:
        raise UserError("the numbers of classes do not belong together")
    if any([share is not None for share in r.class_accuracy] != tested for r in results):
        raise UserError("a class has an accuracy without samples, or samples without one")


def _outcome_in(
    content: Mapping[str, Any], results: list[Result], class_samples: list[int]
) -> Outcome:
    """Old records of accuracies don't name their outcome; that of other scores needs the scores."""
    if content.get("score", "accuracy") != "accuracy":
        return read(Outcome, content["outcome"])  # type: ignore[arg-type]
    return outcome(results, class_samples)


def _result_to_dict(result: Result) -> dict[str, Any]:
    found = asdict(result)
    del found["condition"]
    return {"name": str(result.condition), **found}


def compare(
    predictions: Mapping[Condition, Predictions],
    baseline: Condition,
    classes: Sequence[str],
    *,
    made: Mapping[str, str] | None = None,
    layers: Mapping[Condition, Sequence[LayerRow]] | None = None,
) -> Comparison:
    """Compare predictions of the same samples under several conditions.

    `predictions`  by condition, as `evaluate` returns them
    `baseline`     the condition the others are paired with
    `classes`      the names of the classes
    `made`         how each kind of statistics came about, as `bnexp.condition.label` takes it
    `layers`       per condition, rows about single layers to keep with the result

    Raises UserError where the conditions were not evaluated on the same samples.
    """
    made = made or {}
    if baseline not in predictions:
        raise UserError(f"the baseline {baseline} is not among {', '.join(map(str, predictions))}")
    base = predictions[baseline]
    if len(base) == 0:
        raise UserError("there are no samples to compare on")
    others = [condition for condition in predictions if condition != baseline]
    for condition in others:
        if not np.array_equal(predictions[condition].labels, base.labels):
            raise UserError(f"{condition} and {baseline} were not evaluated on the same samples")

    p_values = [mcnemar_p(*paired_counts(base.correct, predictions[c].correct)) for c in others]
    class_samples = np.bincount(base.labels, minlength=len(classes))
    results = [_result(baseline, made, base, class_samples, None)]
    for condition, p, corrected in zip(others, p_values, holm(p_values), strict=True):
        found = predictions[condition]
        paired = _pair(base, found, len(classes), p, corrected)
        results.append(_result(condition, made, found, class_samples, paired))
    return Comparison(
        samples=len(base),
        classes=list(classes),
        class_samples=class_samples.tolist(),
        chance=float(class_samples.max() / len(base)),
        baseline=baseline,
        results=results,
        layers={condition: list(rows) for condition, rows in (layers or {}).items()},
        verdict=judge(results, classes, class_samples.tolist(), made),
    )


def _result(
    condition: Condition,
    made: Mapping[str, str],
    found: Predictions,
    class_samples: np.ndarray,
    paired: Paired | None,
) -> Result:
    correct, n = found.correct, len(found)
    return Result(
        condition=condition,
        label=label(condition, made),
        accuracy=float(correct.mean()),
        accuracy_interval=wilson_interval(int(correct.sum()), n),
        loss=finite(found.loss.mean(dtype=np.float64)),
        loss_interval=t_interval(found.loss),
        ece=expected_calibration_error(found.confidence, correct),
        broken=int((found.predicted < 0).sum()),
        class_accuracy=_ratios(
            _per_class(found.labels, correct, len(class_samples)), class_samples
        ),
        versus_baseline=paired,
        information=information(found.predicted, found.labels),
    )


def _pair(base: Predictions, found: Predictions, classes: int, p: float, p_holm: float) -> Paired:
    n = len(base)
    gained, lost = found.correct & ~base.correct, base.correct & ~found.correct
    changed = found.predicted != base.predicted
    with np.errstate(invalid="ignore"):
        loss_difference = found.loss.astype(np.float64) - base.loss
    class_gained = _per_class(base.labels, gained, classes)
    class_lost = _per_class(base.labels, lost, classes)
    class_samples = np.bincount(base.labels, minlength=classes)
    return Paired(
        difference=(int(gained.sum()) - int(lost.sum())) / n,
        difference_interval=paired_interval(int(gained.sum()), int(lost.sum()), n),
        gained=int(gained.sum()),
        lost=int(lost.sum()),
        wrong_to_other_wrong=int((changed & ~gained & ~lost).sum()),
        p=p,
        p_holm=p_holm,
        loss_difference=finite(loss_difference.mean()),
        loss_difference_interval=t_interval(loss_difference),
        class_difference=_ratios(class_gained - class_lost, class_samples),
        class_gained=class_gained.tolist(),
        class_lost=class_lost.tolist(),
    )


def _per_class(labels: np.ndarray, flags: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(labels[flags], minlength=classes)


def _ratios(counts: np.ndarray, totals: np.ndarray) -> list[float | None]:
    pairs = zip(counts.tolist(), totals.tolist(), strict=True)
    return [count / total if total else None for count, total in pairs]
