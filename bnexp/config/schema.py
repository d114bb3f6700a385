"""The YAML of a run as pydantic models: what can be said, its defaults and its limits.

Attribute docstrings become the descriptions of `bnexp config --schema`.
"""

from __future__ import annotations

import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bnexp.errors import UserError, shown
from bnexp.memory_size import parse_memory
from bnexp.statistics.methods import Method
from bnexp.statistics.rules import Estimator

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


def _folder_name(name: str) -> str:
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"{shown(name)} can't name a folder: use letters, digits, '.', '_' and '-', the "
            "first a letter or digit"
        )
    return name


FolderName = Annotated[str, Field(max_length=100), AfterValidator(_folder_name)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


# ---------------------------------------------------------------------------------------- data


class AugmentConfig(Section):
    crop_padding: Annotated[int, Field(ge=0, le=1024)] = 0
    """Pad by this many pixels on every side, then crop at random to the original size."""
    flip: bool = False
    """Mirror left and right with probability one half."""


class LimitConfig(Section):
    train: PositiveInt | None = None
    """Use only this many training images, chosen by the seed, stratified."""
    test: PositiveInt | None = None
    """Use only this many test images, stratified; the same ones whatever the seed."""


class BatchesConfig(Section):
    classes: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Training mini-batches hold images of so many classes each, in equal shares; null: whatever
    the shuffle brings."""


class CorruptionConfig(Section):
    name: Literal["gaussian-noise", "gaussian-blur", "brightness", "contrast", "jpeg"]
    """torchvision's transform of that name; docs/data.md has the table of severities."""
    severity: Annotated[int, Field(ge=1, le=5)] = 3
    """From 1, hardly seen, to 5."""


def _absolute_path(path: str) -> str:
    """So that a run's config means the same file or folder from everywhere."""
    if "\0" in path:
        raise ValueError(f"{shown(path)} has a NUL, which no path has")
    try:
        return os.path.abspath(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{shown(path)}: {error}") from None


class DataConfig(Section):
    name: str
    """digits, mnist, fashion-mnist, kmnist, cifar10, cifar100, svhn or image-folder."""
    root: Path | None = None
    """Where the files are, or go when downloaded. Then $BNEXP_DATA and ./data are looked at."""
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training images kept apart for validation, seeded and stratified."""
    augment: AugmentConfig = AugmentConfig()
    """What training does to its images, at random."""
    image_size: Annotated[int, Field(ge=1, le=16384)] | None = None
    """Side of the square that images are resized to; needed where a folder's sizes differ."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Threads that decode the images of an image-folder; 0 decodes them between the steps."""
    limit: LimitConfig = LimitConfig()
    """Fewer images than there are, to try something out."""

    batches: BatchesConfig = BatchesConfig()
    """How mini-batches are put together."""
    corruption: CorruptionConfig | None = None
    """What is done to the test images, and to them alone; null: nothing."""
    binary: bool = False
    """Every value becomes black or white, white from half of it on; not for image-folder."""

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: Path | None) -> Path | None:
        return None if root is None else Path(_absolute_path(str(root)))


# --------------------------------------------------------------------------------------- model


class RenormConfig(Section):
    """How far batch renormalization may correct, by the number of mini-batches seen."""

    r_max: Annotated[float, Field(ge=1.0)] = 3.0
    """Largest ratio of a mini-batch's deviation to the running one, either way."""
    d_max: Annotated[float, Field(ge=0.0)] = 5.0
    """Largest distance of a mini-batch's mean from the running one, in running deviations."""
    start: Annotated[int, Field(ge=0, lt=2**31)] = 5_000
    """Up to this mini-batch it is batch normalization."""
    r_full: Annotated[int, Field(ge=0, lt=2**31)] = 40_000
    """From this mini-batch on r_max holds, after a linear rise from 1."""
    d_full: Annotated[int, Field(ge=0, lt=2**31)] = 25_000
    """From this mini-batch on d_max holds, after a linear rise from 0."""

    @model_validator(mode="after")
    def _in_order(self):
        if self.start > min(self.r_full, self.d_full):
            raise ValueError("start must be no later than r_full and d_full")
        return self


TORCHVISION_WEIGHTS = re.compile(r"torchvision/[A-Z][A-Z0-9_]*")


def _weights(text: str) -> str:
    return text if TORCHVISION_WEIGHTS.fullmatch(text) else _absolute_path(text)


class ModelConfig(Section):
    name: str
    """mlp, small-cnn, resnet20 or torchvision/<name>."""
    norm: Literal["batch", "batch-renorm", "moving-average", "none"] = "batch"
    """`batch-renorm` is Ioffe 2017; `moving-average` normalizes by the running averages in
    training, too, which the batch normalization paper warns of; `none` builds bnexp's own networks
    without batch normalization."""
    renorm: RenormConfig | None = None
    """The limits of batch-renorm; null: the paper's, for trainings of some 160,000 steps."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the variance before its square root."""
    weights: Annotated[str, AfterValidator(_weights)] | None = None
    """The weights and running averages to start from: a file (of `bnexp export`, torch.save or
    safetensors), or torchvision/NAME for torchvision's own of that name, such as
    torchvision/IMAGENET1K_V1. A classifier for another number of classes starts afresh."""

    @model_validator(mode="after")
    def _renorm_is_used(self):
        if self.renorm is not None and self.norm != "batch-renorm":
            raise ValueError("model.renorm is for model.norm: batch-renorm")
        published = self.weights is not None and TORCHVISION_WEIGHTS.fullmatch(self.weights)
        if published and not self.name.startswith("torchvision/"):
            raise ValueError(f"model.weights {self.weights} is for torchvision's networks")
        return self


# ---------------------------------------------------------------------------------- statistics


RECOMPUTE_METHODS = typing.get_args(Method)


class RecomputeConfig(Section):
    method: Method = "exact"
    """How population statistics are recomputed; see docs/statistics.md."""
    samples: Annotated[int, Field(ge=2)] | None = 10_000
    """How many training images they are computed over; null takes all."""
    batch_size: Annotated[int, Field(ge=2)] | None = None
    """Images per forward pass: the mini-batch of `pooled` and `batch-mean` (default:
    normalization_batch, else the training batch size), a matter of speed alone for `exact`
    (default: 100)."""
    augment: bool = True
    """Augment the images as training does, so that the only difference to the running
    statistics is how they are averaged."""
    memory: str | None = None
    """Bound on the activations `exact` keeps waiting, such as 2GiB or 50%."""

    @field_validator("memory")
    @classmethod
    def _amount(cls, memory: str | None) -> str | None:
        if memory is not None:
            parse_memory(memory)
        return memory


class AdaptedConfig(Section):
    samples: Annotated[int, Field(ge=2)] | None = None
    """How many test images they are computed over (exactly, and without their labels), the first
    of a fixed shuffle; null takes all. The same images are then among those that are scored."""
    prior: Annotated[float, Field(ge=0.0)] = 0.0
    """Pull them towards the running averages, as if these were so many further images (Schneider
    et al. 2020)."""


class StatisticsConfig(Section):
    decay: Decay = 0.9
    """Decay of the running statistics in the layers. PyTorch's momentum is 1 - decay."""
    estimators: dict[str, Annotated[Estimator, Field(discriminator="rule")]] = {}
    """More estimators fed by the same run, by name; all are evaluated, saved and compared."""
    adapted: dict[str, AdaptedConfig] = {}
    """Statistics of test images, by name (AdaBN; Li et al. 2016), wherever recomputed ones are."""
    recompute: RecomputeConfig = RecomputeConfig()
    normalization_batch: Annotated[int, Field(ge=2)] | None = None
    """Ghost batches: training normalizes over sub-batches of this many images."""
    freeze_from_step: Annotated[int, Field(ge=0)] | None = None
    """From this step on training normalizes with the running statistics and leaves them alone."""

    @field_validator("estimators", "adapted")
    @classmethod
    def _names(cls, named: dict, info: ValidationInfo) -> dict:
        if len(named) > 1000:
            raise ValueError("there can't be more than 1000")
        what = "an estimator" if info.field_name == "estimators" else "adapted statistics"
        for name in named:
            taken = name in ("running", "recomputed", "batch", "none")
            if taken or not PLAIN_NAME.fullmatch(name) or len(name) > 100:
                raise ValueError(
                    f"{shown(name)} can't name {what}: running, recomputed, batch and none "
                    "are taken; use letters, digits, '.', '_' and '-'"
                )
        return named

    @model_validator(mode="after")
    def _different_names(self):
        if both := self.estimators.keys() & self.adapted.keys():
            raise ValueError(
                f"{shown(min(both))} names both an estimator and adapted statistics; rename one"
            )
        return self


# ------------------------------------------------------------------------------------ training


class SgdConfig(Section):
    name: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0.0)] = 0.1
    """Learning rate; the schedule starts from it or rises to it."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """The optimizer's own momentum, the share of the previous step that is kept."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Not applied to BN parameters and biases."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; say nesterov: false")
        return self


