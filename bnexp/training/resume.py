"""Going on with a run: what may have changed since, and from which checkpoint."""

from __future__ import annotations

from typing import Any

from bnexp.config import Config, resolve
from bnexp.dotted import dotted, within
from bnexp.errors import UserError
from bnexp.records import Run
from bnexp.records.environment import describe_resume
from bnexp.training.build import Training, freeze_when_due
from bnexp.training.checkpoints import newest_checkpoint, remove_torn, step_checkpoints
from bnexp.training.display import Display

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


def changes_of(run: Run, config: Config) -> Changes:
    """What `config` changes of the run's own. UserError, with the keys, where another model, data
    or training would be continued."""
    before = dotted(resolve(run.config, [], f"{run.path}/config.yaml").model_dump(mode="json"))
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
    return changes


def go_on(run: Run, training: Training, changes: Changes, display: Display) -> None:
    """Go on from the run's newest whole checkpoint, if it has one. Mutates `training.state`.

    Records the resume in environment.json, writes config.yaml anew, and removes what lies beyond
    the checkpoint. The caller holds the run's lock. Raises UserError if there is nothing to do.
    """
    config, state = training.config, training.state
    run.checkpoints.mkdir(exist_ok=True)
    found, passed_over = newest_checkpoint(run.checkpoints)
    for line in passed_over:
        display.warn(line)
    if found is not None:
        longer = training.total_steps > found["step"] and _may_go_on(found["stopped"], changes)
        if _finished(run) and not longer:
            raise UserError(
                f"{run.path} has finished at step {found['step']}; give it more: training.steps=N"
            )
        if training.total_steps < found["step"]:
            raise UserError(
                f"{run.path} has done {found['step']} steps already, so its length can't become "
                f"{training.total_steps}"
            )
        state.load_state_dict(found)
        freeze_when_due(training)
        _allow_what_changed(training, changes, display)
        for newer in step_checkpoints(run.checkpoints):
            if newer.name > f"step-{state.step:09d}.pt":
                newer.unlink()
    for folder in (run.path, run.checkpoints):
        remove_torn(folder)
    environment = run.environment
    environment.setdefault("resumes", []).append(describe_resume(state.step, changes))
    run.write_json("environment.json", environment)
    run.write("config.yaml", config.to_yaml())


def _finished(run: Run) -> bool:
    try:
        return run.state["state"] == "finished"
    except UserError:  # a damaged state.json is written anew
        return False


def _may_go_on(stopped: str | None, changes: Changes) -> bool:
    """Whether a run that stopped by itself is given a reason to go on."""
    return not stopped or any(within(key, (*LENGTH, "training.early_stopping")) for key in changes)


def _allow_what_changed(training: Training, changes: Changes, display: Display) -> None:
    state = training.state
    if state.stopped and _may_go_on(state.stopped, changes):
        state.stopped = None
        state.best.evaluations_since = 0
    if "training.early_stopping.metric" in changes or "training.early_stopping" in changes:
        state.best.forget()
    schedule = training.config.training.schedule.name
    if any(key in changes for key in LENGTH) and schedule not in ("constant", "plateau"):
        display.warn(
            f"with another length the {schedule} schedule is stretched: the learning rate jumps "
            "where the run goes on"
        )
