"""Runs the real command in real processes, without paying for `import torch` each time.

A server process imports bnexp once and forks for every command: the child is a process of its own,
with its own working directory, limits and signals, and can be killed like any other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from bnexp.records import Run

ROOT = Path(__file__).parent.parent
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# How long an example takes says how busy the machine is, and examples are the same everywhere.
settings.register_profile(
    "bnexp", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bnexp")

needs_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST.exists(), reason="Fashion-MNIST is not installed"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes that train is slow."""
    for item in items:
        if "bnexp" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


_SERVER = r"""
import json, os, resource, signal, sys
import bnexp.cli
import torch._dynamo, scipy.stats
import bnexp.training.loop, bnexp.cli.tables, bnexp.report.figures, bnexp.cli.eval
import torch
torch.set_num_threads(1)

def child(job):
    for number in (signal.SIGHUP, signal.SIGTERM):  # a shell's background job ignores some
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    if job["file_size_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size_limit"],) * 2)
    if job["memory_limit"]:
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + job["memory_limit"]
        resource.setrlimit(resource.RLIMIT_AS, (limit,) * 2)
    for number, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["bnexp", *job["arguments"]]
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1)
    code = 0
    try:
        exec(job["inject"], {})
        bnexp.cli.main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(bool(exit.code))
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        child(job)
    print(pid, flush=True)
    if sys.stdin.readline() != "wait\n":
        break
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass
class Finished:
    code: int
    stdout: str
    stderr: str


class Command:
    """One running `bnexp` command; `pid` is its own."""

    def __init__(self, server: subprocess.Popen, pid: int, folder: Path) -> None:
        self._server = server
        self.pid = pid
        self.waited = False
        self._folder = folder

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stderr_so_far(self) -> str:
        return self._read("stderr")

    def _read(self, stream: str) -> str:
        path = self._folder / stream
        return path.read_text() if path.exists() else ""  # killed before it began

    def wait(self) -> Finished:
        self.waited = True
        self._server.stdin.write("wait\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Finished(code, self._read("stdout"), self._read("stderr"))


class Commands:
    """Starts `bnexp` commands in the working directory `cwd`, one at a time per server."""

    def __init__(self, server: subprocess.Popen, cwd: Path, logs: Path) -> None:
        self._server = server
        self.cwd = cwd
        self._logs = logs
        self._command: Command | None = None

    def start(
        self,
        *arguments: object,
        file_size_limit: int = 0,
        memory_limit: int = 0,
        inject: str = "",
        **env: str,
    ) -> Command:
        """`file_size_limit`: bytes a file may have; `memory_limit`: bytes the command may take
        besides what the imports have taken (Linux). 0 is no limit. `inject`: Python that runs in
        the command's process first."""
        folder = self._logs / str(time.monotonic_ns())
        folder.mkdir()
        job = {
            "arguments": [str(a) for a in arguments],
            "cwd": str(self.cwd),
            "env": {"COLUMNS": "160", **env},
            "file_size_limit": file_size_limit,
            "memory_limit": memory_limit,
            "inject": inject,
            "stdout": str(folder / "stdout"),
            "stderr": str(folder / "stderr"),
        }
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        self._command = Command(self._server, int(self._server.stdout.readline()), folder)
        return self._command

    def __call__(self, *arguments: object, **options) -> Finished:
        return self.start(*arguments, **options).wait()

    def end(self) -> None:
        """Kills what a test that failed or was skipped has left running, so that the server is
        free for the next test."""
        if self._command is not None and not self._command.waited:
            self._command.signal(signal.SIGKILL)
            self._command.wait()


def run_of(bnexp: Commands, done: Finished) -> Run:
    """The run that a finished `bnexp train` names in its last line."""
    return Run(bnexp.cwd / done.stdout.strip().splitlines()[-1].removeprefix("run: "))


def trained(bnexp: Commands, *arguments: object) -> Run:
    done = bnexp("train", *arguments)
    assert done.code == 0, done.stderr
    return run_of(bnexp, done)


def wait_for(condition, seconds: float = 120):
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)
    return found


def _start_server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="session")
def command_server():
    server = _start_server()
    yield server
    server.stdin.close()
    server.send_signal(signal.SIGTERM)
    server.wait()


@pytest.fixture(scope="session")
def second_command_server():
    server = _start_server()
    yield server
    server.stdin.close()
    server.send_signal(signal.SIGTERM)
    server.wait()


@pytest.fixture
def bnexp(command_server, tmp_path, tmp_path_factory) -> Iterator[Commands]:
    """`bnexp("train", "config.yaml")` in an empty folder."""
    commands = Commands(command_server, tmp_path, tmp_path_factory.mktemp("logs"))
    yield commands
    commands.end()


@pytest.fixture
def bnexp_beside(second_command_server, tmp_path, tmp_path_factory) -> Iterator[Commands]:
    """The same in the same folder, for a second process at the same time."""
    commands = Commands(second_command_server, tmp_path, tmp_path_factory.mktemp("logs"))
    yield commands
    commands.end()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()
