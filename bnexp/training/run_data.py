"""The data that a run was trained on, and no others."""

from __future__ import annotations

from dataclasses import replace

import torch

from bnexp.config import Config
from bnexp.data import Data, load_data
from bnexp.data.identity import describe_change, describe_renumbering, split_by_number
from bnexp.errors import UserError
from bnexp.records import Run
from bnexp.records.files import read_json
from bnexp.training.build import data_settings

FILE = "data.json"


def load_run_data(
    run: Run, config: Config, device: torch.device, accept_changes: bool
) -> tuple[Data, str | None]:
    """The data of `run`, and what has changed about them since they were recorded, in a line.

    UserError if they have changed, unless `accept_changes`, and always where the classes are
    numbered in another way. Runs made before data were recorded get theirs unchecked.
    """
    recorded = read_json(run.path / FILE)
    settings = replace(data_settings(config.data), split_by_number=split_by_number(recorded))
    data = load_data(settings, seed=config.seed, device=device)
    if recorded is None:
        return data, None
    change = describe_change(recorded, data.fingerprint)
    if renumbered := describe_renumbering(recorded, data.fingerprint):
        raise UserError(
            f"the data of {run.path} have changed: {change}; {renumbered}, which the model would "
            "take for another: name the folders so that they sort as before"
        )
    if change and not accept_changes:
        raise UserError(
            f"the data of {run.path} have changed: {change}; to go on with them all the same: "
            "--changed-data"
        )
    return data, change
