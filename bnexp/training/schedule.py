"""Learning rates and other things that depend on the step alone."""

from __future__ import annotations

import math
import time

from bnexp.config.schema import CheckpointsConfig, ScheduleConfig


def learning_rate(
    schedule: ScheduleConfig, lr: float, step: int, total_steps: int, reductions: int = 0
) -> float:
    """The learning rate of update number `step` (from 0) of `total_steps`.

    `lr` is the optimizer's configured rate; `reductions` counts the plateaus met so far. The
    values are those of torch's MultiStepLR, CosineAnnealingLR, OneCycleLR and, for the warm-up,
    LinearLR(1 / (warmup + 1)).
    """
    if schedule.name == "one-cycle":
        return _one_cycle(schedule, lr, step, total_steps)
    warmup = min(1.0, (step + 1) / (schedule.warmup_steps + 1))
    if schedule.name == "step":
        passed = sum(step >= round(share * total_steps) for share in schedule.milestones)
        return lr * warmup * schedule.gamma**passed
    if schedule.name == "cosine":
        length = max(1, total_steps - schedule.warmup_steps)
        progress = max(0, step - schedule.warmup_steps) / length
        final = lr * schedule.final
        return warmup * (final + (lr - final) * (1 + math.cos(math.pi * progress)) / 2)
    if schedule.name == "plateau":
        return lr * warmup * schedule.factor**reductions
    return lr * warmup


def _one_cycle(schedule, lr: float, step: int, total_steps: int) -> float:
    """Smith & Topin 2018, with cosine legs."""
    first = lr / schedule.start
    last = first / schedule.end
    peak = schedule.rise * total_steps - 1
    if step <= peak:
        return _cosine_leg(first, lr, step / peak if peak else 1.0)
    return _cosine_leg(lr, last, (step - peak) / (total_steps - 1 - peak))


def _cosine_leg(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


class CheckpointClock:
    """Says when the next checkpoint is due, by steps or by time."""

    def __init__(self, config: CheckpointsConfig) -> None:
        self._config = config
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        every_steps, every_seconds = self._config.every_steps, self._config.every_seconds
        by_steps = every_steps is not None and step % every_steps == 0
        by_time = every_seconds is not None and time.monotonic() - self._last >= every_seconds
        if by_steps or by_time:
            self._last = time.monotonic()
        return by_steps or by_time
