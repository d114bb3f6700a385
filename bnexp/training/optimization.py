"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

from bnexp.config.schema import OptimizerConfig, PlateauSchedule, ScheduleConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters, weight decay on weights alone.

    BN parameters and biases (everything with fewer than two dimensions) are not decayed: decaying
    a scale that the next layer's normalization undoes regularizes nothing.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = parameters[0].device.type in ("cpu", "cuda")
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused
    )


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


@dataclass
class Plateau:
    """Notices when the EMA training accuracy has stopped improving."""

    best: float = -math.inf
    best_step: int = 0
    reductions: int = 0

    def observe(self, schedule: PlateauSchedule, step: int, ema_accuracy: float) -> bool:
        """Take the EMA accuracy at `step`; count a reduction, and say True, on a plateau."""
        if ema_accuracy > self.best + schedule.min_delta:
            self.best, self.best_step = ema_accuracy, step
            return False
        if step - self.best_step < schedule.patience:
            return False
        self.best_step = step
        self.reductions += 1
        return True

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)
