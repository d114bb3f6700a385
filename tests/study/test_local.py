"""The local engine with real processes, killed at any moment."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from bnexp.errors import UserError
from bnexp.records.study import StudyRecord, find_study
from bnexp.study.local import run_local
from bnexp.study.run import find_record, load_plan, run_study
from tests.conftest import wait_for
from tests.study.studies import DECAYS, SMALL, plan_of, rows_of, run, start

pytestmark = pytest.mark.slow

STEPS = 4000
LONG = """
name: long
base:
  data: {name: digits}
  model: {name: mlp}
  training: {steps: 4000, batch_size: 20, optimizer: {name: sgd, lr: 0.1}}
  checkpoints: {every_steps: 50}
vary: {training.batch_size: [20, 30]}
seeds: 2
"""


class Silent:
    def show(self, progress) -> None:
        pass

    def line(self, text: str) -> None:
        pass


def local(jobs, watcher):
    from bnexp.config.study import ResourcesConfig

    run_local(jobs, 2, ResourcesConfig(), watcher)


def done(text, runs: Path, fold=True):
    return run_study(plan_of(text, fold=fold), local, 2, Silent(), runs=runs)


def test_folded_is_unfolded_bit_for_bit(tmp_path):
    """Decays, estimators and both: every row of the results, as they are printed."""
    text = SMALL + DECAYS.replace("seeds: 2", "seeds: 1").replace(
        "vary:",
        "vary:\n  statistics.estimators: [{}, {slow: {rule: ema, decay: 0.9}}, "
        "{slow: {rule: pooled, window: 2}}]",
    )
    folded = done(text, tmp_path / "folded")
    alone = done(text, tmp_path / "alone", fold=False)
    assert len(list(folded.record.experiments.iterdir())) == 2
    assert len(list(alone.record.experiments.iterdir())) == 18
    assert rows_of(folded.record) == rows_of(alone.record)
    running = {r["accuracy"] + r["loss"] for r in rows_of(alone.record)}
    assert len(running) >= 8  # they do differ


def test_the_same_again_runs_nothing_and_more_seeds_run_those_alone(tmp_path):
    first = done(SMALL + "seeds: 1", tmp_path)
    (folder,) = first.record.experiments.iterdir()
    before = (folder / "steps.csv").stat()
    again = done(SMALL + "seeds: 1", tmp_path)
    after = (folder / "steps.csv").stat()
    assert again.record == first.record
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    more = done(SMALL + "seeds: 2", tmp_path)
    assert more.record.path.name == "small-2"
    taken = more.record.experiments / folder.name
    assert (taken / "steps.csv").stat().st_ino == before.st_ino
    assert more.states == {"finished": 2}


def test_a_damaged_experiment_of_another_record_is_run_again(tmp_path):
    first = done(SMALL + "seeds: 1", tmp_path)
    (folder,) = first.record.experiments.iterdir()
    (folder / "state.json").write_text("{")
    assert done(SMALL + "seeds: 2", tmp_path).states == {"finished": 2}


def test_one_that_diverges_is_a_result_and_stops_no_other(tmp_path):
    text = SMALL + "vary: {training.optimizer.lr: [0.1, 1.0e+30]}\nseeds: 1\nclaims: "
    text += "[{says: x, compare: [{training.optimizer.lr: 0.1}, {training.optimizer.lr: 1.0e+30}],"
    text += " expect: second diverges}]"
    found = done(text, tmp_path)
    assert found.states == {"finished": 1, "diverged": 1} and found.failed == {}
    assert found.judged[0].verdict == "supported"
    (record,) = [found.record]
    assert record.state["state"] == "finished"
    keys = {p.name: (p / "steps.csv").stat().st_mtime_ns for p in record.experiments.iterdir()}
    assert done(text, tmp_path).states == found.states  # not tried again
    assert keys == {
        p.name: (p / "steps.csv").stat().st_mtime_ns for p in record.experiments.iterdir()
    }


def test_what_fails_is_shown_and_repeated_on_request(tmp_path):
    text = SMALL + "vary: {training.batch_size: [20, 5000]}\nseeds: 1"
    found = done(text, tmp_path)
    assert found.states == {"finished": 1, "failed": 1}
    ((label, message),) = found.failed.items()
    assert label.startswith("batch_size 5000") and "5000" in message
    assert found.record.state["state"] == "failed"
    assert done(text, tmp_path).failed == found.failed
    again = run_study(plan_of(text), local, 2, Silent(), runs=tmp_path, retry=True)
    assert again.failed == found.failed


def test_a_study_is_run_once_at_a_time(tmp_path):
    plan = plan_of(SMALL)
    record = find_record(plan, tmp_path)
    with record.locked(), pytest.raises(UserError, match="run by another process"):
        run_study(plan, local, 2, Silent(), runs=tmp_path)


def test_its_record_is_a_study_file(tmp_path):
    record = find_record(plan_of(SMALL + DECAYS), tmp_path)
    assert load_plan(record).grid == plan_of(SMALL + DECAYS).grid


def test_a_records_own_study_file_goes_on_in_it_wherever_it_lies(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    assert run(tmp_path, "small.yaml", "--runs-dir", "elsewhere") == 0
    (tmp_path / "elsewhere" / "small-1").rename(tmp_path / "kept")
    assert run(tmp_path, "kept/study.yaml") == 0
    assert "3 of 3 trainings are done already" in (tmp_path / "stderr").read_text()
    assert not (tmp_path / "runs").exists()
    assert run(tmp_path, "kept/study.yaml", "seeds=4") == 0
    assert "3 of 4 trainings are done already" in (tmp_path / "stderr").read_text()
    assert find_study("small-1", tmp_path / "runs") is not None


def _record(folder: Path) -> StudyRecord | None:
    return find_study("long-1", folder / "runs")


def _trained(folder: Path, experiments: int = 1) -> bool:
    record = _record(folder)
    runs = list(record.experiments.glob("*/checkpoints/step-*.pt")) if record else []
    return len({path.parent for path in runs}) >= experiments


def _works(pid: int) -> bool:
    """Whether the process has not ended; nobody may wait for it, and so it may still be there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def _workers(pid: int) -> list[int]:
    """The processes below `pid` that train."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        state, parent = text.rpartition(")")[2].split()[:2]
        if state != "Z":
            found.append((int(path.parent.name), int(parent)))
    below, everyone = {pid}, set()
    while below:
        below = {child for child, parent in found if parent in below}
        everyone |= below
    trains = []
    for child in everyone:
        try:
            links = [os.readlink(p) for p in Path(f"/proc/{child}/fd").iterdir()]
        except OSError:
            continue
        if any("steps.csv" in link for link in links):
            trains.append(child)
    return trains


def _whole(folder: Path) -> None:
    """The study ended as one that nothing disturbed: every step once, all experiments there."""
    record = _record(folder)
    assert record is not None and record.state["state"] == "finished"
    assert record.state["done"] == 4
    for path in record.experiments.iterdir():
        if path.is_dir():
            lines = (path / "steps.csv").read_text().splitlines()[1:]
            assert [int(line.split(",")[0]) for line in lines] == list(range(1, STEPS + 1))
    rows = rows_of(record)
    assert {r["state"] for r in rows} == {"finished"}
    assert len(rows) == 4 * 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "long.yaml").write_text(LONG)
    assert run(folder, "long.yaml", "--jobs", 2) == 0
    record = _record(folder)
    assert record is not None
    return rows_of(record)


def test_what_is_killed_goes_on(tmp_path, undisturbed):
    """A worker, the study with all its processes, the study alone, the server they are forked
    from; then Ctrl-C; then to the end: the same numbers as undisturbed."""
    (tmp_path / "long.yaml").write_text(LONG)

    study = start(tmp_path, "long.yaml", "--jobs", 2)
    wait_for(lambda: _trained(tmp_path, 2), 120)
    (worker, *_) = wait_for(lambda: _workers(study.pid), 120)
    os.kill(worker, signal.SIGKILL)  # is begun again
    wait_for(lambda: worker not in _workers(study.pid) and len(_workers(study.pid)) >= 1, 120)
    assert study.poll() is None
    os.killpg(study.pid, signal.SIGKILL)
    study.wait(60)

    study = start(tmp_path, "long.yaml", "--jobs", 2)
    workers = wait_for(lambda: _workers(study.pid), 120)
    os.kill(study.pid, signal.SIGKILL)  # the workers notice, and end with a checkpoint
    study.wait(60)
    wait_for(lambda: not any(map(_works, workers)), 120)

    study = start(tmp_path, "long.yaml", "--jobs", 2)
    wait_for(lambda: _workers(study.pid), 120)
    os.kill(study.pid, signal.SIGINT)
    assert study.wait(120) == 130
    assert "go on with: bnexp study" in (tmp_path / "stderr").read_text()
    record = _record(tmp_path)
    assert record is not None and record.state["state"] == "interrupted"

    assert run(tmp_path, "long.yaml", "--jobs", 2) == 0
    _whole(tmp_path)
    record = _record(tmp_path)
    assert record is not None
    assert rows_of(record) == undisturbed


def test_expectations_and_json_for_ci(tmp_path):
    claim = "{says: it is, compare: [running, recomputed], expect: %s}"
    text = SMALL + "seeds: 3\nexpect: {claims: supported}\nclaims: "
    (tmp_path / "s.yaml").write_text(text + f"[{claim % 'first is better by 0.9'}]")
    assert run(tmp_path, "s.yaml", "--json", "--runs-dir", "elsewhere") == 3
    found = json.loads((tmp_path / "stdout").read_text())
    assert found["experiments"] == {"finished": 3}
    assert found["claims"][0]["verdict"] == "contradicted"
    assert "expect.claims" in (tmp_path / "stderr").read_text()
    assert find_study("small-1", tmp_path / "elsewhere") is not None
    (tmp_path / "s.yaml").write_text(text + f"[{claim % 'equal within 0.999'}]")
    assert run(tmp_path, "s.yaml", "--runs-dir", "elsewhere") == 0  # the claim alone is new
    out = (tmp_path / "stdout").read_text()
    assert "supported: it is" in out and "study: elsewhere/small-1" in out
    assert run(tmp_path, "s.yaml", "training.steps=-1") == 2
    assert len((tmp_path / "stderr").read_text().splitlines()) == 1


def test_a_dry_run_writes_nothing(tmp_path):
    (tmp_path / "s.yaml").write_text(SMALL + DECAYS)
    assert run(tmp_path, "s.yaml", "--dry-run", "--json") == 0
    plan = json.loads((tmp_path / "stdout").read_text())
    assert plan["experiments"] == 12 and len(plan["trainings"]) == 4 and plan["seconds"] > 0
    assert not (tmp_path / "runs").exists()
