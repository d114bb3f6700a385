"""What the experiments of a study say of one of its claims: a row of claims.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bnexp.analysis.paired import Verdict


@dataclass(frozen=True)
class Judged:
    """A claim with what came out. `first` and `second` hold a value per seed of `seeds`; the
    difference is second less first, its interval the 95 % t interval over seeds, `p` that of the
    paired t test or, for equality, of two one-sided tests. `cells`: experiments a seed's value is
    the mean of."""

    says: str
    source: str | None
    where: str
    first: str
    second: str
    measure: str
    expect: str
    verdict: Verdict
    text: str
    unit: str
    difference: float | None
    interval: tuple[float, float] | None
    p: float | None
    seeds: list[int]
    first_values: list[float | None]
    second_values: list[float | None]
    cells: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
