"""Going on with a run: what may have changed since, and from which checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from bnexp.config import Config, resolve
from bnexp.config.yaml_text import parse_yaml
from bnexp.dotted import dotted, within
from bnexp.errors import UserError, shown
from bnexp.records import Run
from bnexp.records.environment import describe_resume
from bnexp.training.build import Training, freeze_when_due
from bnexp.training.checkpoints import (
    newest_checkpoint,
    remove_torn,
    restore_best,
    step_checkpoints,
    step_path,
)
from bnexp.training.display import Display
from bnexp.training.processes import by_rank_0
from bnexp.training.run_data import FILE as DATA_FILE

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
    changes = _changes(resolve(run.config, [], f"{run.path}/config.yaml"), config)
    if refused := _refused(changes):
        raise UserError(
            f"{run.path} can't be resumed with another model, data or training ({refused}); "
            "start a new run for that"
        )
    if config.training.averages.swa and any(key in changes for key in LENGTH):
        raise UserError(
            f"{run.path} averages weights from a share of the run on (training.averages.swa): "
            "another length would move that start; resume it without changing its length"
        )
    return changes


def _changes(before: Config, after: Config) -> Changes:
    one, other = (dotted(config.model_dump(mode="json")) for config in (before, after))
    return {
        key: [one.get(key), other.get(key)]
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key) and key != "name"
    }


def _refused(changes: Changes) -> str:
    keys = [key for key in changes if not within(key, MAY_CHANGE)]
    return "; ".join(f"{k}: {shown(changes[k][0])} became {shown(changes[k][1])}" for k in keys)


def go_on(
    run: Run, training: Training, changes: Changes, changed_data: str | None, display: Display
) -> None:
    """Go on from the run's newest whole checkpoint, if it has one. Mutates `training.state`.

    Records the resume in environment.json, writes config.yaml anew, and removes what lies beyond
    the checkpoint. The caller holds the run's lock. Raises UserError if there is nothing to do, or
    if the checkpoint is not one of this run.
    """
    ranks = training.processes.ranks
    found = by_rank_0(ranks, "the checkpoint", lambda: _newest(run, training, display))
    if found is not None:
        _load(run, training, *found, display)
    by_rank_0(ranks, "the resume", lambda: _record(run, training, changes, changed_data, display))


def has_checkpoint(run: Run) -> bool:
    """UserError if there are only damaged ones."""
    return newest_checkpoint(run.checkpoints)[0] is not None


def require_same_weights(run: Run, training: Training) -> None:
    """UserError if `model.weights` were loaded that are not those the run was begun with."""
    recorded = run.environment.get("weights")
    if training.given is None or not isinstance(recorded, dict):
        return
    if recorded.get("hash") != training.given.hash:
        raise UserError(
            f"model.weights {training.config.model.weights} are others than when {run.path} was "
            "begun, and it has no checkpoint yet: start a new run"
        )


def _newest(
    run: Run, training: Training, display: Display
) -> tuple[dict[str, Any], Changes] | None:
    """The state in the run's newest whole checkpoint, and what the config changes of its config.
    None where there is none; UserError if this training can't go on from it."""
    if run.checkpoints.is_symlink():
        raise UserError(f"{run.checkpoints} is a link: a run writes into its own folder alone")
    run.checkpoints.mkdir(exist_ok=True)
    found, passed_over = newest_checkpoint(run.checkpoints)
    for line in passed_over:
        display.warn(line)
    if found is None:
        return None
    since = _changes_since(run, training.config, found)
    longer = training.total_steps > found["step"] and _may_go_on(found.get("stopped"), since)
    if _finished(run) and not longer:
        raise UserError(
            f"{run.path} has finished at step {found['step']}; give it more: training.steps=N"
        )
    if training.total_steps < found["step"]:
        raise UserError(
            f"{run.path} has done {found['step']} steps already, so its length can't become "
            f"{training.total_steps}"
        )
    return found, since


def _load(
    run: Run, training: Training, found: dict[str, Any], since: Changes, display: Display
) -> None:
    """Take the state in `found`, and make the checkpoints what they were when it was written."""
    state, writes = training.state, training.processes.writes
    try:
        state.load_state_dict(found)
    except UserError as error:
        raise UserError(f"{run.checkpoints}, step {found['step']}: {error}") from None
    freeze_when_due(training)
    _allow_what_changed(training, since, display)
    if training.best_file is None:
        state.best.forget()  # chosen on the test images by a former version
    if not writes:
        return
    for newer in step_checkpoints(run.checkpoints):
        if newer.name > step_path(run.checkpoints, state.step).name:
            newer.unlink()
    if training.best_file is not None and state.best.step:
        restore_best(run.checkpoints, training.best_file, state.best.step, state.step)


def _record(
    run: Run,
    training: Training,
    changes: Changes,
    changed_data: str | None,
    display: Display,
) -> None:
    """Write down that, and how, the run goes on."""
    for folder in (run.path, run.checkpoints):
        remove_torn(folder)
    environment = run.environment
    resumes = environment.setdefault("resumes", [])
    _say_other_numbers(environment, training, display)
    processes = training.processes.ranks.size
    resume = describe_resume(training.state.step, torch.get_num_threads(), changes, processes)
    if changed_data is not None:
        display.warn(f"the data have changed: {changed_data}")
        resume["changed_data"] = changed_data
        run.write_json(DATA_FILE, training.data.fingerprint)
    resumes.append(resume)
    run.write_json("environment.json", environment)
    run.write("config.yaml", training.config.to_yaml())


def _changes_since(run: Run, config: Config, found: dict[str, Any]) -> Changes:
    """What `config` changes of the config in a checkpoint. UserError if the checkpoint is another
    run's, or one of another training."""
    where = f"{run.checkpoints}, step {found['step']}"
    if found.get("run") is not None and run.id is not None and found["run"] != run.id:
        raise UserError(f"{where}: the checkpoint is one of another run")
    text = found.get("config")
    tree = parse_yaml(text, where) if isinstance(text, str) else None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: the checkpoint has no config")
    changes = _changes(resolve(tree, [], where), config)
    if refused := _refused(changes):
        raise UserError(f"{where}: the checkpoint is one of another training ({refused})")
    return changes


def _say_other_numbers(environment: dict[str, Any], training: Training, display: Display) -> None:
    """How many processes and, on a CPU, threads there are decides the last digits of sums."""
    last = (environment["resumes"] or [{}])[-1]
    now = {"threads": torch.get_num_threads(), "processes": training.processes.ranks.size}
    if training.device.type != "cpu":
        del now["threads"]
    for what, number in now.items():
        before = environment.get(what, 1 if what == "processes" else None)
        if isinstance(last, dict):
            before = last.get(what, before)
        if before is not None and before != number:
            display.warn(
                f"the run had {shown(before)} {what} and goes on with {number}: from here on its "
                "numbers differ in the last digits from those of an undisturbed run"
                f"{' (set OMP_NUM_THREADS)' if what == 'threads' else ''}"
            )


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
    chosen_by = ("training.early_stopping.metric", "training.early_stopping", "checkpoints.best")
    if any(key in changes for key in chosen_by):
        state.best.forget()
    schedule = training.config.training.schedule.name
    if any(key in changes for key in LENGTH) and schedule not in ("constant", "plateau"):
        display.warn(
            f"with another length the {schedule} schedule is stretched: the learning rate jumps "
            "where the run goes on"
        )
