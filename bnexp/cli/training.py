"""What `bnexp train` does besides the experiment: settings of the process, a table, a picture."""

from __future__ import annotations

from pathlib import Path

from bnexp.config import Config, load_config, resolve
from bnexp.errors import ExpectationNotMet, UserError
from bnexp.performance import prepare_process
from bnexp.records import Run, find_run


def train_and_show(path: Path | None, overrides: list[str], resume: str | None) -> None:
    """Train and print the comparison. ExpectationNotMet where the config expected more."""
    run = find_run(resume) if resume else None
    config = _config(path, overrides, run)
    prepare_process(config.performance.allocator, config.performance.tf32)

    from bnexp.cli.tables import print_comparison
    from bnexp.experiment import run_experiment
    from bnexp.report import write_results_png

    outcome = run_experiment(config, resume=run, progress=True, handle_signals=True)
    write_results_png(outcome.record)
    print_comparison(outcome.comparison)
    print(f"run: {outcome.record.path}")
    if outcome.unmet:
        raise ExpectationNotMet(outcome.unmet)


def _config(path: Path | None, overrides: list[str], run: Run | None) -> Config:
    if path is not None:
        return load_config(path, overrides)
    if run is None:
        raise UserError("name a config, as in: bnexp train configs/digits.yaml")
    return resolve(run.config, overrides, f"{run.path}/config.yaml")
