"""What the benchmarks of training share: real trainings and loops on random images."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bnexp.config import resolve
from bnexp.data import catalogue, files
from bnexp.performance import allow_tf32
from bnexp.records import Run, create_run
from bnexp.training.build import Training, build_training, data_settings
from bnexp.training.display import Silent
from bnexp.training.evaluations import Evaluations
from bnexp.training.logs import Logs
from bnexp.training.loop import train_steps
from bnexp.training.signals import Interruption

clock = time.perf_counter

# What the networks are usually trained on; the names' files are not needed.
DATA = {"small-cnn": ("fashion-mnist", 28, 1), "resnet20": ("cifar10", 32, 3)}


def random_arrays(size: int, channels: int, train: int, test: int) -> files.Arrays:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (train + test, size, size, channels), dtype=np.uint8)
    labels = rng.integers(0, 10, train + test)
    return files.Arrays(
        images[:train], labels[:train], images[train:], labels[train:], tuple("0123456789")
    )


def make_training(
    model: str, device: torch.device, batch_size: int, performance: dict, train: int, test: int
) -> Training:
    """A training on random images, in training mode; two estimators besides the running one."""
    name, size, channels = DATA[model]
    tree = {
        "name": "benchmark",
        "device": str(device),
        "data": {"name": name},
        "model": {"name": model},
        "statistics": {
            "estimators": {
                "ema-0.99": {"rule": "ema", "decay": 0.99},
                "average": {"rule": "cumulative"},
            }
        },
        "training": {
            "steps": 1_000_000_000,
            "batch_size": batch_size,
            "optimizer": {"lr": 0.001},
            "schedule": {"name": "constant"},
        },
        "checkpoints": {"every_seconds": None},
        "performance": performance,
    }
    config = resolve(tree, [], "benchmark")
    arrays = random_arrays(size, channels, train, test)
    data = catalogue.data_of(arrays, data_settings(config.data), 0, device)
    training = build_training(config, device, data)
    allow_tf32(config.performance.tf32)
    training.state.model.train()
    return training


class Stopwatch(Silent):
    """Stands in for the display of a training; times it from after `first` to after `last`."""

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        self._device = device
        self._first, self._last = first, last
        self._started = 0.0
        self.seconds = 0.0

    def step(self, step: int, images: int) -> bool:
        if step == self._first:
            wait_for(self._device)
            self._started = clock()
        elif step == self._last:
            wait_for(self._device)
            self.seconds = clock() - self._started
        return False


class Loop:
    """bnexp's own training loop with all its logging, a stretch of steps at a time."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training = training
        config = training.config
        self.run: Run = create_run(config.name, config.to_yaml(), {}, folder)

    def seconds(self, steps: int, warm: int) -> float:
        """Of `steps` steps after `warm` untimed ones. What the loop does every so many steps is
        in it where `warm` and `steps` are multiples of that; a final checkpoint is not."""
        first = self.training.state.step + warm
        watch = Stopwatch(self.training.device, first, first + steps)
        training = replace(self.training, total_steps=first + steps)
        with Logs(self.run, training, watch) as logs:
            evaluations = Evaluations(training, logs, watch)
            train_steps(self.run, training, watch, logs, evaluations, Interruption(()))
        return watch.seconds


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
