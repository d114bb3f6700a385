"""One experiment from a config to its comparison: for the command line, a notebook or a worker."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bnexp.analysis.comparison import Comparison
from bnexp.analysis.expectations import unmet_accuracy, unmet_cost, unmet_worst_cost
from bnexp.config import Config, load_config, resolve
from bnexp.device import describe_device, estimate_step_bytes, resolve_device
from bnexp.errors import Diverged, Interrupted, RunFailed, UserError, disk_failure, is_out_of_memory
from bnexp.ranks import refuse_launcher
from bnexp.records import RUNS, Run, create_run, find_run
from bnexp.records.environment import describe_environment
from bnexp.training.build import Training, build_training
from bnexp.training.display import Display, Silent, Terminal
from bnexp.training.loop import train
from bnexp.training.resume import changes_of, go_on
from bnexp.training.run_data import FILE as DATA_FILE
from bnexp.training.run_data import load_run_data
from bnexp.training.signals import SIGNALS, Interruption


@dataclass(frozen=True)
class Outcome:
    """What an experiment ends with.

    `comparison` is about the weights `last` or `best`; `message` says why the training stopped
    before its time, if it did; `unmet` which expectation of the config does not hold, if one
    doesn't.
    """

    record: Run
    comparison: Comparison
    weights: str
    message: str | None
    unmet: str | None


def run_experiment(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: Run | str | Path | None = None,
    runs: Path = RUNS,
    progress: bool = False,
    handle_signals: bool = False,
    changed_data: bool = False,
) -> Outcome:
    """Train as `config` says, compare the statistics at the end, and leave a record of it.

    Global random state is as it was afterwards. The rest of the process is the caller's: the
    allocator and TF32 (`bnexp.performance.prepare_process`), threads, the working directory.

    Args:
        config: a path to a YAML file, a mapping, or a `Config`. With `resume` it may be left out:
            the record's own.
        folder: where the record is made, new; None for the next free `<runs>/<name>-<number>`.
        overrides: dotted `key=value` texts, applied to `config`.
        resume: a record to go on with, by its path or its name below `runs`.
        progress: whether to show progress on stderr.
        handle_signals: whether SIGINT, SIGTERM and SIGHUP end the training after the current
            step, with a checkpoint. Only in a main thread. Otherwise a KeyboardInterrupt ends it
            at once, and the last checkpoint remains.
        changed_data: go on with `resume` though its data are no longer those it was begun with.

    Raises:
        UserError: the config, the data or the record to resume are wrong.
        RunFailed: it diverged or collapsed, memory or the disk did not suffice.
        Interrupted: it was told to stop; the message says how to go on.
    """
    refuse_launcher("bnexp train")
    run = None if resume is None else resume
    if run is not None and not isinstance(run, Run):
        run = find_run(str(run), runs)
    config = _config(config, list(overrides), run)
    changes = changes_of(run, config) if run else {}
    device = resolve_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if run is not None:
            with run.locked():
                data, change = load_run_data(run, config, device, changed_data)
                training = build_training(config, device, data)
                display = _display(training, progress)
                go_on(run, training, changes, change, display)
                return _run_to_the_end(run, training, display, handle_signals)
        training = build_training(config, device)
        environment = describe_environment(
            config.seed, describe_device(device), torch.get_num_threads()
        )
        place = None if folder is None else Path(folder)
        files = {DATA_FILE: training.data.fingerprint, "environment.json": environment}
        run = create_run(config.name, config.to_yaml(), files, runs, place)
        with run.locked():
            display = _display(training, progress)
            for line in training.data.remarks:
                display.line(line)
            return _run_to_the_end(run, training, display, handle_signals)


def _config(
    given: Config | Mapping[str, Any] | str | Path | None, overrides: list[str], run: Run | None
) -> Config:
    if isinstance(given, Config) and not overrides:
        return given
    if isinstance(given, Config):
        return resolve(given.model_dump(mode="json"), overrides, "the config")
    if isinstance(given, Mapping):
        return resolve(copy.deepcopy(dict(given)), overrides, "the config")
    if given is not None:
        return load_config(Path(given), overrides)
    if run is None:
        raise UserError("name a config, as in: bnexp train configs/digits.yaml")
    return resolve(run.config, overrides, f"{run.path}/config.yaml")


def _display(training: Training, progress: bool) -> Display:
    return Terminal(training.total_steps, training.state.step) if progress else Silent()


def _run_to_the_end(
    run: Run, training: Training, display: Display, handle_signals: bool
) -> Outcome:
    """Train, and say in state.json how it ended, whatever happens."""
    state, total = training.state, training.total_steps
    run.write_state("running", state.step, total)
    display.line(_headline(run, training))
    interruption = Interruption(SIGNALS if handle_signals else ())
    try:
        with display:
            result = train(run, training, display, interruption)
    except Interrupted as error:
        _write_end(run, training, "interrupted", str(error))
        raise Interrupted(f"{error}; go on with: bnexp train --resume {run.path}") from None
    except KeyboardInterrupt:
        _write_end(run, training, "interrupted", "interrupted at once")
        raise Interrupted(
            f"interrupted; go on from the last checkpoint with: bnexp train --resume {run.path}"
        ) from None
    except RunFailed as error:
        _write_end(run, training, "failed", str(error), isinstance(error, Diverged))
        raise
    except Exception as error:
        error = _explained(error, run, training)
        _write_end(run, training, "failed", str(error) or type(error).__name__)
        raise error from None
    run.write_state("finished", state.step, total, result.weights, result.message)
    if result.message:
        display.line(result.message)
    unmet = _unmet_expectation(run, training.config, result.comparison)
    return Outcome(run, result.comparison, result.weights, result.message, unmet)


def _headline(run: Run, training: Training) -> str:
    config, data = training.config, training.data
    parameters = sum(p.numel() for p in training.state.model.parameters())
    return (
        f"{run.path}: {config.model.name} ({parameters:,} parameters) on {data.info.name} "
        f"({len(data.train):,} training, {len(data.test):,} test images), "
        f"{training.total_steps:,} steps of {config.training.batch_size} on "
        f"{describe_device(training.device)}"
    )


def _write_end(
    run: Run, training: Training, state: str, message: str, diverged: bool = False
) -> None:
    """`step` is that of the last checkpoint, from which a resume goes on."""
    with contextlib.suppress(OSError):  # what ended the run is said; a full disk may be just that
        step, total = training.state.saved_step, training.total_steps
        run.write_state(state, step, total, "last", message, diverged)


def _unmet_expectation(run: Run, config: Config, comparison: Comparison) -> str | None:
    expect = config.expect
    return (
        unmet_accuracy(comparison, expect.test_accuracy)
        or unmet_cost(comparison, expect.cost)
        or unmet_worst_cost(comparison, run.test_accuracies(), expect.worst_cost)
    )


def _explained(error: Exception, run: Run, training: Training) -> Exception:
    """The one line for an error that has an answer, or the error itself."""
    if is_out_of_memory(error):
        return RunFailed(_out_of_memory(training))
    if isinstance(error, OSError) and not run.checkpoints.is_dir():
        return RunFailed(f"{run.checkpoints}/ was removed while the run was being trained")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return RunFailed(
            f"torch.compile can't compile {training.config.model.name} here ({reason}); set "
            "performance.compile=false"
        )
    return disk_failure(error) or error


def _out_of_memory(training: Training) -> str:
    info, size = training.data.info, training.config.training.batch_size
    estimate = ""
    try:
        needed = estimate_step_bytes(training.state.model, info.channels, info.image_size, size)
        size_of_step = f"{needed / 2**30:.1f} GiB" if needed >= 2**30 else f"{needed >> 20} MiB"
        estimate = f" (about {size_of_step} a step)"
    except Exception:  # the estimate is a courtesy: a model that meta tensors can't run has none
        pass
    return (
        f"out of memory with training.batch_size {size}{estimate}; take a smaller one, "
        "precision bfloat16, or a smaller test.batch_size if it happened while testing"
    )
