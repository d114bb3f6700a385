"""What a config would do, and about how long and in how much memory, without a record."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bnexp.config import Config
from bnexp.device import describe_device, estimate_step_bytes
from bnexp.training.build import Training, autocast, build_training
from bnexp.training.loop import train_step

STEPS = 5
SECONDS = 4.0


@dataclass(frozen=True)
class Plan:
    """`seconds`: of the training with its evaluations and the comparison at the end, from a few
    steps and one test batch that were run; imports and reading the data are not in it.
    `step_bytes`: of one step, None where the network can't be counted."""

    model: str
    parameters: int
    data: str
    training_images: int
    test_images: int
    device: str
    steps: int
    batch_size: int
    step_seconds: float
    seconds: float
    step_bytes: int | None


def plan(config: Config, device: torch.device) -> Plan:
    """Resolve the data, the network and the device, and try some steps. Leaves nothing behind.
    Raises UserError where a training would."""
    training = build_training(config, device)
    info, data = training.data.info, training.data
    try:
        step_bytes: int | None = estimate_step_bytes(
            training.state.model, info.channels, info.image_size, config.training.batch_size
        )
    except Exception:  # a network that meta tensors can't run
        step_bytes = None
    step_seconds = _step_seconds(training)
    image_seconds = _image_seconds(training)
    kinds = 1 + len(config.statistics.estimators) + ("batch" in config.test.statistics)
    recomputed = config.statistics.recompute.samples or len(data.train)
    looks = training.total_steps // config.test.every if config.test.every else 0
    again = "recomputed" in config.test.statistics
    images = looks * (kinds + again) * len(data.test) + looks * again * recomputed
    images += (kinds + 1) * len(data.test) + recomputed
    return Plan(
        model=config.model.name,
        parameters=sum(p.numel() for p in training.state.model.parameters()),
        data=info.name,
        training_images=len(data.train),
        test_images=len(data.test),
        device=describe_device(device),
        steps=training.total_steps,
        batch_size=config.training.batch_size,
        step_seconds=step_seconds,
        seconds=training.total_steps * step_seconds + images * image_seconds,
        step_bytes=step_bytes,
    )


def _step_seconds(training: Training) -> float:
    """The quickest of a few, after one that is slow for being the first."""
    state = training.state
    batches = training.data.train.training_batches(training.config.training.batch_size)
    state.model.train()
    took: list[float] = []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        train_step(training, state.model, batches, training.learning_rate)
        _wait(training.device)
        took.append(time.perf_counter() - started)
        if len(took) > 1 and sum(took) > SECONDS:
            break
    return min(took[1:])


def _image_seconds(training: Training) -> float:
    """Of a test image in inference."""
    state = training.state
    state.model.eval()
    x, _ = next(iter(training.data.test.batches(training.config.test.batch_size)))
    took = []
    with torch.inference_mode(), autocast(training.config, training.device):
        for _ in range(2):
            started = time.perf_counter()
            state.model(x)
            _wait(training.device)
            took.append(time.perf_counter() - started)
    return min(took) / len(x)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
