"""What changes with a step of a training, and how it goes into a checkpoint and out of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnexp.condition import Weights
from bnexp.errors import UserError
from bnexp.statistics import Statistics, StatisticsTracker
from bnexp.training.averages import WeightAverage
from bnexp.training.guards import Best, Collapse, Plateau
from bnexp.training.metrics import EmaAccuracy


@dataclass
class TrainingState:
    """The parts of a training that a step changes. Each owns its `state_dict`; this joins them.

    `step` counts the updates made; `stopped` says why the training ended before its length, if it
    did. `tracker` is None for a network without BN.
    """

    device: torch.device
    model: nn.Module
    tracker: StatisticsTracker | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    averages: Mapping[Weights, WeightAverage]
    ema_accuracy: EmaAccuracy
    collapse: Collapse
    plateau: Plateau
    best: Best
    step: int = 0
    stopped: str | None = None

    def estimates(self) -> dict[str, Statistics]:
        """The online estimates, the running statistics first."""
        return self.tracker.statistics() if self.tracker else {}

    @property
    def is_finite(self) -> bool:
        """Of every parameter and running statistic. Waits for the device once."""
        both = (*self.model.parameters(), *self.model.buffers())
        tensors = [t for t in both if t.is_floating_point()]
        return bool(torch.stack([t.detach().isfinite().all() for t in tensors]).all())

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "stopped": self.stopped,
            "model": self.model.state_dict(),
            "tracker": self.tracker.state_dict() if self.tracker else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": {name: a.state_dict() for name, a in self.averages.items()},
            "ema_accuracy": self.ema_accuracy.state_dict(),
            "collapse": self.collapse.state_dict(),
            "plateau": self.plateau.state_dict(),
            "best": self.best.state_dict(),
            "rng": rng_state(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. UserError if it belongs to another training or lacks something."""
        if missing := self.state_dict().keys() - state.keys():
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        load_weights(self.model, self.tracker, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        self.ema_accuracy.load_state_dict(state["ema_accuracy"])
        self.collapse.load_state_dict(state["collapse"])
        self.plateau.load_state_dict(state["plateau"])
        self.best.load_state_dict(state["best"])
        self.step, self.stopped = state["step"], state["stopped"]
        load_rng_state(self.device, state["rng"])


def load_weights(
    model: nn.Module, tracker: StatisticsTracker | None, state: Mapping[str, Any]
) -> None:
    """The weights and estimates of a checkpoint. UserError if they are another model's."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        detail = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(f"the checkpoint belongs to another model: {detail[0].strip()}") from None
    if tracker:
        tracker.load_state_dict(state["tracker"])


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        rng["device"] = torch.mps.get_rng_state()
    return rng


def load_rng_state(device: torch.device, rng: Mapping[str, torch.Tensor]) -> None:
    """The generators' states; a device's only where the run was on one of its kind before."""
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "device" in rng:
        torch.cuda.set_rng_state(rng["device"], device)
    elif device.type == "mps" and "device" in rng:
        torch.mps.set_rng_state(rng["device"])
