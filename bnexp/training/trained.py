"""What a training has left behind, for looking at: a model, its estimates and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnexp.condition import Weights
from bnexp.config import Config
from bnexp.data import Data
from bnexp.errors import UserError
from bnexp.records import Run
from bnexp.statistics import Statistics
from bnexp.training.averages import averaged_parameters, with_parameters
from bnexp.training.build import build_network, track
from bnexp.training.checkpoints import BEST, BEST_ON_TEST, load_checkpoint, newest_checkpoint
from bnexp.training.run_data import load_run_data
from bnexp.training.state import load_weights

CHOSEN_ON_TEST = (
    "These weights were chosen among all evaluations for their accuracy on these very test images: "
    "every accuracy here is better than on images that had no part in the choice."
)
_CONDITIONS: dict[str, Weights] = {
    "last": "trained",
    "best": "best",
    "best-on-test": "best-on-test",
    "ema": "ema",
    "swa": "swa",
}


@dataclass(frozen=True)
class Trained:
    """A model of a run, the online estimates made with its trained weights (the running averages
    first), the run's data, the step, lines to show before its numbers (`warnings`), and what every
    comparison of it has to say (`remarks`)."""

    config: Config
    device: torch.device
    weights: Weights
    model: nn.Module
    estimates: dict[str, Statistics]
    data: Data
    step: int
    warnings: list[str]
    remarks: tuple[str, ...]


def load_trained(
    run: Run, config: Config, device: torch.device, weights: str, changed_data: bool = False
) -> Trained:
    """The model that the run holds, with the weights `last`, `best`, `best-on-test`, `ema` or
    `swa`.

    Seeds torch's global generator. Raises UserError where the run has no such weights, and where
    its data have changed, unless `changed_data`.
    """
    state, warnings = _checkpoint(run, weights)
    data, change = load_run_data(run, config, device, changed_data)
    if change:
        warnings.append(f"the data of {run.path} have changed: {change}")
    model = build_network(config, data, device)
    tracker = track(model, config)
    try:
        load_weights(model, tracker, state)
        estimates = tracker.statistics() if tracker else {}
        if weights in ("ema", "swa"):
            model = _averaged(model, state.get("averages"), weights, run)
    except UserError as error:
        raise UserError(f"{run.checkpoints}, step {state['step']}: {error}") from None
    of = _CONDITIONS[weights]
    if of == "best" and data.val is None:  # as former versions chose
        of = "best-on-test"
    remarks = (CHOSEN_ON_TEST,) if of == "best-on-test" else ()
    return Trained(config, device, of, model, estimates, data, state["step"], warnings, remarks)


def _checkpoint(run: Run, weights: str) -> tuple[dict[str, Any], list[str]]:
    file = {"best": BEST, "best-on-test": BEST_ON_TEST}.get(weights)
    if file is None:
        state, passed_over = newest_checkpoint(run.checkpoints)
        if state is None:
            raise UserError(
                f"{run.path} has no checkpoint yet; go on: bnexp train --resume {run.path}"
            )
        return state, passed_over
    if not (run.checkpoints / file).exists():
        raise UserError(
            f"{run.path} has no {weights} weights: the best are kept where there are validation "
            "images to choose by (data.val_fraction), and best-on-test if asked for "
            "(checkpoints.best=best-on-test)"
        )
    return load_checkpoint(run.checkpoints / file), []


def _averaged(model: nn.Module, averages: Any, weights: str, run: Run) -> nn.Module:
    if not isinstance(averages, Mapping) or weights not in averages:
        raise UserError(f"no {weights} weights: training.averages.{weights} was not set")
    parameters = averaged_parameters(averages[weights], list(model.parameters()))
    if not averages[weights]["count"]:
        raise UserError(f"no {weights} weights have been averaged yet")
    return with_parameters(model, parameters)
