"""bnexp train: the experiment, then a table and a picture."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from bnexp.cli.streams import printing_what_can_be
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
    changed_data: bool = False,
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

    outcome = run_experiment(
        settings, resume=run, progress=True, handle_signals=True, changed_data=changed_data
    )
    with printing_what_can_be():
        print_comparison(outcome.comparison)
        print(f"run: {outcome.record.path}")
    _draw(outcome.record)
    if outcome.unmet:
        raise ExpectationNotMet(outcome.unmet)


def _draw(run: Run) -> None:
    """results.png. Whatever keeps it from being drawn, the training is done."""
    try:
        from bnexp.report import write_results_png

        write_results_png(run)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        with contextlib.suppress(OSError, ValueError):
            print(f"bnexp: results.png could not be drawn ({reason:.300})", file=sys.stderr)


def _settings(path: str | None, overrides: list[str], run: Run | None) -> Config:
    if path is not None:
        return load_config(Path(path), overrides)
    if run is None:
        raise UserError("name a config, as in: bnexp train configs/digits.yaml")
    return resolve(run.config, overrides, f"{run.path}/config.yaml")
