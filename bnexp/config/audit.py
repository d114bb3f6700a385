"""The YAML of an audit: what is judged, on which data, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from bnexp.config.schema import FolderName, PositiveInt, Section
from bnexp.memory_size import parse_memory

Value = bool | int | float | str | list[int | float | str] | None
Arguments = dict[str, Value]
Numbers = list[Annotated[float, Field(allow_inf_nan=False)]]


class AuditedModel(Section):
    name: str
    """torchvision/NAME, timm/NAME, or package.module:object of your own."""
    arguments: Arguments = Field(default={})
    """What it is built with: model.arguments.num_classes=10."""
    weights: Path | None = None
    """The checkpoint; null: the weights the model has when it is built."""
    key: str | None = None
    """Where in the checkpoint the weights are; null: whatever fits best, which is said."""


class AuditedData(Section):
    population: str
    """What statistics are recomputed from: a folder of images, or package.module:object."""
    test: str
    """What the model is scored on: a folder per class, or package.module:object."""
    population_arguments: Arguments = Field(default={})
    """What data.population is called with, where it is an object."""
    test_arguments: Arguments = Field(default={})
    """What data.test is called with, where it is an object."""
    transforms: str | None = None
    """How images of folders are prepared: as for torchvision/NAME or timm/NAME. null: as for the
    model, unless resize, crop, mean and std are given."""
    resize: PositiveInt | None = None
    """Pixels of an image's shorter side, before anything is cut out."""
    crop: PositiveInt | None = None
    """Side of the square cut out of its middle."""
    mean: Numbers | None = None
    """Subtracted from each channel, whose values go from 0 to 1. One number: grey images."""
    std: Numbers | None = None
    """What each channel is divided by."""
    batch_size: PositiveInt = 64
    """Samples in a batch, of folders and Datasets; taken for that of training."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare the samples of folders and Datasets."""

    @model_validator(mode="after")
    def _mean_and_std(self):
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std belong together: a number per channel each")
        return self


class AuditExpectConfig(Section):
    cost: Annotated[float, Field(ge=0.0)] | None = None
    """Exit with code 3 where running averages cost more than that, by the whole 95 % interval."""


class AuditConfig(Section):
    name: FolderName = "audit"
    """The record is runs/<name>-<number>."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    model: AuditedModel
    data: AuditedData
    methods: list[Literal["exact", "pooled", "batch-mean"]] = Field(default=["exact"])
    """How statistics are recomputed; findings are about the first."""
    samples: Annotated[int, Field(ge=2)] | None = 10_000
    """At most about so many of the population; null: all."""
    batch: bool = False
    """Also score with every mini-batch's own statistics."""
    prior: Annotated[float, Field(ge=0.0)] | None = None
    """Also blend recomputed with running statistics, as if those were of so many samples."""
    curve: bool = False
    """Also score with statistics of less and less of the population, down to one batch."""
    memory: str | None = None
    """Bound on what waits while recomputing, such as 2GiB or 50%; null: half of what is free."""
    forward: str | None = None
    """package.module:function, called as forward(model, batch), that gives the output."""
    score: str | None = None
    """package.module:function, called as score(output, batch), that gives a number per sample."""
    score_name: str | None = None
    """What the score is called in sentences."""
    channels_last: bool = True
    """Keep the channels of a pixel together in memory."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16 and float16 run the model under autocast."""
    expect: AuditExpectConfig = AuditExpectConfig()

    @field_validator("methods")
    @classmethod
    def _some_methods(cls, methods: list[str]) -> list[str]:
        if not methods or len(set(methods)) < len(methods):
            raise ValueError("name one method or several, each once")
        return methods

    @field_validator("memory")
    @classmethod
    def _memory(cls, memory: str | None) -> str | None:
        if memory is not None:
            parse_memory(memory)
        return memory

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
