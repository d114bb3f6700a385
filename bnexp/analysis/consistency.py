"""Whether the numbers of a comparison belong together: a record may be damaged, or a stranger's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bnexp.analysis.intervals import Interval, holm, mcnemar_p, paired_interval, wilson_interval
from bnexp.analysis.results import Paired, Result, paired_results
from bnexp.errors import UserError


def check_numbers(
    results: Sequence[Result], samples: int, class_samples: Sequence[int], chance: float
) -> None:
    """UserError where one number of a comparison belies another. With classes every count,
    interval and p-value follows from the counts by class; of other scores, what must lie where."""
    pairs = paired_results(results)
    _require(samples > 0, "there are no samples")
    _same("chance", chance, max(class_samples, default=0) / samples)
    if class_samples:
        _same("samples", samples, sum(class_samples))
        for result in results:
            _check_counts(result, samples, class_samples)
    for result in results:
        name = str(result.condition)
        _within(f"accuracy of {name}", result.accuracy, result.accuracy_interval)
        _within(f"loss of {name}", result.loss, result.loss_interval)
        _require(0 <= result.broken <= samples, f"broken samples of {name}")
        _require(result.ece is None or 0 <= result.ece <= 1, f"calibration error of {name}")
    for result, pair in pairs:
        _check_pair(results[0], result, pair, samples)
    corrected = holm([pair.p for _, pair in pairs])
    for (result, pair), p in zip(pairs, corrected, strict=True):
        _same(f"p of {result.condition}", pair.p_holm, p, 0)


def _check_counts(result: Result, samples: int, class_samples: Sequence[int]) -> None:
    name, right = str(result.condition), 0
    for n, share in zip(class_samples, result.class_accuracy, strict=True):
        if share is not None:
            right += round(share * n)
            _same(f"accuracy of a class, {name}", share * n, round(share * n))
    _same(f"accuracy of {name}", result.accuracy, right / samples)
    _same_interval(f"interval of {name}", result.accuracy_interval, wilson_interval(right, samples))
    if (pair := result.versus_baseline) is None:
        return
    for gained, lost, n, difference in zip(
        pair.class_gained, pair.class_lost, class_samples, pair.class_difference, strict=True
    ):
        _require(gained >= 0 <= lost and gained + lost <= n, f"changes of a class, {name}")
        if difference is not None:
            _same(f"difference of a class, {name}", difference * n, gained - lost)
    _same(f"gains of {name}", pair.gained, sum(pair.class_gained))
    _same(f"losses of {name}", pair.lost, sum(pair.class_lost))
    _same(f"difference of {name}", pair.difference, (pair.gained - pair.lost) / samples)
    interval = paired_interval(pair.gained, pair.lost, samples)
    _same_interval(f"interval of the difference of {name}", pair.difference_interval, interval)
    _same(f"p of {name}", pair.p, mcnemar_p(pair.gained, pair.lost), 0)


def _check_pair(base: Result, result: Result, pair: Paired, samples: int) -> None:
    name = str(result.condition)
    scale = 1 + abs(result.accuracy) + abs(base.accuracy)
    _same(f"difference of {name}", pair.difference, result.accuracy - base.accuracy, scale)
    _within(f"difference of {name}", pair.difference, pair.difference_interval)
    if result.loss is not None and base.loss is not None and pair.loss_difference is not None:
        scale = 1 + abs(result.loss) + abs(base.loss)
        _same(f"loss of {name}", pair.loss_difference, result.loss - base.loss, scale)
    _within(f"difference of losses of {name}", pair.loss_difference, pair.loss_difference_interval)
    counts = (pair.gained, pair.lost, pair.wrong_to_other_wrong)
    _require(min(counts) >= 0 and sum(counts) <= samples, f"changed samples of {name}")
    _require(0 <= pair.p <= 1, f"p of {name}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"its numbers belie one another: {what}")


def _same(what: str, found: float, right: float, scale: float = 1.0) -> None:
    """To what libraries of other versions may differ by; `scale` of what rounds to nothing."""
    _require(math.isclose(found, right, rel_tol=1e-5, abs_tol=1e-7 * scale), what)


def _same_interval(what: str, found: Interval, right: Interval) -> None:
    for one, other in zip(found, right, strict=True):
        _same(what, one, other)


def _within(what: str, value: float | None, interval: Interval | None) -> None:
    if value is not None and interval is not None:
        low, high = interval
        slack = 1e-7 * (1 + abs(value))
        _require(low - slack <= value <= high + slack, what)
