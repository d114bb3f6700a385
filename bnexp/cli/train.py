"""bnexp train"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from bnexp.config import Config, load_config
from bnexp.errors import ExpectationNotMet, Interrupted, RunFailed, UserError, disk_failure
from bnexp.performance import allow_tf32, keep_freed_memory
from bnexp.records import Run, create_run, find_run
from bnexp.records.environment import describe_environment
from bnexp.training.resume import resume as resume_session
from bnexp.training.resume import resumed_config

if TYPE_CHECKING:
    from bnexp.training.session import Session


def run_train(
    config: str | None,
    overrides: list[str],
    device: str | None,
    name: str | None,
    resume: str | None,
) -> None:
    assignments = list(overrides)
    if resume and config and "=" in config:
        assignments.insert(0, config)
        config = None
    if device is not None:
        assignments.append(f"device={json.dumps(device)}")
    if name is not None:
        assignments.append(f"name={json.dumps(name)}")
    if resume:
        run = find_run(resume)
        settings, changes = resumed_config(run, config, assignments)
    elif config:
        run, changes = None, {}
        settings = load_config(Path(config), assignments)
    else:
        raise UserError("name a config, as in: bnexp train configs/digits.yaml")

    if settings.performance.allocator:
        keep_freed_memory()
    _train(settings, run, changes)


def _train(config: Config, run: Run | None, changes: dict) -> None:
    from bnexp.device import describe_device, resolve_device
    from bnexp.training.session import Session

    device = resolve_device(config.device)
    allow_tf32(config.performance.tf32)
    session = None
    if run is None:
        session = Session(config, device)
        session.check()
        run = create_run(config, describe_environment(config.seed, describe_device(device)))
    try:
        lock = run.lock()
        lock.acquire()
    except Timeout:
        raise UserError(f"{run.path} is still being trained by another process") from None
    with lock:
        _run_to_the_end(run, session or resume_session(run, config, device, changes))


def _run_to_the_end(run: Run, session: Session) -> None:
    from bnexp.cli.tables import print_comparison
    from bnexp.device import describe_device
    from bnexp.report import write_results_png
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
        write_results_png(run)
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
    print_comparison(outcome.comparison)
    print(f"run: {run.path}")
    _check_expectations(config, outcome.comparison)


def _write_state(run: Run, session, state: str, message: str | None = None, weights="last") -> None:
    try:
        run.write_state(state, session.step, session.total_steps, weights, message)
    except OSError:
        if state != "failed":
            raise


def _check_expectations(config: Config, comparison) -> None:
    wanted = config.expect.test_accuracy
    found = comparison.base.accuracy
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
