"""The YAML of a study: a base, what varies, seeds, and what is claimed of the results."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from bnexp.config.schema import FolderName, PositiveInt, Section
from bnexp.errors import shown

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Levels = dict[str, Any]
"""Name of an axis -> one of its levels, or a list of them."""


class RangeConfig(Section):
    """Levels from a first to a last one: `{from: 8, to: 128, factor: 4}`, `{..., step: 10}`."""

    start: Annotated[float, Field(alias="from")]
    to: float
    factor: Annotated[float, Field(gt=0)] | None = None
    """What each level is multiplied by to get the next."""
    step: float | None = None
    """What is added to each level to get the next."""


class ResourcesConfig(Section):
    cpus: PositiveInt = 1
    """Threads of an experiment."""
    gpus: Annotated[float, Field(ge=0, le=64)] = 0
    """GPUs of an experiment: 1, or a share such as 0.5; with 0 it runs on the CPU."""


class ClaimConfig(Section):
    says: Annotated[str, Field(min_length=1)]
    """The claim, in a sentence."""
    source: str | None = None
    """Who makes it, and where."""
    where: Levels = Field(default={})
    """The part of the grid that it is about: levels of axes. Over axes that neither this nor
    compare names, the mean is taken within every seed."""
    compare: list[Any]
    """First and second: two conditions (running, recomputed, swa/recomputed), two measures, or two
    mappings of axes to levels, which may also say condition, measure and at."""
    measure: str = "accuracy"
    """accuracy, loss, train_accuracy, ema_accuracy, area, steps_to(0.9), diverged, or the
    difference of two, as in: ema_accuracy - train_accuracy."""
    condition: str | None = None
    """The condition that measures are taken under; null: running (none in a network without BN)."""
    at: Annotated[float, Field(gt=0)] | None = None
    """The step at which is measured, or below 1 the share of the run; null: the end."""
    expect: str
    """second is better (by 0.01), second is higher, second is lower, equal within 0.002,
    second diverges; or first instead of second."""

    @field_validator("compare")
    @classmethod
    def _two(cls, compare: list[Any]) -> list[Any]:
        if len(compare) != 2:
            raise ValueError(f"two things are compared, not {len(compare)}")
        return compare


class StudyExpectConfig(Section):
    claims: Literal["supported", "not contradicted"] | None = None
    """Exit with code 3 where a claim is not."""


class StudyConfig(Section):
    name: FolderName = "study"
    """The record is runs/<name>-<number>; without it, the study file's name."""
    base: Any
    """The config that all experiments share: a shipped one's name, a file, or the config itself."""
    vary: dict[str, Any] = Field(default={})
    """Axes of the grid: a key of the config and its values, or a name and its named levels."""
    only: list[Levels] = Field(default=[])
    """Of the grid, only the experiments that one of these describes."""
    exclude: list[Levels] = Field(default=[])
    """The experiments that one of these describes are left out."""
    seeds: Annotated[int, Field(ge=1, le=1000)] | list[Seed] = 3
    """How many (0, 1, ...), or which."""
    resources: ResourcesConfig = ResourcesConfig()
    """What an experiment is given."""
    claims: list[ClaimConfig] = Field(default=[])
    expect: StudyExpectConfig = StudyExpectConfig()

    @field_validator("seeds", mode="wrap")
    @classmethod
    def _each_once(cls, given: Any, admitted: ValidatorFunctionWrapHandler) -> int | list[int]:
        try:
            seeds = admitted(given)
        except ValidationError:
            raise ValueError(
                f"{shown(given)} is neither how many, from 1 to 1000, nor a list of seeds, each "
                "from 0 to 4294967295"
            ) from None
        if isinstance(seeds, list) and (not seeds or len(set(seeds)) < len(seeds)):
            raise ValueError(f"{shown(seeds)}: name each seed once, and one at least")
        return seeds

    @property
    def all_seeds(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds
