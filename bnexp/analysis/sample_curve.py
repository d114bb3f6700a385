"""The score by the number of samples that statistics are recomputed from. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bnexp.analysis.findings import SIGNIFICANT, Gain

Part = Literal["nested", "other half", "all"]


@dataclass(frozen=True)
class CurvePoint:
    """The score with statistics of `samples` samples of the population, and its gain over that
    with all of them. part: "nested", each within the next larger one, up to a half; "other half";
    or "all". changed: test samples that fare otherwise than with all."""

    samples: int
    part: Part
    score: float
    gain: Gain
    changed: int
    test_samples: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("a point of a curve is of one sample at least")

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> CurvePoint:
        return CurvePoint(**{**found, "gain": Gain(**found["gain"])})


def enough(points: Sequence[CurvePoint]) -> str:
    """From how many samples on the score can't be told from that with all of them, in words."""
    whole = points[-1]
    differing = [p.samples for p in points[:-1] if p.gain.matters(SIGNIFICANT)]
    alike = [p.samples for p in points[:-1] if p.samples > max(differing, default=0)]
    on = f"on {whole.test_samples:,} test samples"
    if not alike:
        return (
            f"Half of the population still scores otherwise than all {whole.samples:,} samples "
            f"({on}): more samples would change the result."
        )
    return (
        f"From {min(alike):,} samples on the score can't be told from that with all "
        f"{whole.samples:,} ({on})."
    )
