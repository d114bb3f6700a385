"""`bnexp train` in several processes that torch's elastic agent starts: how they end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_of, wait_for

from bnexp.cli.processes import check_count, is_silent, started_by_launcher
from bnexp.errors import UserError
from bnexp.records import Run

CONFIG = """
name: several
data: {name: digits, limit: {train: 300, test: 100}}
model: {name: mlp}
statistics: {recompute: {samples: 100}}
training: {steps: 10, batch_size: 20, schedule: {name: constant}}
checkpoints: {every_steps: 5, every_seconds: null}
"""
LONG = "training.steps=1000000"


@pytest.fixture
def config(bnexp):
    (bnexp.cwd / "several.yaml").write_text(CONFIG)
    return "several.yaml"


def processes_of(folder: Path) -> dict[int, int]:
    """Pid -> that of the parent, of the processes that work in `folder`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if Path(os.readlink(entry / "cwd")) == folder:
                    status = (entry / "stat").read_text().rpartition(")")[2].split()
                    found[int(entry.name)] = int(status[1])
    return found


def under_way(bnexp, config, **how):
    """A training of two processes that has made its first checkpoints: command, record, and the
    pids of the ranks, which are forked in their order from a child of the command."""
    command = bnexp.start("train", config, LONG, "--processes", 2, **how)
    run = Run(bnexp.cwd / "runs" / "several-1")
    wait_for(lambda: list(run.checkpoints.glob("step-*.pt")), 240)
    parents = processes_of(bnexp.cwd)
    pids = sorted(pid for pid, parent in parents.items() if parents.get(parent) == command.pid)
    assert len(pids) == 2
    return command, run, pids


def test_two_processes_print_once_and_one_goes_on(bnexp, config):
    done = bnexp("train", config, "expect.test_accuracy=1", "--processes", 2)
    assert done.code == 3, done.stderr
    assert "running averages" in done.stdout
    run = run_of(bnexp, done)
    assert (run.path / "results.png").exists()
    assert done.stdout.count("run: ") == 1
    assert done.stderr.count("mlp (") == 1
    environment = run.environment
    assert environment["processes"] == 2
    assert run.steps()["step"].tolist() == list(range(1, 11))
    done = bnexp("train", "--resume", run.path, "training.steps=20", "expect.test_accuracy=null")
    assert done.code == 0, done.stderr
    assert "the run had 2 processes and goes on with 1" in done.stderr
    assert run.steps()["step"].tolist() == list(range(1, 21))
    wait_for(lambda: not processes_of(bnexp.cwd))


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_ctrl_c_ends_all_with_a_checkpoint_and_130(bnexp, config, send):
    """Sent to the command, or by a terminal to its process group."""
    command, run, _ = under_way(bnexp, config, inject="import os; os.setpgid(0, 0)")
    send(command.pid, signal.SIGINT)
    done = command.wait()
    assert done.code == 130
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bnexp: ")]
    assert "the checkpoint is written; go on with: bnexp train --resume" in line
    assert "Traceback" not in done.stderr and "death signal" not in done.stderr
    state = run.state
    assert state["state"] == "interrupted"
    assert len(run.steps()["step"]) == state["step"]
    wait_for(lambda: not processes_of(bnexp.cwd))


def test_a_signal_that_is_ignored_ends_nothing(bnexp, config):
    """SIGINT in a shell's background job."""
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    command, run, _ = under_way(bnexp, config, inject=ignore)
    command.signal(signal.SIGINT)
    known = max(run.checkpoints.glob("step-*.pt"))
    wait_for(lambda: max(run.checkpoints.glob("step-*.pt"), default=known) > known, 60)
    command.signal(signal.SIGTERM)
    done = command.wait()
    assert done.code == 130, done.stderr
    assert "the checkpoint is written" in done.stderr
    assert run.state["state"] == "interrupted"


