"""Records that a stranger made: nothing outside of them is touched, nothing in them is waited for,
and whatever their files hold costs at most that record its row."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time

import numpy as np
import pytest

from bnexp.cli.runs import run_runs
from bnexp.errors import UserError
from bnexp.records import EVAL_COLUMNS, STEP_COLUMNS, CsvLog, Run, all_runs, create_run
from bnexp.records.audit import AuditRecord, next_folder, write_audit
from bnexp.records.files import read_bytes, read_json, read_yaml
from bnexp.records.lock import is_locked, locked

CONFIG = """
name: some
data: {name: digits}
model: {name: mlp}
statistics: {decay: 0.9, estimators: {}, recompute: {}}
training: {batch_size: 8, optimizer: {}, ema_accuracy_decay: 0.98}
test: {batch_size: 8}
"""
STEPS = ",".join(STEP_COLUMNS) + "\n"
EVALS = ",".join(EVAL_COLUMNS) + "\n"


@pytest.fixture
def run(tmp_path):
    environment = {"environment.json": {"id": "a", "created": "2026-01-01", "resumes": []}}
    run = create_run("some", CONFIG, environment, tmp_path / "runs")
    run.write_state("finished", 2, 2)
    (run.path / "steps.csv").write_text(STEPS + "1,0,0.1,2.5,0.5,0.5\n2,0,0.1,nan,0.5,0.5\n")
    (run.path / "evals.csv").write_text(EVALS + "2,test,running,0.5,1.5,10,0.1\n")
    return run


def read_everything(run):
    return run.config, run.environment, run.state, run.comparison(), run.steps(), run.evals()


def test_a_whole_record_is_read(run):
    config, environment, state, comparison, steps, evals = read_everything(run)
    assert config["data"] == {"name": "digits"} and environment["id"] == run.id == "a"
    assert state["state"] == "finished" and comparison is None
    assert steps["step"].tolist() == [1, 2] and np.isnan(steps["loss"][1])
    assert evals[0]["accuracy"] == 0.5 and evals[0]["step"] == 2


FILES = (
    "config.yaml", "environment.json", "state.json", "comparison.json", "steps.csv", "evals.csv",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "loop of links", "device"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_ordinary_file_is_named_at_once(run, kind, name):
    path = run.path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(run.path)  # a socket's path must be short
        try:
            socket.socket(socket.AF_UNIX).bind(name)
        finally:
            os.chdir(here)
    elif kind == "loop of links":
        path.symlink_to(name)
    else:
        path.symlink_to("/dev/zero")
    started = time.monotonic()
    with pytest.raises(UserError, match=name):
        read_everything(run)
    assert time.monotonic() - started < 30  # a pipe would be waited for, for ever


HUGE = "9" * 5000
HOSTILE = [
    ("state.json", '{"state": "[/x]", "step": 1}'),
    ("state.json", f'{{"state": "finished", "step": {HUGE}}}'),
    ("state.json", '{"state": "finished", "step": 1e999}'),
    ("state.json", '{"state": "finished", "step": NaN}'),
    ("state.json", '{"state": "finished", "step": true}'),
    ("state.json", '{"state": "finished", "step": -1}'),
    ("state.json", '{"state": "finished", "step": 9007199254740992}'),
    ("state.json", '{"state": "finished", "step": 1, "weights": [1]}'),
    ("state.json", '{"state": "finished", "step": 1, "message": {"a": 1}}'),
    ("state.json", '{"state": ["finished"], "step": 1}'),
    ("state.json", "[" * 100_000),
    ("environment.json", '{"created": "\\udcff"}'),
    ("environment.json", '{"created": "2026\\nand a line"}'),
    ("environment.json", '{"created": "\\u001b[31m"}'),
    ("environment.json", '{"created": 5}'),
    ("environment.json", '{"resumes": null}'),
    ("environment.json", '["created"]'),
    ("comparison.json", '{"kinds": []}'),
    ("comparison.json", '{"kinds": [{"accuracy": NaN}]}'),
    ("comparison.json", '{"baseline": "", "samples": 1, "classes": [], "verdict": "", "layers": {},'
                        ' "kinds": [{"accuracy": "x"}]}'),
    ("evals.csv", EVALS + "²,test,running,0.5,0.5,10,0.1\n"),
    ("evals.csv", EVALS + "٣,test,running,0.5,0.5,10,0.1\n"),
    ("evals.csv", EVALS + "9" * 23 + ",test,running,0.5,0.5,10,0.1\n"),
    ("evals.csv", EVALS + "1,test,running,nan,0.5,10,0.1\n"),
    ("evals.csv", EVALS + "1,test,running,1.5,0.5,10,0.1\n"),
    ("evals.csv", EVALS + "1,test,\x1b[31m,0.5,0.5,10,0.1\n"),
    ("evals.csv", EVALS + "\0" * 200_000 + "\n"),
    ("evals.csv", EVALS + "1,test\n"),
    ("steps.csv", STEPS + "1e308,0,1e308,1e308,1e308,1e308\n2,0,-1e308,-1e308,0.5,0.5\n"),
    ("steps.csv", STEPS + "1,0,0.1,1,0.5,0.5\n1,0,0.1,1,0.5,0.5\n"),
    ("steps.csv", STEPS + "1.5,0,0.1,1,0.5,0.5\n"),
    ("steps.csv", STEPS + "1,0,0.1,1,1.5,0.5\n"),
    ("steps.csv", STEPS + "1,0,nan,1,0.5,0.5\n"),
    ("steps.csv", STEPS + "1,0,0.1\n"),
    ("config.yaml", "data: [\n"),
    ("config.yaml", "- 1\n"),
    ("config.yaml", CONFIG.replace("digits", HUGE)),
    ("config.yaml", CONFIG.replace("digits", "!!timestamp x")),
    ("config.yaml", CONFIG.replace("digits", '"\\ud800"')),
    ("config.yaml", CONFIG.replace("{name: digits}", "[digits]")),
    ("config.yaml", "a: &a [x]\n" + CONFIG + "b: *a\n"),
    ("config.yaml", "{" * 5000),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_one_line_that_names_the_file_and_costs_one_row(run, capsys, name, text):
    other = create_run("other", CONFIG, {}, run.path.parent)
    (run.path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match=name) as refused:
        read_everything(run)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    run_runs(run.path.parent, as_json=True)
    rows = {row["name"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {run.name, other.name} and rows[other.name] == "unknown"
    run_runs(run.path.parent, as_json=False)
    shown = capsys.readouterr().out
    assert run.name in shown and other.name in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    "name", ["some-²", "some-٣", "[red]some-5", "some\n-7", "some-\x1b[31m8", b"some-\xff9"]
)
def test_a_folder_of_any_name_is_listed(run, capsys, name):
    path = run.path.parent / os.fsdecode(name)
    shutil.copytree(run.path, path)
    run_runs(run.path.parent, as_json=False)
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert len(lines) == 3 and "\x1b" not in "".join(lines)
    assert create_run("some", CONFIG, {}, run.path.parent).name == "some-2"


# ------------------------------------------------------------------------------------- links


def test_nothing_is_written_through_links(run, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("report.html", "steps.csv", "state.json", "results.png", ".lock"):
        (victim / name).write_text("precious")
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(victim / name)
    run.write("report.html", "page")
    run.write("results.png", b"picture")
    run.write_state("running", 1, 2)
    CsvLog(run.path / "steps.csv", STEP_COLUMNS).close()
    with pytest.raises(UserError, match="lock is no ordinary file"), run.locked():
        pass
    assert {path.read_text() for path in victim.iterdir()} == {"precious"}
    assert not (run.path / "steps.csv").is_symlink()
    assert read_bytes(run.path / "report.html") == b"page"


def test_a_folder_where_a_file_is_to_be_written_is_named(run):
    (run.path / "report.html").mkdir()
    with pytest.raises(UserError, match="html is a folder"):
        run.write("report.html", "page")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_a_lock_that_is_no_file_is_named_and_free(run, kind):
    path = run.path / ".lock"
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda p: os.symlink(".lock", p)}
    make[kind](path)
    assert not run.is_locked()
    with pytest.raises(UserError, match="lock is no ordinary file"), run.locked():
        pass


# -------------------------------------------------------------------------------------- lock


def test_asking_never_keeps_a_training_from_its_lock(tmp_path):
    path = tmp_path / ".lock"
    path.touch()
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            is_locked(path)

    readers = [threading.Thread(target=ask) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(300):
            with locked(path):
                assert is_locked(path)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not is_locked(path)


def test_of_two_that_wait_for_a_reader_one_has_the_lock(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    entered = []

    def other(_):
        reader.close()
        monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("one keeps the other waiting"))
        with locked(path):
            entered.append("other")

    with open(path, "w") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", other)
        with locked(path):
            entered.append("first")
    assert entered == ["other", "first"]


def test_a_lock_is_held_once(tmp_path):
    path = tmp_path / ".lock"
    with locked(path), pytest.raises(BlockingIOError), locked(path):
        pass
    with locked(path):
        pass


# ------------------------------------------------------------------------------- making a record


def test_what_a_killed_process_left_is_ignored_and_in_the_end_removed(run):
    runs = run.path.parent
    old, young = runs / ".making-old", runs / ".making-young"
    for folder in (old, young):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(CONFIG)
    os.utime(old, (1, 1))
    assert [r.name for r in all_runs(runs)] == [run.name]
    create_run("some", CONFIG, {}, runs)
    assert young.exists() and not old.exists()


def test_a_folder_that_exists_is_not_taken(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        create_run("some", CONFIG, {}, folder=tmp_path / "there")
    assert create_run("some", CONFIG, {}, folder=tmp_path / "new" / "one") == Run(
        tmp_path / "new" / "one"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "runs", "there"]


def test_whole_files_are_read_and_others_named(tmp_path):
    assert read_bytes(tmp_path / "nothing") is read_json(tmp_path / "nothing") is None
    (tmp_path / "some.yaml").write_text("a: [1, {b: 0.5}]")
    assert read_yaml(tmp_path / "some.yaml") == {"a": [1, {"b": 0.5}]}
    with pytest.raises(UserError, match="has 16 bytes"):
        read_bytes(tmp_path / "some.yaml", limit=10)


def test_an_audit_from_a_stranger_is_read_as_guardedly_as_a_run(tmp_path):
    folder = tmp_path / "audit-1"
    write_audit(folder, comparison={"a": 1}, findings={}, statistics={})
    record = AuditRecord(folder)
    assert record.comparison == {"a": 1}
    (folder / "comparison.json").write_text('{"a": NaN}')
    (folder / "findings.json").unlink()
    os.mkfifo(folder / "findings.json")
    (folder / "environment.json").write_text(r'{"a": "\udcff"}')
    (folder / "config.yaml").unlink()
    for name in ("comparison", "findings", "environment", "config"):
        with pytest.raises(UserError, match=rf"{name}\.\w+ is (damaged|missing)"):
            getattr(record, name)


def test_what_a_killed_audit_left_is_removed_and_its_number_is_free(tmp_path):
    runs = tmp_path / "runs"
    left = runs / ".making-old"
    left.mkdir(parents=True)
    os.utime(left, (1, 1))
    write_audit(next_folder("audit", runs), comparison={}, findings={}, statistics={})
    assert [path.name for path in runs.iterdir()] == ["audit-1"]
    with pytest.raises(UserError, match="exists"):
        write_audit(runs / "audit-1", comparison={}, findings={}, statistics={})
    assert [path.name for path in runs.iterdir()] == ["audit-1"]
