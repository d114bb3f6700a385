"""Everything a training consists of, and how it goes into a checkpoint and comes out of one."""

from __future__ import annotations

import contextlib
import copy
from functools import cached_property

import torch
from torch import nn

from bnexp.config import Config
from bnexp.config.schema import CumulativeConfig, DataConfig, EmaConfig
from bnexp.data import Augmentation, Data, DataSettings, load_data
from bnexp.errors import UserError
from bnexp.networks import build_model
from bnexp.nn import freeze_batchnorm, set_normalization_batch
from bnexp.nn.find import batchnorm_layers
from bnexp.statistics import (
    Cumulative,
    Ema,
    Pooled,
    Statistics,
    StatisticsTracker,
)
from bnexp.training.averages import ParameterAverage
from bnexp.training.metrics import EmaAccuracy
from bnexp.training.optimization import Plateau, build_optimizer


def _estimators(config: Config) -> dict:
    """The online estimators of a run; the first is what the layers' buffers show."""
    estimators = {"running": Ema(config.statistics.decay)}
    for name, rule in config.statistics.estimators.items():
        if isinstance(rule, EmaConfig):
            estimators[name] = Ema(rule.decay, debias=rule.debias)
        elif isinstance(rule, CumulativeConfig):
            estimators[name] = Cumulative()
        else:
            estimators[name] = Pooled(window=rule.window)
    return estimators


def data_settings(config: DataConfig) -> DataSettings:
    return DataSettings(
        name=config.name,
        root=config.root,
        val_fraction=config.val_fraction,
        augmentation=Augmentation(config.augment.crop_padding, config.augment.flip),
        image_size=config.image_size,
        workers=config.workers,
        limit_train=config.limit.train,
        limit_test=config.limit.test,
    )


class Session:
    """Data, model, optimizer, estimators and averages of one training, built from its config.

    Seeds torch's global generator, from which the initial weights and dropout draw. Everything
    that changes with a step is in `state_dict`. `data` takes the place of what the config names.
    """

    _COUNTERS = (
        "step",
        "best_metric",
        "best_step",
        "best_ema_accuracy",
        "checks_at_chance",
        "evaluations_without_improvement",
        "stopped",
    )

    def __init__(self, config: Config, device: torch.device, data: Data | None = None) -> None:
        training = config.training
        self.config = config
        self.device = device
        self.data = data or load_data(data_settings(config.data), seed=config.seed, device=device)
        if training.early_stopping and self.data.val is None:
            raise UserError(
                "training.early_stopping needs validation images: set data.val_fraction"
            )
        info = self.data.info
        torch.manual_seed(config.seed)
        self.model = build_model(
            config.model.name,
            channels=info.channels,
            image_size=info.image_size,
            num_classes=len(info.classes),
            norm=config.model.norm,
            eps=config.model.eps,
        ).to(device)
        if config.performance.channels_last:
            self.model.to(memory_format=torch.channels_last)
        else:  # batches come channels_last, and convolutions would pass that on
            self.model.register_forward_pre_hook(_contiguous)
        self.has_batchnorm = bool(batchnorm_layers(self.model))
        self.tracker = None
        if self.has_batchnorm:
            self.tracker = StatisticsTracker(self.model, _estimators(config))
            if config.statistics.normalization_batch:
                set_normalization_batch(self.model, config.statistics.normalization_batch)

        self.scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
        rules = {"ema": training.averages.ema, "swa": training.averages.swa}
        self.averages = {
            name: ParameterAverage(self.model, rule) for name, rule in rules.items() if rule
        }
        self.plateau = Plateau()
        self.ema_accuracy = EmaAccuracy(training.ema_accuracy_decay)
        self.steps_per_epoch = self.data.train.steps_per_epoch(training.batch_size)
        self.total_steps = training.steps or max(1, round(training.epochs * self.steps_per_epoch))

        self.step = 0
        self.best_metric: float | None = None
        self.best_step = 0
        self.best_ema_accuracy = 0.0
        self.checks_at_chance = 0
        self.evaluations_without_improvement = 0
        self.stopped: str | None = None

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Built when first used: torch.optim then imports torch's compiler, and evaluating a run
        need not wait for that."""
        return build_optimizer(self.config.training.optimizer, self.model)

    @property
    def frozen(self) -> bool:
        freeze_from = self.config.statistics.freeze_from_step
        return freeze_from is not None and self.step >= freeze_from

    def freeze_when_due(self) -> None:
        """From `statistics.freeze_from_step` on, normalize with the running statistics."""
        if self.has_batchnorm and self.step == self.config.statistics.freeze_from_step:
            freeze_batchnorm(self.model)

    def estimates(self) -> dict[str, Statistics]:
        """The online estimates, the running statistics first."""
        return self.tracker.statistics() if self.tracker else {}

    def autocast(self):
        precision = self.config.training.precision
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, precision))

    def averaged_model(self, weights: str) -> nn.Module:
        """A copy of the model that has the averaged weights `ema` or `swa`."""
        return self.averages[weights].model_with_average(self.model)

    def check(self) -> None:
        """UserError where a mini-batch would give a BN layer a single value per channel."""
        if "batch" in self.config.test.statistics and len(self.data.test) < 2:
            raise UserError("test.statistics has batch, and there is one test image only")
        size = self.config.training.batch_size
        if not self.has_batchnorm or size > 1:
            return
        x, _ = next(self.data.train.training_batches(size))
        state = torch.get_rng_state()
        try:
            with torch.no_grad():
                copy.deepcopy(self.model).train()(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"training.batch_size is {size}: a BN layer of {self.config.model.name} sees one "
                "value per channel, which has no variance; take at least 2"
            ) from None
        finally:
            torch.set_rng_state(state)

    def state_dict(self) -> dict:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["device"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            rng["device"] = torch.mps.get_rng_state()
        return {
            "config": self.config.to_yaml(),
            "model": self.model.state_dict(),
            "tracker": self.tracker.state_dict() if self.tracker else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": {name: a.state_dict() for name, a in self.averages.items()},
            "plateau": self.plateau.state_dict(),
            "ema_accuracy": self.ema_accuracy.state_dict(),
            "rng": rng,
            **{name: getattr(self, name) for name in self._COUNTERS},
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`. UserError if it belongs to another model or lacks something."""
        if missing := self.state_dict().keys() - state.keys():
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        self.load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        self.plateau.load_state_dict(state["plateau"])
        self.ema_accuracy.load_state_dict(state["ema_accuracy"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "device" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["device"], self.device)
        elif self.device.type == "mps" and "device" in state["rng"]:
            torch.mps.set_rng_state(state["rng"]["device"])
        for name in self._COUNTERS:
            setattr(self, name, state[name])
        if self.frozen and self.has_batchnorm:
            freeze_batchnorm(self.model)

    def load_weights(self, state: dict) -> None:
        """Take the weights and estimates alone, for evaluation."""
        if missing := {"model", "tracker", "averages", "step"} - state.keys():
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            detail = str(error).splitlines()[1:2] or [str(error)]
            raise UserError(
                f"the checkpoint belongs to another model than {self.config.model.name}: "
                f"{detail[0].strip()}"
            ) from None
        if self.tracker:
            self.tracker.load_state_dict(state["tracker"])


def _contiguous(model: nn.Module, inputs: tuple) -> tuple:
    """With the strides of a contiguous tensor, also where a single channel leaves a choice."""
    return tuple(x.flatten().view(x.shape) for x in inputs)
