"""What a training has left behind, for looking at: a model, its estimates and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnexp.condition import Weights
from bnexp.config import Config
from bnexp.data import Data, load_data
from bnexp.errors import UserError
from bnexp.statistics import Statistics
from bnexp.training.averages import averaged_parameters, with_parameters
from bnexp.training.build import build_network, data_settings, track
from bnexp.training.checkpoints import load_checkpoint, newest_checkpoint
from bnexp.training.state import load_weights

_CONDITIONS: dict[str, Weights] = {"last": "trained", "best": "best", "ema": "ema", "swa": "swa"}


@dataclass(frozen=True)
class Trained:
    """A model of a run, the online estimates made with its trained weights (the running averages
    first), the run's data, the step, and a line for each damaged checkpoint passed over."""

    config: Config
    device: torch.device
    weights: Weights
    model: nn.Module
    estimates: dict[str, Statistics]
    data: Data
    step: int
    passed_over: list[str]


def load_trained(run: Path, config: Config, device: torch.device, weights: str) -> Trained:
    """The model that the run folder holds, with the weights `last`, `best`, `ema` or `swa`.

    Seeds torch's global generator. Raises UserError where the run has no such weights.
    """
    checkpoints = run / "checkpoints"
    passed_over: list[str] = []
    if weights == "best":
        state: dict[str, Any] | None = load_checkpoint(checkpoints / "best.pt")
    else:
        state, passed_over = newest_checkpoint(checkpoints)
    if state is None:
        raise UserError(f"{run} has no checkpoint yet; go on: bnexp train --resume {run}")
    data = load_data(data_settings(config.data), seed=config.seed, device=device)
    model = build_network(config, data, device)
    tracker = track(model, config)
    load_weights(model, tracker, state)
    estimates = tracker.statistics() if tracker else {}
    if weights in ("ema", "swa"):
        model = _averaged(model, state["averages"], weights, run)
    of = _CONDITIONS[weights]
    return Trained(config, device, of, model, estimates, data, state["step"], passed_over)


def _averaged(model: nn.Module, averages: Mapping[str, Any], weights: str, run: Path) -> nn.Module:
    if weights not in averages:
        raise UserError(f"{run} has no {weights} weights: training.averages.{weights} was not set")
    parameters = averaged_parameters(averages[weights], list(model.parameters()))
    if not averages[weights]["count"]:
        raise UserError(f"{run} has not averaged any {weights} weights yet")
    return with_parameters(model, parameters)
