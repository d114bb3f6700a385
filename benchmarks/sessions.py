"""What the benchmarks of training share: real sessions and loops on random images."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from bnexp.config import resolve
from bnexp.data import catalogue, files
from bnexp.performance import allow_tf32
from bnexp.records import Run, create_run
from bnexp.training.loop import Logs, Trainer
from bnexp.training.session import Session, data_settings

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


def make_session(
    model: str, device: torch.device, batch_size: int, performance: dict, train: int, test: int
) -> Session:
    """A session on random images, in training mode; two estimators besides the running one."""
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
    session = Session(config, device, data)
    allow_tf32(session.config.performance.tf32)
    session.model.train()
    return session


class Stopwatch:
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

    def numbers(self, row: tuple | None) -> None:
        pass

    def line(self, text: str) -> None:
        pass


class Loop:
    """bnexp's own training loop with all its logging, a stretch of steps at a time."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session = session
        self.run: Run = create_run(session.config, {}, folder)

    def seconds(self, steps: int, warm: int) -> float:
        """Of `steps` steps after `warm` untimed ones. What the loop does every so many steps is
        in it where `warm` and `steps` are multiples of that; a final checkpoint is not."""
        session = self.session
        watch = Stopwatch(session.device, session.step + warm, session.step + warm + steps)
        session.total_steps = session.step + warm + steps
        with Logs(self.run, session.step) as logs:
            Trainer(self.run, session, watch, logs).train(False)
        return watch.seconds


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
