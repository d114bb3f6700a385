"""One experiment from a config to its comparison: for the command line, a notebook or a worker."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bnexp.analysis.comparison import Comparison
from bnexp.analysis.expectations import unmet_accuracy, unmet_cost, unmet_worst_cost
from bnexp.config import Config, load_config, resolve
from bnexp.data import load_data
from bnexp.device import describe_device, estimate_step_bytes
from bnexp.errors import Diverged, Interrupted, RunFailed, UserError, disk_failure, is_out_of_memory
from bnexp.ranks import Ranks, choose_ranks, refuse_launcher
from bnexp.records import RUNS, Run, create_run, find_run
from bnexp.records.environment import describe_environment
from bnexp.training.build import Training, build_training, data_settings
from bnexp.training.display import Display, Mute, Silent, Terminal
from bnexp.training.loop import Result, train
from bnexp.training.processes import by_rank_0, device_of_rank, one_by_one
from bnexp.training.resume import changes_of, go_on, has_checkpoint, require_same_weights
from bnexp.training.run_data import FILE as DATA_FILE
from bnexp.training.run_data import load_run_data
from bnexp.training.signals import SIGNALS, Interruption, handled


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
    ranks: Ranks | None = None,
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
        ranks: `bnexp.TorchRanks()` to train on all processes of a process group together, which
            all call this alike: what is computed is what one process would, to rounding, and
            rank 0 writes the record, in a folder that all can read. In a process group of several
            ranks it must be chosen.

    Raises:
        UserError: the config, the data or the record to resume are wrong.
        RunFailed: it diverged or collapsed, memory or the disk did not suffice.
        Interrupted: it was told to stop; the message says how to go on.
    """
    if ranks is None:
        ranks = choose_ranks(ranks, "training")
        refuse_launcher("bnexp train")
    with contextlib.ExitStack() as held:
        with ranks.together("the beginning of a training"):
            chosen = by_rank_0(ranks, "the run to resume", lambda: _found(resume, runs))
            settings = _config(config, list(overrides), chosen)
            settings.require_gates()
            ranks.agree(settings.to_yaml(), "the config")
            device = device_of_rank(settings.device, ranks)
            ranks.agree(device.type, "the kind of device")
            if torch.is_autocast_enabled(device.type):
                raise UserError(
                    "run_experiment within torch.autocast would not train in the config's "
                    "precision: call it outside"
                )
            held.enter_context(
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
            )
            place = None if folder is None else Path(folder)
            if chosen is None:
                run, training = _begin(settings, device, runs, place, ranks, held)
                display = _display(training, progress)
                for line in training.remarks:
                    display.line(line)
                for line in training.warnings:
                    display.warn(line)
            else:
                changes = by_rank_0(ranks, "the changes", lambda: changes_of(chosen, settings))
                by_rank_0(ranks, "the lock", lambda: held.enter_context(chosen.locked()))
                data, change = one_by_one(
                    ranks,
                    "the data",
                    lambda: load_run_data(chosen, settings, device, changed_data),
                )
                begun = by_rank_0(ranks, "the checkpoints", lambda: has_checkpoint(chosen))
                begin = settings.model.weights is not None and not begun
                run, training = chosen, build_training(settings, device, data, ranks, begin)
                by_rank_0(ranks, "weights", lambda: require_same_weights(chosen, training))
                display = _display(training, progress)
                go_on(run, training, changes, change, display)
            held.callback(training.processes.close)
            data_of = json.dumps(training.data.fingerprint, sort_keys=True, default=str)
            ranks.agree(hashlib.sha256(data_of.encode()).hexdigest(), "the data")
        return _run_to_the_end(run, training, display, handle_signals)


def _found(resume: Run | str | Path | None, runs: Path) -> Run | None:
    return resume if resume is None or isinstance(resume, Run) else find_run(str(resume), runs)


