"""Several processes of one command: starting them, and being one of them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

from bnexp.errors import Interrupted, RunFailed, UserError, shown
from bnexp.performance import wait_briefly
from bnexp.ranks import Alone, Ranks, started_by_launcher
from bnexp.training.signals import SIGNALS, handled

# After which a rank that others wait for is given up. Rank 0 may download data, or judge a whole
# test set's predictions, while the others wait.
TIMEOUT = timedelta(minutes=10)
_PR_SET_PDEATHSIG = 1
_ENDS = (1, 2, 3, 130)
_PRELOADED = ["bnexp.cli.train", "bnexp.experiment", "torch.distributed"]


def is_silent() -> bool:
    """Whether what this process has to say is said by rank 0."""
    return (size := started_by_launcher()) > 1 and _own_rank(size) > 0


def start_processes(count: int) -> NoReturn:
    """Run this command in `count` processes, by torch's elastic agent, and exit as they do.

    Each has an equal share of the cores for its threads, unless OMP_NUM_THREADS is set. They are
    forked from a process that imports torch while this one does.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // count)))

    wait_briefly()
    from bnexp.forking import importing  # Unix alone, as is the way that these are started

    importing(_PRELOADED)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # what ended the run is said by the processes
    with tempfile.TemporaryDirectory(prefix="bnexp-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="bnexp",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **_heeded(LaunchConfig),
        )
        try:
            elastic_launch(config, _run_command)(sys.argv[1:])
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            killed = {rank: -code for rank, code in codes.items() if code < 0}
            for rank, number in killed.items():
                print(f"bnexp: process {rank} was {_killed(number)}", file=sys.stderr)
            told = [code for code in codes.values() if code in _ENDS]
            sys.exit(1 if killed or not told else told[0])
        except SignalException:
            sys.exit(Interrupted.exit_code)
    sys.exit(0)


def _run_command(words: list[str]) -> None:
    from bnexp.cli import main
    from bnexp.forking import end_with_parent

    # A terminal's Ctrl-C is for the agent, which passes it on: of two, the second ends at once.
    os.setpgid(0, 0)
    end_with_parent()
    sys.argv = ["bnexp", *words]
    main()


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of this command, if a launcher has started several processes of it."""
    if started_by_launcher() == 1:
        yield Alone()
        return
    if _own_rank(size := started_by_launcher()) < 0:
        raise UserError(
            f"RANK is {shown(os.environ['RANK'])} where WORLD_SIZE is {size}: a launcher numbers "
            f"its processes from 0 to {size - 1}"
        )
    _end_with_parent()
    wait_briefly()
    import torch.distributed as distributed

    from bnexp.ranks import TorchRanks

    try:
        # While torch waits for the others, no handler of Python's can end it.
        with handled(SIGNALS, signal.SIG_DFL):
            distributed.init_process_group("gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RunFailed(f"the processes can't reach one another: {reason:.300}") from None
    ranks = None
    try:
        ranks = TorchRanks()
        yield ranks
    except BaseException:
        # The agent asks those that are left to end as soon as one has: they are about to.
        if ranks is not None and ranks.rank != 0:
            with contextlib.suppress(KeyboardInterrupt):  # the agent, because rank 0 is no more
                ranks.let_rank_0_end()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if ranks is not None and ranks.rank == 0:
            ranks.let_rank_0_end()
        raise
    distributed.destroy_process_group()


def _heeded(config: Any) -> dict[str, Any]:
    """The signals that the agent passes on, where it can be told (since PyTorch 2.9): those that
    were not to be ignored when the command began, as SIGINT is in a shell's background jobs and
    SIGHUP under nohup: the processes ignore them, too."""
    if "signals_to_handle" not in config.__dataclass_fields__:
        return {}
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    heeded = [n for n in names if signal.getsignal(getattr(signal, n)) != signal.SIG_IGN]
    return {"signals_to_handle": ",".join(heeded)}


def check_count(processes: int | None) -> None:
    """UserError where `--processes` and a launcher say different things."""
    if processes is not None and started_by_launcher() not in (1, processes):
        raise UserError(
            f"a launcher has started {started_by_launcher()} processes: leave --processes out"
        )


def _own_rank(size: int) -> int:
    """What a launcher of `size` processes calls this one; -1 where that is no such number."""
    rank = os.environ["RANK"]
    return int(rank) if rank.isdecimal() and int(rank) < size else -1


def _killed(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"killed ({signal.Signals(number).name})"
    return f"killed (signal {number})"


def _end_with_parent() -> None:
    """Be told to end (SIGTERM) when the agent is no more, however it ended. Linux alone."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
