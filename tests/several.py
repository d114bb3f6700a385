"""Real processes over gloo on loopback, which come to their end before a deadline.

A server process imports torch once and forks for every rank.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed", "torchvision", "bnexp.auditing", "hypothesis", "pytest"]
)


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: with a `value`, with an `error`, or by a signal (both None)."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    seconds: float = 0.0


def run_ranks(
    function: Callable[..., Any],
    size: int,
    *arguments: Any,
    deadline: float = 120.0,
    timeout: float = 90.0,
) -> list[Outcome]:
    """`function(rank, *arguments)` in `size` processes that are one process group.

    timeout: of the process group. AssertionError if one is still there after `deadline` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_rank, args=(theirs, function, rank, size, folder, timeout, arguments)
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        end = time.monotonic() + deadline
        try:
            outcomes = []
            for rank, (_, ours) in enumerate(ranks):
                assert ours.poll(max(0.0, end - time.monotonic())), f"rank {rank} is left waiting"
                try:
                    outcomes.append(ours.recv())
                except EOFError:
                    outcomes.append(Outcome())
            return outcomes
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def values(outcomes: list[Outcome]) -> list[Any]:
    """What ranks returned that must all have come to a good end."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}:\n{outcome.trace}"
    return [outcome.value for outcome in outcomes]


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt_me() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _rank(pipe, function, rank, size, folder, timeout, arguments) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder, 'store')}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    start = time.monotonic()
    try:
        outcome = Outcome(value=function(rank, *arguments))
    except BaseException as error:
        trace = traceback.format_exc()
        error.__cause__ = error.__context__ = None
        outcome = Outcome(error=error.with_traceback(None), trace=trace)
    pipe.send(Outcome(outcome.value, outcome.error, outcome.trace, time.monotonic() - start))
    pipe.recv()  # until all are done, so that no connection breaks for another reason
