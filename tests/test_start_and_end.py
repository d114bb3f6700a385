"""How commands begin and end: what they choose, import and draw; nothing is left undone."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import run_of, wait_for

from bnexp import performance
from bnexp.performance import WAITING, quick_imports, wait_briefly
from bnexp.report.beside import Drawer


@pytest.fixture
def openmp(monkeypatch):
    """Nothing set, and as the module was imported just now. What is given then is what all cores
    have done since: seconds in all, idle, and of this process."""
    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
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


def test_where_torch_is_imported_it_is_too_late(openmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert openmp(0.4, 0.0, 0.2) is None


@pytest.mark.parametrize("lines", ["", "cpu  1 2 3 4\n", "cpu0 1 2 3 4\ncpu1 1 2\n", "cpu0 a\n"])
def test_an_odd_system_tells_nothing(monkeypatch, tmp_path, lines):
    (tmp_path / "stat").write_text(lines)
    real = open
    monkeypatch.setattr("builtins.open", lambda *_: real(tmp_path / "stat"))
    used = performance._used()
    assert used is None or used.whole == 0


def test_without_the_system_telling_nothing_is_set(openmp, monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert performance._used() is None
    assert performance._others(None, None) == 0.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat is Linux's")
def test_the_system_tells_of_a_busy_process():
    """On one core: a container may be allowed no more of those that it sees."""
    code = "import time; end = time.monotonic() + 120\nwhile time.monotonic() < end: pass"

    def is_told():
        before = performance._used()
        time.sleep(0.5)
        return performance._others(before, performance._used()) > 0.8

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        busy = subprocess.Popen([sys.executable, "-c", code])
        try:
            wait_for(is_told)
        finally:
            busy.kill()
            busy.wait()
    finally:
        os.sched_setaffinity(0, cores)


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
def finished(bnexp):
    run = run_of(bnexp, bnexp("train", "smoke", "training.steps=20", "expect.test_accuracy=null"))
    picture = run.path / "results.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    return run


@pytest.mark.parametrize("alone", [True, False])
def test_a_run_is_drawn_beside_or_afterwards(finished, monkeypatch, alone, capfd):
    if not alone:
        monkeypatch.setattr(subprocess, "Popen", no_process)
    with Drawer() as drawer, drawer.drawing(finished.path):
        pass
    assert (finished.path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert capfd.readouterr() == ("", "")


def no_process(*_, **__):
    raise OSError("no further process")


@pytest.mark.parametrize("alone", [True, False])
def test_what_keeps_a_run_from_being_drawn_is_one_line(tmp_path, monkeypatch, alone, capfd):
    if not alone:
        monkeypatch.setattr(subprocess, "Popen", no_process)
    with Drawer() as drawer, drawer.drawing(tmp_path / "nowhere"):
        pass
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("bnexp: results.png could not be drawn (")


def test_where_the_process_that_draws_is_killed_it_is_drawn_here(finished, capfd):
    with Drawer() as drawer:
        os.kill(drawer._process.pid, signal.SIGKILL)
        with drawer.drawing(finished.path):
            pass
    assert (finished.path / "results.png").exists()
    assert capfd.readouterr() == ("", "")


def test_where_nothing_is_to_be_drawn_the_process_is_gone(capfd):
    with pytest.raises(ZeroDivisionError), Drawer() as drawer:
        raise ZeroDivisionError
    assert drawer._process.returncode is not None
    assert capfd.readouterr() == ("", "")


def test_nothing_is_imported_from_the_working_folder(finished, monkeypatch, capfd):
    (finished.path / "matplotlib.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(finished.path)
    with Drawer() as drawer, drawer.drawing(finished.path):
        pass
    assert (finished.path / "results.png").exists()
    assert capfd.readouterr() == ("", "")


ENDING = """
import atexit, sys, threading
import bnexp.cli
atexit.register(lambda: print("at the end"))
def main():
    print("said", end=" ")
    if {profiled}:
        sys.setprofile(lambda *_: None)
    if {thread}:
        threading.Thread(target=lambda: (threading.Event().wait(0.5), print("thread"))).start()
    sys.exit({code})
bnexp.cli.main = main
bnexp.cli.command()
"""


@pytest.mark.parametrize("code", [0, 3, "'a text'"])
@pytest.mark.parametrize(("thread", "profiled"), [(False, False), (True, False), (False, True)])
def test_a_command_ends_with_its_code_and_nothing_undone(code, thread, profiled):
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(code=code, thread=thread, profiled=profiled)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (code if isinstance(code, int) else 1)
    assert done.stdout.split() == ["said", *(["thread"] if thread else []), "at", "the", "end"]
    assert done.stderr == ("" if isinstance(code, int) else "a text\n")
