"""Going on with a run: what may have changed since, and from which checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexp.atomic import write_atomically
from bnexp.config import load_config, resolve
from bnexp.dotted import dotted, within
from bnexp.errors import UserError
from bnexp.records import Run
from bnexp.records.environment import describe_resume

if TYPE_CHECKING:
    import torch

    from bnexp.config import Config
    from bnexp.training.session import Session

Changes = dict[str, list[Any]]
"""Dotted key -> its value before and after."""

# Everything else decides what is learned, or from what.
MAY_CHANGE = (
    "training.epochs",
    "training.steps",
    "training.early_stopping",
    "test",
    "checkpoints",
    "logging",
    "expect",
    "statistics.recompute",
    "device",
    "performance",
    "data.root",
    "data.workers",
)
LENGTH = ("training.epochs", "training.steps")


def resumed_config(run: Run, path: str | None, assignments: list[str]) -> tuple[Config, Changes]:
    """The config to go on with, and what it changes of the run's own.

    It is the run's, or the one at `path`, with the overrides `assignments`. Raises UserError,
    with the keys, where another model, data or training would be continued.
    """
    before = dotted(run.config)
    if path is None:
        config = resolve(run.config, assignments, f"{run.path}/config.yaml")
    else:
        config = load_config(Path(path), assignments)
    after = dotted(config.model_dump(mode="json"))
    changes = {
        key: [before.get(key), after.get(key)]
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key != "name"
    }
    if refused := [key for key in changes if not within(key, MAY_CHANGE)]:
        listed = "; ".join(f"{k}: {changes[k][0]!r} became {changes[k][1]!r}" for k in refused)
        raise UserError(
            f"{run.path} can't be resumed with another model, data or training ({listed}); "
            "start a new run for that"
        )
    if config.training.averages.swa and any(key in changes for key in LENGTH):
        raise UserError(
            f"{run.path} averages weights from a share of the run on (training.averages.swa): "
            "another length would move that start; resume it without changing its length"
        )
    return config, changes


def resume(run: Run, config: Config, device: torch.device, changes: Changes) -> Session:
    """A session that goes on from the run's newest whole checkpoint, or from the beginning.

    Records the resume in environment.json, writes config.yaml anew, and removes what lies beyond
    the checkpoint. The caller holds the run's lock. Raises UserError if there is nothing to do.
    """
    from bnexp.training.checkpoints import newest_checkpoint, remove_torn, step_checkpoints
    from bnexp.training.session import Session

    run.checkpoints.mkdir(exist_ok=True)
    state, passed_over = newest_checkpoint(run.checkpoints)
    for line in passed_over:
        print(f"bnexp: {line}", file=sys.stderr)
    session = Session(config, device)
    if state is not None:
        longer = session.total_steps > state["step"] and _may_go_on(state.get("stopped"), changes)
        if _finished(run) and not longer:
            raise UserError(
                f"{run.path} has finished at step {state['step']}; give it more: training.steps=N"
            )
        if session.total_steps < state["step"]:
            raise UserError(
                f"{run.path} has done {state['step']} steps already, so its length can't become "
                f"{session.total_steps}"
            )
        session.load_state_dict(state)
        _allow_what_changed(session, changes)
        for newer in step_checkpoints(run.checkpoints):
            if newer.name > f"step-{session.step:09d}.pt":
                newer.unlink()
    for folder in (run.path, run.checkpoints):
        remove_torn(folder)
    environment = run.environment
    environment.setdefault("resumes", []).append(describe_resume(session.step, changes))
    run.write_json("environment.json", environment)
    write_atomically(run.path / "config.yaml", config.to_yaml())
    return session


def _finished(run: Run) -> bool:
    try:
        return run.state["state"] == "finished"
    except UserError:  # a damaged state.json is written anew
        return False


def _may_go_on(stopped: str | None, changes: Changes) -> bool:
    """Whether a run that stopped by itself is given a reason to go on."""
    return not stopped or any(within(key, (*LENGTH, "training.early_stopping")) for key in changes)


def _allow_what_changed(session: Session, changes: Changes) -> None:
    if session.stopped and _may_go_on(session.stopped, changes):
        session.stopped = None
        session.evaluations_without_improvement = 0
    if "training.early_stopping.metric" in changes or "training.early_stopping" in changes:
        session.best_metric = None
        session.evaluations_without_improvement = 0
    schedule = session.config.training.schedule.name
    if any(key in changes for key in LENGTH) and schedule not in ("constant", "plateau"):
        print(
            f"bnexp: with another length the {schedule} schedule is stretched: the learning rate "
            "jumps where the run goes on",
            file=sys.stderr,
        )