@pytest.mark.parametrize("culprit", [0, 1])
def test_kill_9_of_a_process_ends_the_others_and_the_run_resumes(bnexp, config, culprit):
    command, run, pids = under_way(bnexp, config)
    os.kill(pids[culprit], signal.SIGKILL)
    done = command.wait()
    assert done.code == 1
    assert f"bnexp: process {culprit} was killed (SIGKILL)" in done.stderr
    assert "Traceback" not in done.stderr
    assert run.state["state"] in (["killed"] if culprit == 0 else ["failed", "interrupted"])
    wait_for(lambda: not processes_of(bnexp.cwd))
    step = run.state["step"]
    done = bnexp("train", "--resume", run.path, f"training.steps={step + 5}")
    assert done.code == 0, done.stderr
    assert run.steps()["step"].tolist() == list(range(1, step + 6))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells of a parent's death")
def test_without_their_agent_the_processes_end_by_themselves(bnexp, config):
    command, run, _ = under_way(bnexp, config)
    command.signal(signal.SIGKILL)
    command.wait()
    wait_for(lambda: not processes_of(bnexp.cwd))
    assert run.state["state"] == "interrupted"


def test_more_processes_than_a_mini_batch_has_images_are_not_started(bnexp, config):
    inject = "import bnexp.cli.train; bnexp.cli.train.start_processes = None"
    done = bnexp("train", config, "--processes", 100_000, inject=inject)
    assert done.code == 2
    (line,) = done.stderr.splitlines()
    assert "can't be shared by 100000 processes" in line


def test_a_process_that_waits_for_the_others_heeds_signals(bnexp, config):
    inject = (
        "import torch.distributed\n"
        "original = torch.distributed.init_process_group\n"
        "def connect(*arguments, **options):\n"
        "    open('waiting', 'w').close()\n"
        "    original(*arguments, **options)\n"
        "torch.distributed.init_process_group = connect\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = bnexp.start("train", config, inject=inject, RANK="0", LOCAL_RANK="0", **launched)
    wait_for((bnexp.cwd / "waiting").exists)
    command.signal(signal.SIGTERM)
    assert command.wait().code == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["several.yaml", "training.batch_size=20", "statistics.normalization_batch=20"],
            "can't be shared by 2 processes",
        ),
        (["several.yaml", "data.root=/nowhere", "data.name=image-folder"], "/nowhere"),
        (["several.yaml", "performance.compile=true"], "performance.compile is for one process"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(bnexp, config, arguments, said):
    done = bnexp("train", *arguments, "--processes", 2)
    assert done.code == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("bnexp: ") and said in line
    assert not (bnexp.cwd / "runs").exists() or not list((bnexp.cwd / "runs").iterdir())


def test_errors_that_need_no_processes_start_none(bnexp, config):
    for arguments, said in [
        (["several.yaml", "training.nothing=1"], "nothing"),
        (["several.yaml", "--dry-run"], "--dry-run tries one process out"),
        (["--resume", "nowhere"], "no run nowhere"),
    ]:
        done = bnexp("train", *arguments, "--processes", 2)
        assert done.code == 2
        assert said in done.stderr.splitlines()[-1]


def test_torchrun_trains_too(bnexp, config):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", "-m", "bnexp", "train", config],
        cwd=bnexp.cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^run: .*", done.stdout, flags=re.M) == ["run: runs/several-1"]
    assert Run(bnexp.cwd / "runs" / "several-1").environment["processes"] == 2


def test_what_a_launcher_says(monkeypatch):
    assert started_by_launcher() == 1 and not is_silent()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert started_by_launcher() == 3 and is_silent()
    check_count(3)
    with pytest.raises(UserError, match="has started 3 processes: leave --processes out"):
        check_count(2)


@pytest.mark.parametrize("rank", ["", "x", "2"])
def test_a_number_that_no_launcher_gives_is_said(bnexp, config, rank):
    done = bnexp("train", config, RANK=rank, WORLD_SIZE="2")
    assert done.code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"bnexp: RANK is {rank!r} where WORLD_SIZE is 2: ")
