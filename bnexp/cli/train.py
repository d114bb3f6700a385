"""bnexp train: the experiment, then a table and a picture."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bnexp.cli.processes import check_count, joined_ranks, start_processes
from bnexp.cli.streams import printing_what_can_be
from bnexp.config import Config, load_config, resolve
from bnexp.config.schema import PLAIN_NAME
from bnexp.config.shipped import find_config
from bnexp.errors import ExpectationNotMet, UserError
from bnexp.importing import require_extra
from bnexp.memory_size import format_bytes
from bnexp.performance import prepare_process, quick_imports, wait_briefly
from bnexp.records import RUNS, Run, find_run
from bnexp.report.beside import Drawer

if TYPE_CHECKING:
    from bnexp.experiment import Outcome

EPOCHS = 10
"""Of a training that no file describes and no override limits."""


def run_train(
    config: str | None,
    overrides: list[str],
    device: str | None,
    name: str | None,
    resume: str | None,
    changed_data: bool = False,
    *,
    runs: Path = RUNS,
    processes: int | None = None,
    quiet: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Train and print the comparison. ExpectationNotMet where the config expected more.

    In one of several processes rank 0 alone prints. With `processes` these are started, and this
    one exits as they do.
    """
    check_count(processes)
    assignments = list(overrides)
    if config and "=" in config:
        assignments.insert(0, config)
        config = None
    if device is not None:
        assignments.append(f"device={json.dumps(device)}")
    if name is not None:
        assignments.append(f"name={json.dumps(name)}")
    with joined_ranks() as ranks, contextlib.ExitStack() as stack:
        with ranks.together("the command line"):
            run = find_run(resume, runs) if resume else None
            settings = _settings(config, assignments, run)
            settings.require_gates()
            if settings.logging.tensorboard:  # said before torch is imported
                require_extra("tensorboard", "logging.tensorboard")
            several = ranks.size > 1 or (processes or 1) > 1
            if several and dry_run:
                raise UserError("--dry-run tries one process out: leave --processes out")
            if run is not None and dry_run:
                raise UserError("--dry-run is of a training from its start: leave --resume out")
        if processes is not None and processes > ranks.size:
            settings.require_parts_for(processes)
            start_processes(processes)
        # Before others of its own are busy, and both before torch is imported.
        wait_briefly()
        drawer = stack.enter_context(Drawer()) if ranks.rank == 0 and not dry_run else None
        with quick_imports():
            prepare_process(settings.performance.allocator, settings.performance.tf32)
            from bnexp.experiment import run_experiment
        if dry_run:
            _print_plan(settings, as_json)
            return
        outcome = run_experiment(
            settings,
            resume=run,
            runs=runs,
            progress=not quiet,
            handle_signals=True,
            changed_data=changed_data,
            ranks=ranks,
        )
        if drawer is not None:
            with drawer.drawing(outcome.record.path):
                _show(outcome, as_json)
        # The agent asks the others to end as soon as one does so with another code than 0.
        ranks.gather(None, "the end")
        if outcome.unmet:
            raise ExpectationNotMet(outcome.unmet)


def _show(outcome: Outcome, as_json: bool) -> None:
    from bnexp.cli.tables import print_comparison

    with printing_what_can_be():
        if as_json:
            state = outcome.record.state
            head = {"run": str(outcome.record.path), "step": state["step"]}
            found = {**head, "weights": outcome.weights, **outcome.comparison.to_dict()}
            print(json.dumps(found, indent=2, allow_nan=False))
        else:
            print_comparison(outcome.comparison)
            print(f"run: {outcome.record.path}")


def _settings(given: str | None, overrides: list[str], run: Run | None) -> Config:
    """The config of a file, of the run to resume, or of overrides that name model and data."""
    if given is not None:
        return load_config(find_config(given), overrides)
    if run is not None:
        return resolve(run.config, overrides, f"{run.path}/config.yaml")
    named = dict(text.partition("=")[::2] for text in overrides)
    if not {"model.name", "data.name"} <= named.keys():
        raise UserError(
            "name a config, as in: bnexp train digits; or a network and data: bnexp train "
            "model.name=resnet20 data.name=digits"
        )
    words = f"{named['model.name'].rpartition('/')[2]}-{named['data.name']}"
    tree = {"name": words if PLAIN_NAME.fullmatch(words) else "run", "training": {"epochs": EPOCHS}}
    return resolve(tree, overrides, "the overrides")


def _print_plan(config: Config, as_json: bool) -> None:
    from bnexp.device import resolve_device
    from bnexp.training.plan import plan

    found = plan(config, resolve_device(config.device))
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(config.to_yaml())
    memory = "" if found.step_bytes is None else f", about {format_bytes(found.step_bytes)} a step"
    print(
        f"{found.model} ({found.parameters:,} parameters) on {found.data} "
        f"({found.training_images:,} training, {found.test_images:,} test images), on "
        f"{found.device}: {found.steps:,} steps of {found.batch_size}, about "
        f"{found.seconds:,.0f} s ({1000 * found.step_seconds:.3g} ms a step, evaluations and the "
        f"comparison included, as measured just now){memory}. Nothing was written."
    )
