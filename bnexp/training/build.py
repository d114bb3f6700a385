"""From a config to the parts of a training."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import nn

from bnexp.condition import Weights
from bnexp.config import Config
from bnexp.config.schema import DataConfig
from bnexp.data import Augmentation, Data, DataSettings, load_data
from bnexp.data.corruption import Corruption
from bnexp.errors import UserError
from bnexp.importing import require_extra
from bnexp.networks import build_model
from bnexp.networks.given import GivenWeights, load_given
from bnexp.nn import freeze_batchnorm, set_normalization_batch
from bnexp.nn.find import batchnorm_layers
from bnexp.nn.renormalization import PAPER, RenormLimits
from bnexp.ranks import Alone, Ranks
from bnexp.statistics import Ema, StatisticsTracker
from bnexp.statistics.rules import Estimator
from bnexp.training.averages import EmaWeights, SwaWeights, WeightAverage
from bnexp.training.checkpoints import BEST, BEST_ON_TEST
from bnexp.training.guards import Best, Collapse, EarlyStopping, Plateau
from bnexp.training.metrics import EmaAccuracy
from bnexp.training.optimizer import build_optimizer
from bnexp.training.processes import ALONE, Processes, join_processes
from bnexp.training.schedule import learning_rate
from bnexp.training.state import TrainingState


@dataclass(frozen=True)
class Training:
    """A training: what its config says, what it reads, the state that its steps change, and the
    processes that compute them."""

    config: Config
    device: torch.device
    data: Data
    state: TrainingState
    steps_per_epoch: int
    total_steps: int
    processes: Processes = ALONE
    given: GivenWeights | None = None
    """What `model.weights` were, where they were loaded."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines to be said when it starts, about its data and its weights."""
        worse = self.config.data.corruption
        corrupted = (f"test images: {worse.name}, severity {worse.severity}",) if worse else ()
        return (*self.data.remarks, *corrupted, *(self.given.remarks if self.given else ()))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the config asks for and this training will not have."""
        swa = self.state.averages.get("swa")
        if isinstance(swa, SwaWeights) and swa.takes_none_of(self.total_steps):
            return (
                f"training.averages.swa averages no weights in {self.total_steps} steps: take a "
                "smaller start or every",
            )
        return ()

    @property
    def best_file(self) -> str | None:
        """The checkpoint that the best evaluation is kept in; None where there is nothing to choose
        it by."""
        if self.config.checkpoints.best == "best-on-test":
            return BEST_ON_TEST
        return BEST if self.data.val is not None else None

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        settings, state = self.config.training, self.state
        reductions = state.plateau.reductions
        return learning_rate(
            settings.schedule, settings.optimizer.lr, state.step, self.total_steps, reductions
        )


def build_training(
    config: Config,
    device: torch.device,
    data: Data | None = None,
    ranks: Ranks = Alone(),
    begin: bool = True,
) -> Training:
    """A training at its step 0. `data` takes the place of what the config names; all of `ranks`
    make theirs alike. Without `begin`, where a checkpoint will be loaded, `model.weights` are not
    looked for.

    Seeds torch's global generator, from which the initial weights and dropout draw. UserError
    where the data, the network or its weights are not what the config needs.
    """
    if config.logging.tensorboard:
        require_extra("tensorboard", "logging.tensorboard")
    training = config.training
    data = data or load_data(data_settings(config.data), seed=config.seed, device=device)
    if training.early_stopping and data.val is None:
        raise UserError("training.early_stopping needs validation images: set data.val_fraction")
    if "batch" in config.test.statistics and len(data.test) < 2:
        raise UserError("test.statistics has batch, and there is one test image only")
    for name, adapted in config.statistics.adapted.items():
        if (adapted.samples or 0) > len(data.test):
            raise UserError(
                f"statistics.adapted.{name}.samples is {adapted.samples:,}, and there are "
                f"{len(data.test):,} test images; null takes all"
            )
    model = build_network(config, data, device)
    given = None
    if begin and config.model.weights is not None:
        given = load_given(config.model.weights, config.model.name, model)
    if training.batch_size == 1 and batchnorm_layers(model):
        _refuse_single_values(model, data, config.model.name)
    steps_per_epoch = data.train.steps_per_epoch(training.batch_size)
    total_steps = training.steps or max(1, round((training.epochs or 0) * steps_per_epoch))
    stopping = training.early_stopping
    if ranks.size > 1 and config.model.norm in ("batch-renorm", "moving-average"):
        raise UserError(
            f"model.norm {config.model.norm} normalizes with running averages in training, which "
            "is not possible with several processes: train it with one"
        )
    processes = join_processes(config, ranks, model, lambda: _sample(data))
    state = TrainingState(
        device=device,
        tracker=track(model, config, ranks),
        model=model,
        optimizer=build_optimizer(training.optimizer, model),
        scaler=torch.amp.GradScaler(device.type, enabled=training.precision == "float16"),
        averages=_averages(config, model, steps_per_epoch, total_steps),
        ema_accuracy=EmaAccuracy(training.ema_accuracy_decay),
        collapse=Collapse(chance=1 / len(data.info.classes)),
        plateau=Plateau(training.schedule),
        best=EarlyStopping(stopping) if stopping else Best(),
    )
    return Training(config, device, data, state, steps_per_epoch, total_steps, processes, given)


def data_settings(config: DataConfig) -> DataSettings:
    worse = config.corruption
    return DataSettings(
        name=config.name,
        root=config.root,
        val_fraction=config.val_fraction,
        augmentation=Augmentation(config.augment.crop_padding, config.augment.flip),
        image_size=config.image_size,
        workers=config.workers,
        limit_train=config.limit.train,
        limit_test=config.limit.test,
        classes_per_batch=config.batches.classes,
        corruption=Corruption(worse.name, worse.severity) if worse else None,
        binary=config.binary,
    )


def build_network(config: Config, data: Data, device: torch.device) -> nn.Module:
    """The config's network for these data, its weights drawn from the config's seed."""
    torch.manual_seed(config.seed)
    limits = config.model.renorm
    model = build_model(
        config.model.name,
        channels=data.info.channels,
        image_size=data.info.image_size,
        num_classes=len(data.info.classes),
        norm=config.model.norm,
        eps=config.model.eps,
        renorm=RenormLimits(**limits.model_dump()) if limits else PAPER,
    ).to(device)
    if config.performance.channels_last:
        model.to(memory_format=torch.channels_last)
    else:  # batches come channels_last, and convolutions would pass that on
        model.register_forward_pre_hook(_contiguous)
    return model


def track(model: nn.Module, config: Config, ranks: Ranks = Alone()) -> StatisticsTracker | None:
    """The config's online estimators on the BN layers of `model`, the running averages first;
    None where it has no such layers."""
    if not batchnorm_layers(model):
        return None
    # Layers that normalize across ranks have the whole mini-batch's statistics on each of them.
    parts = ranks if config.statistics.normalization_batch else Alone()
    tracker = StatisticsTracker(model, _estimators(config), ranks=parts)
    if config.statistics.normalization_batch:
        set_normalization_batch(model, config.statistics.normalization_batch)
    return tracker


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which the network runs, in training and in evaluations."""
    precision = config.training.precision
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def freeze_when_due(training: Training) -> None:
    """From `statistics.freeze_from_step` on, normalize with the running statistics."""
    freeze_from, state = training.config.statistics.freeze_from_step, training.state
    if freeze_from is not None and state.step >= freeze_from and state.tracker:
        state.merge()
        freeze_batchnorm(state.model)