def _begin(
    config: Config,
    device: torch.device,
    runs: Path,
    place: Path | None,
    ranks: Ranks,
    held: contextlib.ExitStack,
) -> tuple[Run, Training]:
    """A training at its step 0 and its new record, which rank 0 makes and holds."""
    data = one_by_one(
        ranks,
        "the data",
        lambda: load_data(data_settings(config.data), seed=config.seed, device=device),
    )
    training = build_training(config, device, data, ranks)
    environment = describe_environment(
        config.seed, describe_device(device), torch.get_num_threads(), ranks.size
    )
    if training.given is not None:
        environment["weights"] = training.given.to_dict()
    files = {DATA_FILE: data.fingerprint, "environment.json": environment}

    def make() -> Run:
        run = create_run(config.name, config.to_yaml(), files, runs, place)
        held.enter_context(run.locked())
        return run

    return by_rank_0(ranks, "the record", make), training


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
        raise UserError("name a config, as in: bnexp train digits")
    return resolve(run.config, overrides, f"{run.path}/config.yaml")


def _display(training: Training, progress: bool) -> Display:
    if not training.processes.writes:
        return Mute()
    return Terminal(training.total_steps, training.state.step) if progress else Silent()


def _run_to_the_end(
    run: Run, training: Training, display: Display, handle_signals: bool
) -> Outcome:
    """Train, and say in state.json how it ended, whatever happens."""
    state, total, processes = training.state, training.total_steps, training.processes
    signals = SIGNALS if handle_signals else ()
    try:
        with display, processes.ranks.together("training"):
            if processes.writes:
                run.write_state("running", state.step, total)
            display.line(_headline(run, training))
            result = _trained(run, training, display, Interruption(signals))
    except Interrupted as error:
        _write_end(run, training, "interrupted", str(error))
        raise Interrupted(f"{error}; go on with: bnexp train --resume {run.path}") from None
    except KeyboardInterrupt:
        _write_end(run, training, "interrupted", "interrupted at once")
        raise Interrupted(
            f"interrupted; go on from the last checkpoint with: bnexp train --resume {run.path}"
        ) from None
    except Exception as error:
        said = str(error) or type(error).__name__
        _write_end(run, training, "failed", said, isinstance(error, Diverged))
        raise

    def write() -> str | None:
        run.write_state("finished", state.step, total, result.weights, result.message)
        return _unmet_expectations(run, training.config, result.comparison)

    unmet = by_rank_0(processes.ranks, "the end of the training", write)
    if result.message:
        display.line(result.message)
    return Outcome(run, result.comparison, result.weights, result.message, unmet)


def _trained(run: Run, training: Training, display: Display, interruption: Interruption) -> Result:
    try:
        return train(run, training, display, interruption)
    except RunFailed:
        raise
    except Exception as error:
        raise _explained(error, run, training) from None


def _headline(run: Run, training: Training) -> str:
    config, data = training.config, training.data
    parameters = sum(p.numel() for p in training.state.model.parameters())
    size = training.processes.ranks.size
    return (
        f"{run.path}: {config.model.name} ({parameters:,} parameters) on {data.info.name} "
        f"({len(data.train):,} training, {len(data.test):,} test images), "
        f"{training.total_steps:,} steps of {config.training.batch_size} on "
        f"{f'{size} processes, each on ' if size > 1 else ''}{describe_device(training.device)}"
    )


def _write_end(
    run: Run, training: Training, state: str, message: str, diverged: bool = False
) -> None:
    """`step` is that of the last checkpoint, from which a resume goes on."""
    if not training.processes.writes:
        return
    # What ended the run is said already; a full disk may be just that.
    with contextlib.suppress(OSError), handled(SIGNALS, signal.SIG_IGN):
        step, total = training.state.saved_step, training.total_steps
        run.write_state(state, step, total, "last", message, diverged)


def _unmet_expectations(run: Run, config: Config, comparison: Comparison) -> str | None:
    expect = config.expect
    unmet = (
        unmet_accuracy(comparison, expect.test_accuracy),
        unmet_cost(comparison, expect.cost),
        unmet_worst_cost(comparison, run.test_accuracies(), expect.worst_cost),
    )
    return "; ".join(filter(None, unmet)) or None


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
    own, estimate = len(range(size)[training.processes.share.of(size)]), ""
    try:
        needed = estimate_step_bytes(training.state.model, info.channels, info.image_size, own)
        size_of_step = f"{needed / 2**30:.1f} GiB" if needed >= 2**30 else f"{needed >> 20} MiB"
        estimate = f" (about {size_of_step} a step)"
    except Exception:  # the estimate is a courtesy: a model that meta tensors can't run has none
        pass
    return (
        f"out of memory with training.batch_size {size}{estimate}; take a smaller one, "
        "precision bfloat16, or a smaller test.batch_size if it happened while testing"
    )
