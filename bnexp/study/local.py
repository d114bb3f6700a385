"""The engine for this machine: a process per training, forked from one that has imported all."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from bnexp.config.study import ResourcesConfig
from bnexp.errors import UserError
from bnexp.forking import end_with_parent, importing
from bnexp.study.jobs import Ended, Job, Watcher

ATTEMPTS = 3
TICK_SECONDS = 0.25
END_SECONDS = 120.0
"""How long a training may take to its next checkpoint once it is asked to end."""

_PRELOADED = ["bnexp.study.worker", "bnexp.cli"]
_WITH_PACKAGE = ("digits",)  # data that no one downloads


@dataclass
class _Running:
    job: Job
    process: ForkServerProcess
    answer: Connection
    slot: int
    log: Path


def default_jobs(resources: ResourcesConfig) -> int:
    """How many trainings fit on this machine at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fit = max(1, (cores or 1) // resources.cpus)
    return min(fit, max(1, _per_gpus(resources))) if resources.gpus else fit


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _per_gpus(resources: ResourcesConfig) -> int:
    """How many trainings the GPUs take. UserError where there are not enough of them."""
    found = _gpus()
    fit = int(found / resources.gpus + 1e-9) if resources.gpus < 1 else found // int(resources.gpus)
    if resources.gpus > 1 and resources.gpus != int(resources.gpus):
        raise UserError("resources.gpus is a whole number, or a share of one GPU such as 0.5")
    if fit < 1:
        raise UserError(
            f"resources.gpus is {resources.gpus:g}, and this machine has {found}: set it to 0 to "
            "run on the CPU"
        )
    return fit


def run_local(
    jobs: Iterable[Job],
    workers: int,
    resources: ResourcesConfig,
    watcher: Watcher,
) -> None:
    """Run `jobs`, `workers` at a time.

    A process that is killed is begun again, and goes on from its checkpoint, `ATTEMPTS` times in
    all.
    """
    context = importing(_PRELOADED)
    waiting = list(jobs)
    devices = _devices(resources, workers)
    running: list[_Running] = []
    attempts: dict[str, int] = {}
    asked = None
    try:
        while running or (waiting and not asked):
            if watcher.stop() and asked is None:
                asked = time.monotonic()
                _signal(running, signal.SIGTERM)
            if asked is not None and time.monotonic() - asked > END_SECONDS:
                _signal(running, signal.SIGKILL)
            while asked is None and len(running) < workers:
                job = _next(waiting, running)
                if job is None:
                    break
                waiting.remove(job)
                slot = min(set(range(workers)) - {each.slot for each in running})
                running.append(_start(context, job, slot, devices[slot]))
                watcher.started(job)
            wait([each.process.sentinel for each in running], TICK_SECONDS)
            for each in [one for one in running if one.process.exitcode is not None]:
                running.remove(each)
                found = _answer(each)
                attempts[each.job.key] = tries = attempts.get(each.job.key, 0) + 1
                if found is None and asked is None and tries < ATTEMPTS:
                    waiting.insert(0, each.job)
                    continue
                died = _died(each.process.exitcode, tries, asked is not None)
                watcher.ended(each.job, found or died)
            watcher.tick()
    finally:
        _signal(running, signal.SIGTERM)
        for each in running:
            each.process.join(5)
        _signal(running, signal.SIGKILL)


def _devices(resources: ResourcesConfig, workers: int) -> list[dict[str, str]]:
    """The environment of each worker: which GPUs it sees, none unless the study asks for some."""
    if not resources.gpus:
        return [{"CUDA_VISIBLE_DEVICES": ""}] * workers
    if workers > _per_gpus(resources):
        raise UserError(
            f"--jobs {workers}: with resources.gpus {resources.gpus:g} there is room for "
            f"{_per_gpus(resources)} here"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(_gpus())]
    if resources.gpus < 1:
        share = int(1 / resources.gpus + 1e-9)
        return [{"CUDA_VISIBLE_DEVICES": names[i // share]} for i in range(workers)]
    each = int(resources.gpus)
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[i * each : (i + 1) * each])} for i in range(workers)
    ]


def _next(waiting: Sequence[Job], running: Sequence[_Running]) -> Job | None:
    """The next job to begin. While the first one of a data set has not read it yet, and may be
    downloading it, no other one of that set is begun."""
    reading = {
        each.job.data
        for each in running
        if each.job.data not in _WITH_PACKAGE and not each.job.folder.exists()
    }
    return next((job for job in waiting if job.data not in reading), None)


def _start(
    context: ForkServerContext, job: Job, slot: int, environment: dict[str, str]
) -> _Running:
    ours, theirs = context.Pipe(duplex=False)
    log = job.folder.with_name(f"{job.folder.name}.log")
    process = context.Process(
        target=_main, args=(job, theirs, log, environment), name=job.key, daemon=False
    )
    process.start()
    theirs.close()
    return _Running(job, process, ours, slot, log)


def _answer(each: _Running) -> Ended | None:
    """What the process said before it ended; None where it was killed."""
    try:
        found = each.answer.recv() if each.answer.poll() else None
    except (EOFError, OSError):
        found = None
    each.answer.close()
    each.process.join()
    with contextlib.suppress(OSError):
        if not each.log.stat().st_size:
            each.log.unlink()
    return found


def _died(exitcode: int | None, tries: int, asked: bool) -> Ended:
    if asked:
        return Ended("interrupted")
    code = exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    times = "" if tries == 1 else f", {tries} times"
    memory = "; was there memory enough?" if code == -signal.SIGKILL else ""
    return Ended("failed", f"its process was {how}{times}{memory}")


def _signal(running: Iterable[_Running], number: signal.Signals) -> None:
    for each in running:
        if each.process.pid is not None and each.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.process.pid, number)


# ------------------------------------------------------------------------ in the new process


def _main(job: Job, answer: Connection, log: Path, environment: dict[str, str]) -> None:
    """Ctrl-C is the study's affair; it asks with SIGTERM. If the study dies, the training ends
    with a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    end_with_parent()
    from bnexp.study.worker import run_job

    answer.send(run_job(job))
    answer.close()
