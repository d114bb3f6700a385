"""bnexp train"""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnexp.errors import ExpectationNotMet, Interrupted, RunFailed, UserError, disk_failure
from bnexp.runs import Run, create_run, find_run, write_atomically

if TYPE_CHECKING:
    from bnexp.config import Config
    from bnexp.training.session import Session

# What a resumed run may change; everything else decides what is learned, or from what.
RESUMABLE = (
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


def train(
    config: Annotated[
        str | None, typer.Argument(help="YAML file; not needed with --resume.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="Dotted overrides: training.steps=500"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue this run from its checkpoint.")
    ] = None,
) -> None:
    """Train a network and compare its BN statistics."""
    from bnexp.config import load_config

    assignments = list(overrides or [])
    if resume and config and "=" in config:
        assignments.insert(0, config)
        config = None
    if device is not None:
        assignments.append(f"device={json.dumps(device)}")
    if name is not None:
        assignments.append(f"name={json.dumps(name)}")
    if resume:
        run = find_run(resume)
        settings, changes = _resumed_config(run, config, assignments)
    elif config:
        run, changes = None, {}
        settings = load_config(Path(config), assignments)
    else:
        raise UserError("name a config, as in: bnexp train configs/digits.yaml")

    if settings.performance.allocator:
        from bnexp.performance import keep_freed_memory

        keep_freed_memory()
    _train(settings, run, changes)


def _train(config: Config, run: Run | None, changes: dict) -> None:
    from filelock import Timeout

    from bnexp.device import describe_device, resolve_device
    from bnexp.performance import allow_tf32
    from bnexp.training.loop import check_batch
    from bnexp.training.session import Session

    device = resolve_device(config.device)
    allow_tf32(config.performance.tf32)
    if run is None:
        session = Session(config, device)
        check_batch(session)
        run = create_run(config, _environment(config, describe_device(device)))
        resumed = False
    else:
        resumed = True
    try:
        lock = run.lock()
        lock.acquire()
    except Timeout:
        raise UserError(f"{run.path} is still being trained by another process") from None
    with lock:
        if resumed:
            session = _resume(run, config, device, changes)
        _run_to_the_end(run, session)


def _run_to_the_end(run: Run, session: Session) -> None:
    from bnexp.cli.tables import print_comparison
    from bnexp.device import describe_device
    from bnexp.training.display import Display
    from bnexp.training.loop import train as train_session

    config = session.config
    _write_state(run, session, "running")
    display = Display(session.total_steps, session.step)
    parameters = sum(p.numel() for p in session.model.parameters())
    display.line(
        f"{run.path}: {config.model.name} ({parameters:,} parameters) on "
        f"{session.data.info.name} ({len(session.data.train):,} training, "
        f"{len(session.data.test):,} test images), {session.total_steps:,} steps of "
        f"{config.training.batch_size} on {describe_device(session.device)}"
    )
    try:
        with display:
            outcome = train_session(run, session, display)
    except Interrupted as error:
        _write_state(run, session, "interrupted", str(error))
        raise Interrupted(f"{error}; go on with: bnexp train --resume {run.path}") from None
    except KeyboardInterrupt:
        _write_state(run, session, "interrupted", "interrupted at once")
        raise Interrupted(
            f"interrupted; go on from the last checkpoint with: bnexp train --resume {run.path}"
        ) from None
    except RunFailed as error:
        _write_state(run, session, "failed", str(error))
        raise
    except Exception as error:
        error = _explained(error, run, session)
        _write_state(run, session, "failed", str(error) or type(error).__name__)
        raise error from None
    _write_state(run, session, "finished", outcome.message, outcome.weights)
    if outcome.message:
        display.line(outcome.message)
    _write_picture(run)
    print_comparison(outcome.comparison)
    print(f"run: {run.path}")
    _check_expectations(config, outcome.comparison)


def _write_state(run: Run, session, state: str, message: str | None = None, weights="last") -> None:
    try:
        run.write_state(state, session.step, session.total_steps, weights, message)
    except OSError:
        if state != "failed":
            raise


def _write_picture(run: Run) -> None:
    from bnexp.report import write_results_png

    write_results_png(run)


def _check_expectations(config: Config, comparison) -> None:
    wanted = config.expect.test_accuracy
    found = comparison.kinds[0].accuracy
    if wanted is not None and found < wanted:
        raise ExpectationNotMet(
            f"expect.test_accuracy: {wanted:.2%} was expected, {found:.2%} was reached"
        )


def _explained(error: Exception, run: Run, session: Session) -> Exception:
    """The one line for an error that has an answer, or the error itself."""
    from bnexp.device import is_out_of_memory

    if is_out_of_memory(error):
        return RunFailed(_out_of_memory(session))
    if isinstance(error, OSError) and not run.checkpoints.is_dir():
        return RunFailed(f"{run.checkpoints}/ was removed while the run was being trained")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return RunFailed(
            f"torch.compile can't compile {session.config.model.name} here ({reason}); set "
            "performance.compile=false"
        )
    return disk_failure(error) or error


def _out_of_memory(session) -> str:
    from bnexp.device import estimate_step_bytes

    info, size = session.data.info, session.config.training.batch_size
    estimate = ""
    try:
        needed = estimate_step_bytes(session.model, info.channels, info.image_size, size)
        size_of_step = f"{needed / 2**30:.1f} GiB" if needed >= 2**30 else f"{needed >> 20} MiB"
        estimate = f" (about {size_of_step} a step)"
    except Exception:  # the estimate is a courtesy: a model that meta tensors can't run has none
        pass
    return (
        f"out of memory with training.batch_size {size}{estimate}; take a smaller one, "
        "precision bfloat16, or a smaller test.batch_size if it happened while testing"
    )


# ------------------------------------------------------------------------------------- resuming


def _resumed_config(run: Run, path: str | None, assignments: list[str]) -> tuple[Config, dict]:
    """The config to go on with, and what it changes of the run's own."""
    from bnexp.config import load_config, resolve

    former = run.load_config()
    if path is None:
        tree = former.model_dump(mode="json")
        settings = resolve(tree, assignments, f"{run.path}/config.yaml")
    else:
        settings = load_config(Path(path), assignments)
    before, after = _flat(former.model_dump(mode="json")), _flat(settings.model_dump(mode="json"))
    changes = {
        key: [before.get(key), after.get(key)]
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key != "name"
    }
    refused = [
        key for key in changes if not any((key + ".").startswith(a + ".") for a in RESUMABLE)
    ]
    if refused:
        listed = "; ".join(f"{k}: {changes[k][0]!r} became {changes[k][1]!r}" for k in refused)
        raise UserError(
            f"{run.path} can't be resumed with another model, data or training ({listed}); "
            "start a new run for that"
        )
    if settings.training.averages.swa and {"training.epochs", "training.steps"} & changes.keys():
        raise UserError(
            f"{run.path} averages weights from a share of the run on (training.averages.swa): "
            "another length would move that start; resume it without changing its length"
        )
    return settings, changes


def _finished(run: Run) -> bool:
    try:
        return run.state["state"] == "finished"
    except UserError:  # a damaged state.json is written anew
        return False


def _may_go_on(stopped: str | None, changes: dict) -> bool:
    """Whether a run that stopped by itself is given a reason to go on."""
    reasons = ("training.epochs", "training.steps", "training.early_stopping")
    return not stopped or any(key.startswith(reasons) for key in changes)


def _allow_what_changed(session: Session, changes: dict) -> None:
    if session.stopped and _may_go_on(session.stopped, changes):
        session.stopped = None
        session.evaluations_without_improvement = 0
    if "training.early_stopping.metric" in changes or "training.early_stopping" in changes:
        session.best_metric = None
        session.evaluations_without_improvement = 0
    schedule = session.config.training.schedule.name
    if {"training.epochs", "training.steps"} & changes.keys() and schedule not in (
        "constant",
        "plateau",
    ):
        print(
            f"bnexp: with another length the {schedule} schedule is stretched: the learning rate "
            "jumps where the run goes on",
            file=sys.stderr,
        )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _resume(run: Run, config: Config, device, changes: dict):
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
    remove_torn(run.checkpoints)
    environment = run.environment
    environment.setdefault("resumes", []).append(
        {"time": _now(), "step": session.step, "command": _command(), "changes": changes}
    )
    run.write_json("environment.json", environment)
    write_atomically(run.path / "config.yaml", config.to_yaml())
    return session


# ------------------------------------------------------------------------------ the environment


def _environment(config: Config, device: str) -> dict:
    return {
        "created": _now(),
        "command": _command(),
        "seed": config.seed,
        "device": device,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            package: _version(package)
            for package in ("bnexp", "torch", "torchvision", "numpy", "greenlet", "scipy")
        },
        "resumes": [],
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def _command() -> str:
    return shlex.join(["bnexp", *sys.argv[1:]])


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