class AdamWConfig(Section):
    name: Literal["adamw"]
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Learning rate; the schedule starts from it or rises to it."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decays of the moving averages of the gradient and of its square."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Not applied to BN parameters and biases."""


OptimizerConfig = Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")]


class ScheduleSection(Section):
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly to the schedule's first value."""


class ConstantSchedule(ScheduleSection):
    name: Literal["constant"]


class StepSchedule(ScheduleSection):
    name: Literal["step"]
    milestones: list[Fraction]
    """Where the learning rate is multiplied by gamma, as shares of the run: [0.5, 0.75]."""
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """What the learning rate is multiplied by at each milestone."""


class CosineSchedule(ScheduleSection):
    name: Literal["cosine"]
    final: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate at the end, as a share of the optimizer's lr."""


class OneCycleSchedule(Section):
    name: Literal["one-cycle"]
    rise: Fraction = 0.3
    """Share of the run during which the learning rate rises from lr / start to lr."""
    start: Annotated[float, Field(gt=1.0)] = 25.0
    """The first learning rate is lr / start."""
    end: Annotated[float, Field(gt=1.0)] = 1e4
    """The last learning rate is lr / (start * end)."""


class PlateauSchedule(ScheduleSection):
    name: Literal["plateau"]
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """What the learning rate is multiplied by when the EMA training accuracy stops improving."""
    patience: PositiveInt = 1000
    """Steps without an improvement of the EMA training accuracy that count as a plateau."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.002
    """What counts as an improvement of the EMA training accuracy."""
    reductions: Annotated[int, Field(ge=0)] | None = None
    """Reductions of the learning rate after which the next plateau ends the run; null: never."""


ScheduleConfig = Annotated[
    ConstantSchedule | StepSchedule | CosineSchedule | OneCycleSchedule | PlateauSchedule,
    Field(discriminator="name"),
]


class EarlyStoppingConfig(Section):
    metric: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    """What must improve, on the validation images."""
    patience: PositiveInt = 5
    """Evaluations in a row without improvement after which the run ends."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """What counts as an improvement."""
    restore_best: bool = True
    """End with the weights of the best evaluation instead of the last ones."""

    @field_validator("metric", mode="before")
    @classmethod
    def _not_on_test(cls, metric: Any) -> Any:
        if str(metric).startswith("test"):
            raise ValueError(
                "stopping on test data would tune the run to the very images that are to judge "
                "it; set data.val_fraction and say val_accuracy or val_loss"
            )
        return metric


class EmaWeightsConfig(Section):
    decay: Decay = 0.999
    """Weight kept on the old average at every step."""
    warmup: bool = True
    """Start with the smaller decay (1 + t) / (10 + t), so that early weights fade sooner."""


class SwaConfig(Section):
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.75
    """Share of the run after which weights are averaged (Izmailov et al. 2018)."""
    every: PositiveInt | None = None
    """Steps between the weights that are averaged; null: one epoch."""


class AveragesConfig(Section):
    ema: EmaWeightsConfig | None = None
    """An exponential moving average of the parameters."""
    swa: SwaConfig | None = None
    """Stochastic weight averaging: the mean of the parameters at regular steps."""


class TrainingConfig(Section):
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Passes over the training images; may be a fraction. Say epochs or steps."""
    steps: PositiveInt | None = None
    """Mini-batches to train on. Say epochs or steps."""
    batch_size: PositiveInt = 128
    """Images per mini-batch; the last, short one of an epoch is left out."""
    optimizer: OptimizerConfig = SgdConfig()
    """sgd or adamw."""
    schedule: ScheduleConfig = CosineSchedule(name="cosine")
    """The learning rate by step: constant, step, cosine, one-cycle or plateau."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target spread evenly over all classes, in training alone."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16 and float16 run the forward pass under autocast; float16 scales gradients."""
    ema_accuracy_decay: Decay = 0.98
    """Decay of the moving average of training accuracy: 0.98 looks back about 50 steps."""
    check_every: PositiveInt = 100
    """Steps between looks at the numbers: divergence, collapse and plateaus."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the run when validation stops improving; needs data.val_fraction and test.every."""
    averages: AveragesConfig = AveragesConfig()
    """Averages of the parameters along the run, evaluated with statistics recomputed for them."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _sgd_unless_named(cls, optimizer: Any) -> Any:
        return {"name": "sgd", **optimizer} if isinstance(optimizer, dict) else optimizer

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("say either epochs or steps")
        return self


# ------------------------------------------------------------------------------------ the rest


class TestConfig(Section):
    __test__ = False

    every: PositiveInt | None = None
    """Steps between evaluations on the whole test set; null: only at the end."""
    statistics: list[Literal["running", "recomputed", "batch"]] = ["running"]
    """The statistics BN layers use in these evaluations; estimators come on top by themselves."""
    batch_size: PositiveInt = 250
    """Test images per forward pass; it matters to accuracy only for `batch`."""
    train_accuracy: bool = False
    """Also measure the accuracy over the whole training set, which the EMA stands in for."""

    @field_validator("statistics")
    @classmethod
    def _at_least_running(cls, kinds: list[str]) -> list[str]:
        if "running" not in kinds:
            raise ValueError("the list must hold running, which the others are compared with")
        if len(set(kinds)) < len(kinds):
            raise ValueError("the list names a kind of statistics twice")
        return kinds


class CheckpointsConfig(Section):
    every_steps: PositiveInt | None = None
    """Steps between checkpoints."""
    every_seconds: Annotated[float, Field(gt=0)] | None = 60.0
    """Seconds between checkpoints; whichever is due first counts."""
    keep: PositiveInt = 2
    """How many of the newest are kept; the best is kept besides."""
    best: Literal["best", "best-on-test"] = "best"
    """Which evaluation's weights are the best: by the validation images, where there are any; or
    best-on-test, by the test images, on which their accuracy is then better than on others."""


class PerformanceConfig(Section):
    allocator: bool = True
    """Tell glibc to keep freed memory (no effect elsewhere)."""
    channels_last: bool = True
    """Keep the channels of a pixel together in memory."""
    compile: bool = False
    """torch.compile the training step's model."""
    fold_batchnorm: bool = True
    """Evaluate with BN folded into the convolutions before it; changes logits by rounding alone."""
    tf32: bool = True
    """Let CUDA multiply float32 matrices with TensorFloat-32."""


