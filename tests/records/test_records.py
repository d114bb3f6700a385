"""The run folder: made whole, appended to in whole lines, read while it grows."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bnexp.atomic import write_atomically
from bnexp.config import load_config
from bnexp.errors import UserError
from bnexp.records import (
    STEP_COLUMNS,
    CsvLog,
    all_runs,
    create_run,
    find_run,
    newest_finished_run,
)
from bnexp.records.files import read_json
from bnexp.records.folder import Folder
from bnexp.records.study import create_study


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("data: {name: digits}\nmodel: {name: mlp}\ntraining: {steps: 10}\n")
    return load_config(path)


def create(config, environment, runs):
    return create_run(config.name, config.to_yaml(), {"environment.json": environment}, runs)


def test_runs_made_at_the_same_moment_get_different_folders(tmp_path, config):
    runs = tmp_path / "runs"
    barrier = threading.Barrier(8)

    def make(_):
        barrier.wait()
        return create(config, {"created": "2026"}, runs)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert sorted(run.name for run in made) == [f"small-{n}" for n in range(1, 9)]
    assert sorted(p.name for p in runs.iterdir()) == [f"small-{n}" for n in range(1, 9)]
    assert all(load_config(run.path / "config.yaml") == config for run in made)


def test_a_number_is_never_used_twice(tmp_path, config):
    for expected in ("small-1", "small-2"):
        assert create(config, {}, tmp_path / "runs").name == expected
    (tmp_path / "runs" / "small-9").mkdir()
    assert create(config, {}, tmp_path / "runs").name == "small-10"


def test_a_failing_creation_leaves_nothing(tmp_path, config):
    with pytest.raises(TypeError):
        create(config, {"not json": object()}, tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_continuing_a_log_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "steps.csv"
    log = CsvLog(path, STEP_COLUMNS)
    log.append([(step, 0, 0.1, 1.0, 0.5, 0.5) for step in range(1, 8)])
    log.close()
    with open(path, "a") as file:
        file.write("8,0,0.1")
    log = CsvLog(path, STEP_COLUMNS, last_step=5)
    log.append([(6, 0, 0.1, 1.0, 0.5, 0.5)])
    log.close()
    with open(path) as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]


def test_a_line_being_written_is_left_out_when_reading(tmp_path, config):
    run = create(config, {}, tmp_path / "runs")
    with open(run.path / "steps.csv", "a") as file:
        file.write("1,0,0.1,2.5,0.5,0.5\n2,0,0.")
    assert run.steps()["loss"].tolist() == [2.5]
    assert run.evals() == []


def test_atomic_writing_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_runs_are_found_by_path_and_by_name(tmp_path, config):
    runs = tmp_path / "runs"
    run = create(config, {}, runs)
    assert find_run(str(run.path), runs) == run
    assert find_run("small-1", runs).path == run.path


def test_a_folder_that_is_no_run_is_named(tmp_path, config):
    create(config, {}, tmp_path / "runs")
    with pytest.raises(UserError, match="not a run folder"):
        find_run(str(tmp_path), tmp_path / "runs")
    with pytest.raises(UserError, match="no run nothing; the newest are small-1"):
        find_run("nothing", tmp_path / "runs")


def test_the_newest_finished_run_is_the_one_evaluated(tmp_path, config):
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match="no finished run"):
        newest_finished_run(runs)
    for day, state in [("01", "finished"), ("02", "finished"), ("03", "failed")]:
        run = create(config, {"created": f"2026-01-{day}"}, runs)
        run.write_json("state.json", {"state": state, "step": 10})
    assert newest_finished_run(runs).name == "small-2"
    assert [run.name for run in all_runs(runs)] == ["small-3", "small-2", "small-1"]


def test_a_run_whose_process_died_is_said_to_be_killed(tmp_path, config):
    run = create(config, {}, tmp_path / "runs")
    run.write_json("state.json", {"state": "running", "step": 5})
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from bnexp.records import Run\n"
            "with Run(Path(sys.argv[1])).locked():\n"
            "    print('held', flush=True); sys.stdin.read()",
            str(run.path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    assert run.state["state"] == "running"
    holder.kill()
    holder.wait()
    assert run.state["state"] == "killed"


def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(tmp_path, config, monkeypatch):
    run = create(config, {}, tmp_path / "runs")
    study = create_study("grid", "", {"state": "running"}, tmp_path / "runs")
    run.write_state("running", 5, 10)

    def ending(self):
        self.write_json("state.json", {**read_json(self.path / "state.json"), "state": "finished"})
        return False

    monkeypatch.setattr(Folder, "is_locked", ending)
    assert run.state["state"] == study.state["state"] == "finished"