def _sample(data: Data) -> torch.Tensor:
    """Some inputs of the network: two, of which BN layers can tell a variance."""
    return next(iter(data.train.batches(2)))[0]


def _estimators(config: Config) -> dict[str, Estimator]:
    return {"running": Ema(config.statistics.decay), **config.statistics.estimators}


def _averages(
    config: Config, model: nn.Module, steps_per_epoch: int, total_steps: int
) -> dict[Weights, WeightAverage]:
    averages: dict[Weights, WeightAverage] = {}
    if ema := config.training.averages.ema:
        averages["ema"] = EmaWeights(model, ema.decay, ema.warmup)
    if swa := config.training.averages.swa:
        start = round(swa.start * total_steps)
        every = swa.every or min(steps_per_epoch, max(1, total_steps - start))
        averages["swa"] = SwaWeights(model, start, every)
    return averages


def _refuse_single_values(model: nn.Module, data: Data, name: str) -> None:
    """UserError where a mini-batch of one image gives a BN layer a single value per channel."""
    x, _ = next(data.train.training_batches(1))
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(x)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"training.batch_size is 1: a BN layer of {name} sees one value per channel, which "
            "has no variance; take at least 2"
        ) from None
    finally:
        torch.set_rng_state(state)


def _contiguous(model: nn.Module, inputs: tuple) -> tuple:
    """With the strides of a contiguous tensor, also where a single channel leaves a choice."""
    return tuple(x.flatten().view(x.shape) for x in inputs)