class LoggingConfig(Section):
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (needs bnexp[tensorboard])."""


class ExpectConfig(Section):
    test_accuracy: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """The run ends with exit code 3 when its final test accuracy is lower."""
    cost: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Exit code 3 where running averages cost more than that share of accuracy beside recomputed
    statistics, by the whole 95 % interval; for train and eval."""
    worst_cost: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """The same at the worst evaluation of the run, as its two accuracies differ; needs
    recomputed in test.statistics."""


class Config(Section):
    name: FolderName = "run"
    """The run's folder is runs/<name>-<number>; without it, the config file's name."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the initial weights, the order of the images, augmentation and validation split."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    data: DataConfig
    model: ModelConfig
    statistics: StatisticsConfig = StatisticsConfig()
    training: TrainingConfig
    test: TestConfig = TestConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    performance: PerformanceConfig = PerformanceConfig()
    logging: LoggingConfig = LoggingConfig()
    expect: ExpectConfig = ExpectConfig()

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise ValueError(f"{shown(device)} is no device; allowed: auto, cpu, cuda, cuda:1, mps")
        return device

    @model_validator(mode="after")
    def _sections_agree(self):
        if self.training.early_stopping and not self.test.every:
            raise ValueError("training.early_stopping needs evaluations: set test.every")
        if self.training.early_stopping and self.checkpoints.best == "best-on-test":
            raise ValueError(
                "training.early_stopping goes by the validation images: leave checkpoints.best out"
            )
        if "batch" in self.test.statistics and self.test.batch_size < 2:
            raise ValueError("test.statistics has batch, so test.batch_size must be at least 2")
        if (classes := self.data.batches.classes) and self.training.batch_size % classes:
            raise ValueError(
                f"data.batches.classes {classes} can't share training.batch_size "
                f"{self.training.batch_size} equally; choose a divisor"
            )
        part, batch = self.statistics.normalization_batch, self.training.batch_size
        if part and batch > part and batch % part == 1:
            raise ValueError(
                f"statistics.normalization_batch {part} leaves one image of training.batch_size "
                f"{batch} over, which has no variance; choose a divisor"
            )
        return self

    def require_gates(self) -> None:
        """UserError where a training could not be held to what `expect` says. Of a record it isn't
        asked: what was trained before can be evaluated and exported all the same."""
        if self.model.norm == "none" and (self.expect.cost, self.expect.worst_cost) != (None, None):
            raise UserError(
                "expect.cost and expect.worst_cost are of running averages, which model.norm none "
                "has not"
            )
        if self.expect.worst_cost is not None and "recomputed" not in self.test.statistics:
            raise UserError("expect.worst_cost needs recomputed in test.statistics")

    def require_parts_for(self, processes: int) -> None:
        """UserError where a mini-batch has fewer parts than there are processes to share it."""
        batch, part = self.training.batch_size, self.statistics.normalization_batch or 1
        if processes > (parts := -(-batch // part)):
            what = "images" if part == 1 else f"normalization batches of {part} (statistics."
            what += "" if part == 1 else "normalization_batch)"
            raise UserError(
                f"a mini-batch of {batch} (training.batch_size) has {parts} {what}: they can't be "
                f"shared by {processes} processes; start {parts} or fewer"
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
