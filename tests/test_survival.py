"""Runs that are killed, interrupted, starved or diverge: what is kept and what is said."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import run_of, trained, wait_for

from bnexp.config import load_config
from bnexp.records import Run
from bnexp.training.checkpoints import load_checkpoint, newest_checkpoint

CONFIG = """
name: survivor
data: {name: digits, val_fraction: 0.1, augment: {crop_padding: 1}}
model: {name: small-cnn}
statistics:
  estimators:
    slow: {rule: ema, decay: 0.99, debias: true}
    average: {rule: cumulative}
    window: {rule: pooled, window: 7}
  recompute: {samples: 300}
training:
  steps: 90
  batch_size: 32
  optimizer: {lr: 0.05}
  schedule: {name: plateau, patience: 20, min_delta: 0.05, factor: 0.5}
  averages: {ema: {decay: 0.95}, swa: {start: 0.3, every: 5}}
  check_every: 10
test: {every: 7, statistics: [running, recomputed, batch], train_accuracy: true}
checkpoints: {every_steps: 4, every_seconds: 0.5, keep: 2}
"""


@pytest.fixture
def config(bnexp):
    (bnexp.cwd / "survivor.yaml").write_text(CONFIG)
    return "survivor.yaml"


def rows_without_seconds(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.evals()]


def assert_same_run(one, other):
    """Bit for bit: logs, weights, optimizer, estimators, averages and random state."""
    assert (one.path / "steps.csv").read_bytes() == (other.path / "steps.csv").read_bytes()
    assert rows_without_seconds(one) == rows_without_seconds(other)
    first, _ = newest_checkpoint(one.checkpoints)
    second, _ = newest_checkpoint(other.checkpoints)
    assert_same_tree({**first, "config": "", "run": ""}, {**second, "config": "", "run": ""})
    assert one.comparison() == other.comparison()


def assert_same_tree(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_tree(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_tree(a, b)
    else:
        assert one == other


def test_kill_9_at_random_moments_changes_nothing(bnexp, config):
    reference = trained(bnexp, config, "--name", "reference")
    started = time.monotonic()
    trained(bnexp, config, "--name", "timing")
    whole = time.monotonic() - started
    rng = random.Random(0)
    kills = 0
    for attempt in range(30):
        if kills >= 8:
            break
        name = f"victim{attempt}"
        command = bnexp.start("train", config, "--name", name)
        path = bnexp.cwd / "runs" / f"{name}-1"
        wait_for(path.is_dir)
        for _ in range(4):
            time.sleep(rng.uniform(0.0, whole / 3))
            with contextlib.suppress(ProcessLookupError):
                command.signal(signal.SIGKILL)
            if command.wait().code == 0:
                break
            kills += 1
            if Run(path).state["state"] == "finished":  # killed while its picture was drawn
                break
            command = bnexp.start("train", "--resume", path)
        else:
            done = command.wait()
            assert done.code == 0, done.stderr
        assert_same_run(reference, Run(path))
        assert not list((path / "checkpoints").glob(".*"))
    assert kills >= 8


@pytest.mark.parametrize("moment", ["checkpoint", "evaluation"])
def test_kill_9_during_checkpointing_and_evaluation(bnexp, config, moment):
    """The moment is caught by watching for the temporary file, or for rows of an evaluation."""
    reference = trained(bnexp, config, "--name", "reference")
    command = bnexp.start("train", config, "--name", "victim")
    run = Run(bnexp.cwd / "runs" / "victim-1")
    wait_for(run.path.is_dir)
    seen = set()
    for round_ in range(5):
        if moment == "checkpoint":

            def new_or_end(seen=frozenset(seen)):
                return _being_written(run) - seen or (_finished(run) and {"end"})

            seen |= wait_for(new_or_end)
        else:
            wanted = 20 * (round_ + 1)
            wait_for(lambda wanted=wanted: len(run.evals()) >= wanted or _finished(run))
        with contextlib.suppress(ProcessLookupError):
            command.signal(signal.SIGKILL)
        if command.wait().code == 0:
            break
        command = bnexp.start("train", "--resume", run.path)
    else:
        assert command.wait().code == 0
    assert_same_run(reference, run)


def _being_written(run):
    return {path.name for path in run.checkpoints.glob(".*.tmp")}


def _finished(run):
    with contextlib.suppress(ValueError):
        return run.state["state"] == "finished"


KILL = """
import os, signal
left = [{number}]
def killing(function):
    def run(*args, **kwargs):
        if any("checkpoints" in str(argument) for argument in args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return run
os.replace, os.link, os.unlink = map(killing, (os.replace, os.link, os.unlink))
"""


def test_kill_9_before_every_single_write_in_the_checkpoints_folder(bnexp):
    """Between a step's checkpoint and the best's, too: the best is the undisturbed run's."""
    (bnexp.cwd / "best.yaml").write_text(BEST_CONFIG)
    reference = trained(bnexp, "best.yaml", "--name", "reference")
    assert reference.state["weights"] == "best"
    best = load_checkpoint(reference.checkpoints / "best.pt")
    for number in range(1, 100):
        name = f"killed{number}"
        done = bnexp("train", "best.yaml", "--name", name, inject=KILL.format(number=number))
        if done.code == 0:
            break
        run = Run(bnexp.cwd / "runs" / f"{name}-1")
        assert run.state["state"] == "killed"
        done = bnexp("train", "--resume", run.path)
        assert done.code == 0, done.stderr
        assert_same_run(reference, run)
        found = load_checkpoint(run.checkpoints / "best.pt")
        assert_same_tree({**best, "config": "", "run": ""}, {**found, "config": "", "run": ""})
        shutil.rmtree(run.path)
    assert number > 10


BEST_CONFIG = """
name: best
data: {name: digits, limit: {train: 300, test: 100}, val_fraction: 0.3}
model: {name: mlp}
statistics: {recompute: {samples: 100}}
training:
  steps: 60
  batch_size: 32
  optimizer: {lr: 0.5}
  early_stopping: {metric: val_accuracy, patience: 2}
test: {every: 5}
checkpoints: {every_steps: 9, every_seconds: null}
"""


def test_best_weights_that_are_lost_are_not_replaced_by_others_in_silence(bnexp):
    """Both files of the best evaluation are gone: the last weights are taken, and that is said."""
    (bnexp.cwd / "best.yaml").write_text(BEST_CONFIG)
    run = trained(bnexp, "best.yaml")
    assert run.state["weights"] == "best"
    (run.checkpoints / "best.pt").unlink()
    for path in run.checkpoints.glob("step-*.pt"):
        if load_checkpoint(path)["best"]["step"] == load_checkpoint(path)["step"]:
            path.unlink()
    run.write_state("running", 0, 60)
    done = bnexp("train", "--resume", run.path)
    assert done.code == 0, done.stderr
    assert "the best weights, of step" in done.stderr and "are lost" in done.stderr
    assert run.state["weights"] == "last" and run.comparison()["weights"] == "last"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_exits_130(bnexp, config, number):
    reference = trained(bnexp, config, "--name", "reference")
    command = bnexp.start("train", config, "checkpoints={every_steps: 1000}", "--name", "victim")
    run = Run(bnexp.cwd / "runs" / "victim-1")
    wait_for(lambda: run.path.is_dir() and run.evals())
    command.signal(number)
    done = command.wait()
    assert done.code == 130, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "checkpoint is written" in line and "bnexp train --resume" in line
    state = run.state
    assert state["state"] == "interrupted"
    assert newest_checkpoint(run.checkpoints)[0]["step"] == state["step"]
    assert bnexp("train", "--resume", run.path).code == 0
    assert_same_run(reference, run)
    (resume,) = run.environment["resumes"]
    assert resume["step"] == state["step"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_two_signals_end_the_run_at_once_and_its_state_is_true(bnexp, config, number):
    command = bnexp.start(
        "train",
        config,
        "training.steps=100000",
        "test.every=null",
        "training.averages={}",
        "checkpoints={every_steps: 50, every_seconds: null}",
        "--name",
        "victim",
    )
    run = Run(bnexp.cwd / "runs" / "victim-1")
    wait_for(lambda: list((run.path / "checkpoints").glob("step-*.pt")))
    command.signal(number)
    command.signal(number)
    with contextlib.suppress(ProcessLookupError):
        command.signal(number)
    done = command.wait()
    assert done.code == 130, done.stderr
    assert "Traceback" not in done.stderr
    state, newest = run.state, newest_checkpoint(run.checkpoints)[0]
    assert state["state"] in (
        "interrupted",
        "killed",
    )  # killed: the third came while it was written
    assert state["step"] in (newest["step"], newest["step"] - 50)
    assert not run.is_locked()


def test_a_damaged_newest_checkpoint_is_passed_over(bnexp, config):
    reference = trained(bnexp, config, "--name", "reference")
    victim = trained(bnexp, config, "--name", "victim")
    newest, _before = sorted(victim.checkpoints.glob("step-*.pt"), reverse=True)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 16
    newest.write_bytes(data)
    state = json.loads((victim.path / "state.json").read_text())
    victim.write_json("state.json", {**state, "state": "running"})
    done = bnexp("train", "--resume", victim.path)
    assert done.code == 0, done.stderr
    assert f"{newest} is damaged" in done.stderr and "using the one before" in done.stderr
    assert load_checkpoint(newest)["step"] == 90
    assert_same_run(reference, victim)


def test_disk_full_is_one_line_and_the_last_checkpoint_is_whole(bnexp, config):
    limit = 700_000  # a checkpoint of this model is larger
    done = bnexp("train", config, "model.name=mlp", "--name", "small", file_size_limit=limit)
    assert done.code == 0, done.stderr
    done = bnexp("train", config, "--name", "large", file_size_limit=limit)
    assert done.code == 1
    assert done.stderr.strip().splitlines()[-1].startswith("bnexp: the file size limit is reached")
    assert "Traceback" not in done.stderr
    run = Run(bnexp.cwd / "runs" / "large-1")
    assert run.state["message"].startswith("the file size limit is reached")
    assert not list(run.checkpoints.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB, where mounting one is allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_disk_that_fills_up_during_the_run(bnexp, config, small_disk):
    shutil.copy(bnexp.cwd / config, small_disk)
    bnexp.cwd = small_disk
    trained(bnexp, config, "training.steps=20", "--name", "first")
    filler = small_disk / "filler"
    command = bnexp.start(
        "train",
        config,
        "training.steps=5000",
        "--name",
        "victim",
        "test.every=null",
        "training.averages={}",
        "checkpoints={every_steps: 20, every_seconds: null}",
    )
    run = Run(small_disk / "runs" / "victim-1")
    wait_for(lambda: list((run.path / "checkpoints").glob("step-*.pt")))
    # Without a buffer, which closing the file would try to write once more.
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(100_000))
    done = command.wait()
    assert done.code == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("bnexp: the disk is full")
    assert "Traceback" not in done.stderr
    filler.unlink()
    state, passed_over = newest_checkpoint(run.checkpoints)
    assert state["step"] > 0 and not passed_over
    done = bnexp("train", "--resume", run.path, f"training.steps={state['step'] + 10}")
    assert done.code == 0, done.stderr


def test_a_run_that_is_still_running_can_not_be_resumed(bnexp, bnexp_beside, config):
    command = bnexp.start("train", config, "training.steps=100000", "test.every=null")
    run = Run(bnexp.cwd / "runs" / "survivor-1")
    wait_for(lambda: run.path.is_dir() and (run.path / "state.json").exists())
    done = bnexp_beside("train", "--resume", run.path)
    command.signal(signal.SIGKILL)
    command.wait()
    assert done.code == 2
    assert "still being trained by another process" in done.stderr
    assert run.state["state"] == "killed"


def test_two_trainings_started_together_get_different_folders(bnexp, bnexp_beside, config):
    first = bnexp.start("train", config, "training.steps=10")
    second = bnexp_beside.start("train", config, "training.steps=10")
    done = [first.wait(), second.wait()]
    assert [d.code for d in done] == [0, 0]
    assert {run_of(bnexp, d).name for d in done} == {"survivor-1", "survivor-2"}


def test_resuming_with_another_model_or_data_is_refused_with_the_keys(bnexp, config):
    run = trained(bnexp, config, "training.steps=10")
    done = bnexp("train", "--resume", run.path, "model.name=mlp", "training.batch_size=16")
    assert done.code == 2
    assert "model.name: 'small-cnn' became 'mlp'" in done.stderr
    assert "training.batch_size: 32 became 16" in done.stderr
    done = bnexp("train", "--resume", run.path)
    assert done.code == 2 and "has finished at step 10" in done.stderr


def test_more_steps_are_allowed_and_recorded(bnexp, config):
    without_swa = "training.averages={}"
    run = trained(bnexp, config, "training.steps=10", without_swa)
    done = bnexp("train", "--resume", run.path, "training.steps=25")
    assert done.code == 0, done.stderr
    assert run.steps()["step"].tolist() == list(range(1, 26))
    assert run.environment["resumes"][0]["changes"] == {"training.steps": [10, 25]}
    assert load_config(run.path / "config.yaml").training.steps == 25


def test_another_length_is_refused_where_swa_has_a_start(bnexp, config):
    run = trained(bnexp, config, "training.steps=10")
    done = bnexp("train", "--resume", run.path, "training.steps=25")
    assert done.code == 2 and "training.averages.swa" in done.stderr


def test_divergence_stops_the_run_says_where_and_keeps_a_good_checkpoint(bnexp, config):
    done = bnexp(
        "train",
        config,
        "model.norm=none",
        "training.optimizer.lr=1e8",
        "training.schedule={name: constant, warmup_steps: 60}",
        "statistics={}",
        "checkpoints={every_steps: 1}",
        "test.every=null",
        "training.averages={}",
    )
    assert done.code == 1
    line = done.stderr.strip().splitlines()[-1]
    assert "diverged" in line and "at step" in line and "learning rate" in line
    run = Run(bnexp.cwd / "runs" / "survivor-1")
    assert run.state["state"] == "failed" and "diverged" in run.state["message"]
    state, _ = newest_checkpoint(run.checkpoints)
    assert all(torch.isfinite(v).all() for v in state["model"].values())


@pytest.mark.parametrize("lr, said", [("1e+300", "learning rate 1e+300"), ("1e+30", "step 2")])
def test_divergence_that_a_finite_loss_hides_shows_at_the_end(bnexp, config, lr, said):
    """Weights or activations overflow in the last steps, after the last loss was finite."""
    steps = "training.steps=1" if lr == "1e+300" else "training.steps=2"
    done = bnexp(
        "train", config, steps, f"training.optimizer.lr={lr}", "training.schedule={name: constant}"
    )
    assert done.code == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("bnexp: diverged") and said in line and "optimizer.lr" in line


def test_a_collapse_to_chance_stops_the_run(bnexp, config):
    """Good at first; then a learning rate that destroys what was learned, without NaN."""
    done = bnexp(
        "train",
        config,
        "training.steps=2500",
        "test.every=null",
        "statistics={}",
        "training.schedule={name: constant, warmup_steps: 10000}",
        "model.name=mlp",
        "training.optimizer={lr: 300, momentum: 0, nesterov: false}",
        "training.averages={}",
        "training.check_every=5",
    )
    line = done.stderr.strip().splitlines()[-1]
    assert done.code == 1, line
    assert "collapsed" in line and "learning rate" in line


def test_early_stopping_ends_with_the_best_weights(bnexp, config):
    run = trained(
        bnexp,
        config,
        "training.steps=2000",
        "test={every: 10}",
        "training.schedule={name: constant}",
        "training.averages={}",
        "training.early_stopping={metric: val_accuracy, patience: 4}",
    )
    state = run.state
    assert "stopped early" in state["message"] and state["weights"] == "best"
    validation = [(r["step"], r["accuracy"]) for r in run.evals() if r["split"] == "val"]
    best_step = max(validation, key=lambda pair: (pair[1], -pair[0]))[0]
    assert load_checkpoint(run.checkpoints / "best.pt")["step"] == best_step
    assert validation[-1][0] == state["step"]
    assert sum(step > best_step for step, _ in validation) == 4
    logged = {
        r["step"]: r["accuracy"]
        for r in run.evals()
        if r["split"] == "test" and r["statistics"] == "running"
    }
    assert run.comparison()["kinds"][0]["accuracy"] == pytest.approx(logged[best_step], abs=1e-9)


def test_a_plateau_of_the_ema_accuracy_ends_the_run(bnexp, config):
    run = trained(
        bnexp,
        config,
        "training.steps=3000",
        "test.every=null",
        "training.averages={}",
        "training.schedule={name: plateau, patience: 60, min_delta: 0.01, reductions: 1}",
    )
    assert "stopped improving" in run.state["message"]
    rates = run.steps()["lr"]
    assert sorted(set(rates.tolist()), reverse=True) == pytest.approx([0.05, 0.005])


def test_freezing_leaves_the_running_statistics_alone(bnexp, config):
    run = trained(
        bnexp,
        config,
        "statistics.freeze_from_step=20",
        "training.averages={}",
        "training.optimizer.lr=0.002",
        "checkpoints={every_steps: 20, keep: 10}",
        "training.steps=60",
    )
    loaded = [load_checkpoint(path) for path in sorted(run.checkpoints.glob("step-*.pt"))]
    states = [state["model"] for state in loaded if state["step"] >= 20]
    assert torch.equal(states[0]["bn1.running_mean"], states[-1]["bn1.running_mean"])
    assert not torch.equal(states[0]["conv1.weight"], states[-1]["conv1.weight"])


def test_ghost_batches_change_what_is_learned_and_run_to_the_end(bnexp, config):
    plain = trained(bnexp, config, "training.steps=20")
    ghost = trained(bnexp, config, "training.steps=20", "statistics.normalization_batch=8")
    assert (plain.path / "steps.csv").read_bytes() != (ghost.path / "steps.csv").read_bytes()
