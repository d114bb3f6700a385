"""Whether the population was large enough: statistics of parts of it, and what they score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bnexp.analysis.findings import BY_THE_WAY, Halves
from bnexp.analysis.sample_curve import CurvePoint, Part
from bnexp.analysis.scores import gain
from bnexp.evaluation.scoring import Scores, Task, scores_under
from bnexp.evaluation.subsets import Batches, evenly
from bnexp.nn.find import layer_eps
from bnexp.statistics import Statistics, layer_drift


@dataclass(frozen=True)
class Enough:
    """Parts of a population, and what statistics of them score.

    population: its first `batches` batches are looked at, at least two.
    recompute: gives the statistics of some batches.
    close: what difference of scores doesn't matter.
    """

    model: nn.Module
    population: Batches
    batches: int
    recompute: Callable[[Iterable], Statistics]
    test: Batches
    task: Task
    close: float

    def halves(self, samples: int, numbers: Sequence[int]) -> Halves:
        """Two disjoint parts of about so many samples each, evenly spread over the population,
        scored on these batches of the test set; halves where it holds no more, or where smaller
        parts score differently."""
        each = min(len(self.population.spread(samples, self.batches)), self.batches // 2)
        if 2 * each < self.batches - 1:
            both = evenly(2 * each, self.batches)
            found = self._compared(both[::2], both[1::2], numbers)
            if not found.gain.matters(BY_THE_WAY):
                return found
        return self._compared(*self._whole_halves, numbers)

    def curve(self, whole: Scores, numbers: Sequence[int]) -> tuple[Halves, tuple[CurvePoint, ...]]:
        """By the number of samples: every 2^k-th batch of one half, each part within the next,
        then both halves and the whole, whose scores on these batches of the test set are known.
        Recomputing takes one and a half times what the whole did at most."""
        one, other = self._whole_halves
        strides = [2**k for k in range((len(one) - 1).bit_length() + 1)]
        parts: dict[tuple[int, ...], Part] = {
            tuple(one[::stride]): "nested" for stride in reversed(strides)
        }
        parts[tuple(other)] = "other half"
        statistics = {part: self.recompute(self.population.only(part)) for part in parts}
        scores = self._scores(statistics, numbers)
        points = [
            self._point(self._samples(part), kind, scores[part], whole)
            for part, kind in parts.items()
        ]
        points.append(self._point(self._samples(range(self.batches)), "all", whole, whole))
        pair = [(part, statistics[part], scores[part]) for part in (tuple(one), tuple(other))]
        return self._apart(*pair), tuple(points)

    @property
    def _whole_halves(self) -> tuple[Sequence[int], Sequence[int]]:
        return range(0, self.batches, 2), range(1, self.batches, 2)

    def _samples(self, numbers: Sequence[int]) -> int:
        return sum(self.population.sizes[n] for n in numbers)

    def _scores(
        self, statistics: Mapping[tuple[int, ...], Statistics], numbers: Sequence[int]
    ) -> dict[tuple[int, ...], Scores]:
        settings = {part: s.applied_to for part, s in statistics.items()}
        return scores_under(self.model, self.test.only(numbers), settings, self.task)

    def _point(self, samples: int, part: Part, found: Scores, whole: Scores) -> CurvePoint:
        return CurvePoint(
            samples,
            part,
            found.mean,
            gain(whole.values, found.values, self.close),
            found.changed(whole),
            len(found),
        )

    def _compared(self, one: Sequence[int], other: Sequence[int], numbers: Sequence[int]) -> Halves:
        parts = (tuple(one), tuple(other))
        statistics = {part: self.recompute(self.population.only(part)) for part in parts}
        scores = self._scores(statistics, numbers)
        return self._apart(*((part, statistics[part], scores[part]) for part in parts))

    def _apart(self, *pair: tuple[tuple[int, ...], Statistics, Scores]) -> Halves:
        (one, first, first_scores), (other, second, second_scores) = pair
        worst = layer_drift(first, second, layer_eps(self.model))[0]
        return Halves(
            samples=min(self._samples(one), self._samples(other)),
            scores=(first_scores.mean, second_scores.mean),
            gain=gain(first_scores.values, second_scores.values, self.close),
            changed=first_scores.changed(second_scores),
            test_samples=len(first_scores),
            worst_layer=worst.name,
            worst_distance=worst.drift,
        )
