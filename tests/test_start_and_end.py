"""How commands begin and end: what they choose, import and draw; nothing is left undone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest
from conftest import run_of

from bnexp import performance
from bnexp.cli.drawing import Drawer
from bnexp.performance import WAITING, quick_imports, wait_briefly


@pytest.fixture
def openmp(monkeypatch):
    """Nothing set, and as the module was imported just now. What is given then is what all cores
    have done since: seconds in all, idle, and of this process."""
    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def since(whole, idle, own):
        before = performance._Used(1000.0, 400.0, 7.0)
        now = performance._Used(1000.0 + whole, 400.0 + idle, 7.0 + own)
        monkeypatch.setattr(performance, "_USED", before)
        monkeypatch.setattr(performance, "_used", lambda: now)
        monkeypatch.setattr(performance, "_IMPORTED", time.monotonic())
        wait_briefly()
        return os.environ.get("GOMP_SPINCOUNT")

    since.slept = slept
    return since


@pytest.mark.parametrize(
    ("whole", "idle", "own", "spins"),
    [
        (0.4, 0.2, 0.2, None),  # of two cores this process has one, nobody the other
        (0.4, 0.0, 0.2, "1000"),  # others have it
        (0.4, 0.15, 0.2, None),  # they have an eighth of the machine
        (3.2, 2.2, 0.1, "1000"),  # and here 0.9 of 3.2
        (0.0, 0.0, 0.0, None),  # it can't be told
    ],
)
def test_threads_sleep_soon_beside_busy_processes(openmp, whole, idle, own, spins):
    assert openmp(whole, idle, own) == spins
    (slept,) = openmp.slept
    assert 0 < slept <= 0.1


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_has_set_stays(openmp, monkeypatch, name):
    monkeypatch.setenv(name, "mine")
    openmp(0.4, 0.0, 0.2)
    assert {n: os.environ[n] for n in WAITING if n in os.environ} == {name: "mine"}
    assert not openmp.slept


def test_without_the_system_telling_nothing_is_set(openmp, monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert performance._used() is None
    assert performance._others(None, None) == 0.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat is Linux's")
def test_the_system_tells_of_a_busy_process():
    code = "import time; end = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.5)
        before = performance._used()
        time.sleep(0.5)
        assert performance._others(before, performance._used()) > 0.8
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("enabled", [True, False])
def test_imports_leave_the_garbage_collector_as_it_was(enabled):
    frozen, was = gc.get_freeze_count(), gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), quick_imports():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        (gc.enable if was else gc.disable)()


@pytest.fixture
def own_server(capfd):
    """Processes are forked from one that writes where this test looks."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.fixture
def finished(bnexp):
    run = run_of(bnexp, bnexp("train", "smoke", "training.steps=20", "expect.test_accuracy=null"))
    picture = run.path / "results.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    return run


@pytest.mark.parametrize("methods", [None, ["spawn"]])
def test_a_run_is_drawn_beside_or_afterwards(finished, monkeypatch, methods, own_server, capfd):
    if methods is not None:  # as on Windows
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    drawer = Drawer()
    assert (drawer._context is None) is (methods is not None)
    with drawer.drawing(finished.path):
        pass
    gc.enable()
    assert (finished.path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert capfd.readouterr().err == ""


def test_what_keeps_a_run_from_being_drawn_is_one_line(tmp_path, own_server, capfd):
    drawer = Drawer()
    with drawer.drawing(tmp_path / "nowhere"):
        pass
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("bnexp: results.png could not be drawn (")


def test_a_process_that_is_killed_while_it_draws(finished, own_server, capfd):
    drawer = Drawer()
    with drawer.drawing(finished.path):
        (process,) = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGKILL)
    assert (
        "could not be drawn (the process that draws ended with code -9)" in capfd.readouterr().err
    )


ENDING = """
import atexit, sys, threading
import bnexp.cli
atexit.register(lambda: print("at the end"))
def main():
    print("said", end=" ")
    if {thread}:
        threading.Thread(target=lambda: (threading.Event().wait(0.5), print("thread"))).start()
    sys.exit({code})
bnexp.cli.main = main
bnexp.cli.command()
"""


@pytest.mark.parametrize("code", [0, 3, "'a text'"])
@pytest.mark.parametrize("thread", [False, True])
def test_a_command_ends_with_its_code_and_nothing_undone(code, thread):
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(code=code, thread=thread)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (code if isinstance(code, int) else 1)
    assert done.stdout.split() == ["said", *(["thread"] if thread else []), "at", "the", "end"]
    assert done.stderr == ("" if isinstance(code, int) else "a text\n")
