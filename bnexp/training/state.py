"""What changes with a step of a training, and how it goes into a checkpoint and out of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnexp.condition import Weights
from bnexp.errors import UserError, shown
from bnexp.statistics import Statistics, StatisticsTracker
from bnexp.training.averages import WeightAverage
from bnexp.training.guards import Best, Collapse, Plateau
from bnexp.training.likeness import require_like
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
    saved_step: int = 0
    """The step of the newest checkpoint, from which a resume would go on."""

    def estimates(self) -> dict[str, Statistics]:
        """The online estimates, the running statistics first."""
        return self.tracker.statistics() if self.tracker else {}

    def merge(self) -> None:
        """Join what the ranks' mini-batches gave to the estimates, in the buffers, too. All ranks
        call it."""
        if self.tracker:
            self.tracker.merge()

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
        """Go on from `state`. UserError if it belongs to another training, lacks something or
        holds what no training writes."""
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        load_weights(self.model, self.tracker, state)
        require_like(own["scaler"], state["scaler"], "scaler")
        require_like(own["rng"]["cpu"], _part(state["rng"], "cpu"), "rng.cpu")
        _require_optimizer(self.optimizer, state["optimizer"])
        if not isinstance(state["stopped"], str | None):
            raise UserError(f"stopped is {shown(state['stopped'])}")
        for name, average in self.averages.items():
            average.load_state_dict(_part(state["averages"], name))
        self.ema_accuracy.load_state_dict(state["ema_accuracy"])
        self.collapse.load_state_dict(state["collapse"])
        self.plateau.load_state_dict(state["plateau"])
        self.best.load_state_dict(state["best"])
        self.optimizer.load_state_dict(state["optimizer"])
        _lay_out(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.stopped = state["step"], state["stopped"]
        self.saved_step = self.step
        try:
            load_rng_state(self.device, state["rng"])
        except (RuntimeError, TypeError) as error:
            raise UserError(f"rng is no state of a generator: {error}") from None


def load_weights(
    model: nn.Module, tracker: StatisticsTracker | None, state: Mapping[str, Any]
) -> None:
    """The weights and estimates of a checkpoint. UserError if they are another model's or not
    numbers that a model can have."""
    own, found = model.state_dict(), state.get("model")
    if not isinstance(found, Mapping):
        raise UserError("the checkpoint lacks the model")
    try:
        require_like(own, found, "model")
    except UserError as error:
        raise UserError(f"the checkpoint belongs to another model: {error}") from None
    for name, tensor in found.items():
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise UserError(f"model.{name} has negative variances")
    model.load_state_dict(found)
    if tracker:
        estimates = state.get("tracker")
        if not isinstance(estimates, Mapping):
            raise UserError("the checkpoint lacks the estimates")
        of_this = tracker.state_dict()
        known = {name: value for name, value in estimates.items() if name in of_this}
        require_like(of_this, {**of_this, **known}, "tracker", finite=False)
        tracker.load_state_dict(estimates)


def _part(tree: Any, name: str) -> Any:
    if not isinstance(tree, Mapping) or name not in tree:
        raise UserError(f"the checkpoint has no {name}")
    return tree[name]


_SETTINGS = {"params", "weight_decay", "momentum", "nesterov", "betas"}
_MOMENTS = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def _require_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """UserError unless `state` is one of this optimizer: the same settings but for the learning
    rate, and numbers of the parameters' shapes."""
    own = optimizer.state_dict()
    groups = _part(state, "param_groups")
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        raise UserError("the optimizer has other groups of parameters")
    for mine, theirs in zip(own["param_groups"], groups, strict=True):
        for name in _SETTINGS & mine.keys():
            if _part(theirs, name) != mine[name]:
                raise UserError(
                    f"the optimizer's {name} was {shown(theirs[name])}, not {shown(mine[name])}"
                )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = _part(state, "state")
    if not isinstance(moments, Mapping) or not moments.keys() <= set(range(len(parameters))):
        raise UserError("the optimizer's state is about other parameters")
    names = next(names for kind, names in _MOMENTS.items() if isinstance(optimizer, kind))
    for index, entries in moments.items():
        if not isinstance(entries, Mapping) or (entries and entries.keys() != names):
            raise UserError(f"optimizer.state[{index}] is no state of {type(optimizer).__name__}")
        for name, value in entries.items():
            where = f"optimizer.state[{index}].{name}"
            if isinstance(value, Tensor) and value.ndim:
                require_like(parameters[index].detach(), value, where)
            elif isinstance(value, Tensor) and value.is_floating_point():
                require_like(value.new_zeros(()), value, where)
            elif value is not None:
                raise UserError(f"{where} is {shown(value)}")


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's tensors the strides of their parameters: fused steps go through memory
    and take them for granted, and those of a checkpoint may be another format's."""
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


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
