"""bnexp train: the experiment, then a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path

from bnexp.config import Config, load_config, resolve
from bnexp.errors import ExpectationNotMet, UserError
from bnexp.performance import prepare_process
from bnexp.records import Run, find_run


def run_train(
    config: str | None,
    overrides: list[str],
    device: str | None,
    name: str | None,
    resume: str | None,
) -> None:
    """Train and print the comparison. ExpectationNotMet where the config expected more."""
    assignments = list(overrides)
    if resume and config and "=" in config:
        assignments.insert(0, config)
        config = None
    if device is not None:
        assignments.append(f"device={json.dumps(device)}")
    if name is not None:
        assignments.append(f"name={json.dumps(name)}")
    run = find_run(resume) if resume else None
    settings = _settings(config, assignments, run)
    prepare_process(settings.performance.allocator, settings.performance.tf32)

    from bnexp.cli.tables import print_comparison
    from bnexp.experiment import run_experiment
    from bnexp.report import write_results_png

    outcome = run_experiment(settings, resume=run, progress=True, handle_signals=True)
    write_results_png(outcome.record)
    print_comparison(outcome.comparison)
    print(f"run: {outcome.record.path}")
    if outcome.unmet:
        raise ExpectationNotMet(outcome.unmet)


def _settings(path: str | None, overrides: list[str], run: Run | None) -> Config:
    if path is not None:
        return load_config(Path(path), overrides)
    if run is None:
        raise UserError("name a config, as in: bnexp train configs/digits.yaml")
    return resolve(run.config, overrides, f"{run.path}/config.yaml")
