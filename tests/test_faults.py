"""What goes wrong outside of bnexp: memory, disks, folders, files, compilers and signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_fashion_mnist, trained, wait_for
from PIL import Image

from bnexp.records import Run
from bnexp.training.checkpoints import newest_checkpoint

CONFIG = """
name: victim
data: {name: digits, val_fraction: 0.1}
model: {name: mlp}
statistics: {recompute: {samples: 300}}
training:
  steps: 60
  batch_size: 32
  optimizer: {lr: 0.1}
  schedule: {name: constant}
  averages: {ema: {decay: 0.95}}
  check_every: 10
test: {every: 7, statistics: [running, recomputed]}
checkpoints: {every_steps: 20, every_seconds: null}
"""
ENDLESS = ("training.steps=1000000", "test.every=null")
MIB = 2**20


@pytest.fixture
def config(bnexp):
    (bnexp.cwd / "victim.yaml").write_text(CONFIG)
    return "victim.yaml"


def only_line(done, code):
    """The one line that says what went wrong."""
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bnexp: ")]
    assert done.stderr.strip().endswith(line)
    return line


def with_a_checkpoint(bnexp, *arguments):
    """An endless training that has just written a checkpoint, and its run."""
    command = bnexp.start("train", *arguments, *ENDLESS)
    run = Run(bnexp.cwd / "runs" / "victim-1")
    wait_for(lambda: list(run.checkpoints.glob("step-*.pt")))
    return command, run


def content(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


# -------------------------------------------------------------------------------------- memory


def test_out_of_memory_is_a_line_with_the_batch_size_and_an_estimate(bnexp, config):
    done = bnexp(
        "train",
        config,
        "model.name=resnet20",
        "training.batch_size=1000",
        *ENDLESS,
        memory_limit=80 * MIB,
    )
    line = only_line(done, 1)
    assert "out of memory with training.batch_size 1000" in line and "take a smaller one" in line
    needed = int(re.search(r"about (\d+) MiB a step", line)[1])
    assert 80 < needed < 400
    run = Run(bnexp.cwd / "runs" / "victim-1")
    assert run.state["state"] == "failed" and "out of memory" in run.state["message"]


def test_out_of_memory_before_there_is_a_run_is_a_line(bnexp, config):
    done = bnexp("train", config, "model.name=small-cnn", memory_limit=MIB)
    assert "out of memory" in only_line(done, 1)
    assert not list((bnexp.cwd / "runs").glob("*"))


def test_out_of_memory_in_an_evaluation_is_a_line(bnexp, config):
    run = trained(bnexp, config, "model.name=small-cnn", "training.steps=5")
    done = bnexp("eval", run.path, "--recompute-stats", memory_limit=4 * MIB)
    assert "out of memory" in only_line(done, 1)


# --------------------------------------------------------------------------------------- disks


@pytest.fixture
def read_only(tmp_path_factory):
    """Makes folders read-only, for root too, where that is allowed."""
    mounted = []

    def mount(*arguments):
        return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0

    def bind(folder):
        if bound := mount("--bind", folder, folder):
            mounted.append(folder)
        return bound

    def protect(folder):
        return mount("-o", "remount,ro,bind", folder)

    def make(folder):
        assert bind(folder)
        wait_for(lambda: protect(folder))  # refused while a file there is open for writing

    try:
        trial = tmp_path_factory.mktemp("read-only")
        if not (bind(trial) and protect(trial)):
            pytest.skip("mounting is not allowed here")
        yield make
    finally:
        for folder in mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_folder_that_becomes_read_only(bnexp, config, read_only):
    command, run = with_a_checkpoint(bnexp, config)
    read_only(run.path)
    line = only_line(command.wait(), 1)
    assert "the file system is read-only" in line and run.path.name in line
    state, passed_over = newest_checkpoint(run.checkpoints)
    assert state["step"] > 0 and not passed_over
    assert "the file system is read-only" in only_line(bnexp("train", "--resume", run.path), 1)
    assert bnexp("eval", run.path).code == 0


def test_a_run_folder_that_is_removed_while_the_run_goes_on(bnexp, config):
    command, run = with_a_checkpoint(bnexp, config)
    removed = run.path.rename(bnexp.cwd / "removed")  # at once, whatever is being written
    shutil.rmtree(removed)
    assert "was removed while the run was being trained" in only_line(command.wait(), 1)
    assert not run.path.exists()


def test_without_its_checkpoints_a_run_is_resumed_from_the_beginning(bnexp, config):
    run = trained(bnexp, config)
    before = (run.path / "steps.csv").read_bytes()
    shutil.rmtree(run.checkpoints)
    done = bnexp("train", "--resume", run.path)
    assert done.code == 0, done.stderr
    assert (run.path / "steps.csv").read_bytes() == before


# --------------------------------------------------------------------------------------- files


def test_damaged_files_of_a_run(bnexp, config):
    """Those that can be written anew are; those that decide what is trained stop the command."""
    run = trained(bnexp, config)
    whole = content(run.path)
    for damaged in ("state.json", "comparison.json", "steps.csv", "evals.csv"):
        (run.path / damaged).write_bytes(whole[damaged] + b"{,\xff\n")
        done = bnexp("train", "--resume", run.path, "training.steps=70")
        assert done.code == 0, (damaged, done.stderr)
        assert run.steps()["step"].tolist() == list(range(1, 71))
        assert run.evals()[-1]["step"] == 70
        assert run.state["state"] == "finished" and run.comparison()["step"] == 70
        shutil.rmtree(run.path)
        run = trained(bnexp, config)
    for damaged in ("config.yaml", "environment.json"):
        (run.path / damaged).write_bytes(b"{,\xff\n")
        line = only_line(bnexp("train", "--resume", run.path, "training.steps=70"), 2)
        assert damaged in line
        (run.path / damaged).write_bytes(whole[damaged])


@pytest.mark.parametrize(
    "damaged, content",
    [
        ("config.yaml", "data: {name: 5}\nmodel: {name: mlp}\n"),
        ("config.yaml", "data: {name: digits}\nmodel: {name: mlp}\n"),
        ("config.yaml", "data: [\n"),
        ("state.json", '{"message": "no state"}'),
        ("environment.json", '{"created": 5}'),
        ("comparison.json", '{"kinds": []}'),
        ("comparison.json", "[" * 100_000),
        ("steps.csv", "step,epoch,lr,loss,accuracy,ema_accuracy\nnan,0,0.1,1,0.5,0.5\n"),
        ("evals.csv", "step,split\n1,test\n"),
    ],
)
def test_files_that_hold_something_else_are_named(bnexp, config, damaged, content):
    run, good = trained(bnexp, config, "training.steps=5"), trained(bnexp, config)
    (run.path / damaged).write_text(content)
    for command in (["report", run.path], ["compare", run.path, good.path]):
        assert damaged in only_line(bnexp(*command), 2)
    listed = bnexp("runs", "--json")
    assert listed.code == 0, listed.stderr
    states = {row["name"]: row["state"] for row in json.loads(listed.stdout)}
    assert states.keys() == {run.name, good.name} and states[good.name] == "finished"
    if damaged == "state.json":
        assert bnexp("train", "--resume", run.path, "training.steps=6").code == 0


def test_a_run_without_its_log_is_still_a_run(bnexp, config):
    run = trained(bnexp, config)
    (run.path / "steps.csv").unlink()
    assert bnexp("eval", run.name).code == 0
    assert [row["name"] for row in json.loads(bnexp("runs", "--json").stdout)] == [run.name]


def test_nobody_reads_what_the_training_says(bnexp, config):
    """`bnexp train ... 2>&1 | head -1`: the run goes on."""
    with subprocess.Popen(
        [sys.executable, "-m", "bnexp", "train", config, "test.every=null"],
        cwd=bnexp.cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        process.stderr.close()
        assert process.wait() == 0
    assert Run(bnexp.cwd / "runs" / "victim-1").state["state"] == "finished"


def test_streams_and_pictures_that_can_not_be_had_decide_nothing(bnexp, config):
    """Both streams lead to a full disk; then a backend of a notebook, which isn't there."""
    (bnexp.cwd / "quick.yaml").write_text(CONFIG.replace("victim", "quick"))
    arguments = [sys.executable, "-m", "bnexp", "train", "quick.yaml", "training.steps=5"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, cwd=bnexp.cwd, env=env, stdout=full, stderr=full)
    assert done.returncode == 0
    run = Run(bnexp.cwd / "runs" / "quick-1")
    assert run.state["state"] == "finished" and (run.path / "results.png").exists()
    env["MPLBACKEND"] = "module://of_a_notebook"
    done = subprocess.run(
        [*arguments, "expect.test_accuracy=1"],
        cwd=bnexp.cwd,
        env=env,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 3, done.stderr
    assert "McNemar" in done.stdout and "run: runs/quick-2" in done.stdout
    assert "Traceback" not in done.stderr
    assert Run(bnexp.cwd / "runs" / "quick-2").state["state"] == "finished"


def test_results_that_can_not_be_printed_fail_a_command_that_only_prints(bnexp, config):
    trained(bnexp, config, "training.steps=5")
    to_full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    assert "the disk is full" in only_line(bnexp("runs", inject=to_full), 1)


def test_events_that_can_not_be_written_end_no_training(bnexp, config):
    inject = (
        "import bnexp.training.tensorboard as t\n"
        "class Events:\n"
        "    def __init__(self, *a, **k): pass\n"
        "    def steps(self, rows): raise OSError(28, 'No space left on device')\n"
        "t.Events = Events\n"
        "import bnexp.training.logs; bnexp.training.logs.Events = Events\n"
    )
    arguments = ("training.steps=5", "logging.tensorboard=true")
    done = bnexp("train", config, *arguments, inject=inject)
    assert done.code == 0, done.stderr
    assert "no more TensorBoard events: OSError" in done.stderr


def test_a_run_from_elsewhere_writes_nothing_outside_when_it_is_resumed(bnexp, config):
    run = trained(bnexp, config, "training.steps=25")
    victim = bnexp.cwd / "victim"
    victim.mkdir()
    for name in ("steps.csv", "evals.csv", "state.json", "results.png", "environment.json"):
        (run.path / name).rename(victim / name)
        (run.path / name).symlink_to(victim / name)
    before = content(victim)
    done = bnexp("train", "--resume", run.path, "training.steps=30")
    assert done.code == 0, done.stderr
    assert content(victim) == before
    assert run.steps()["step"].tolist() == list(range(1, 31))
    elsewhere = run.checkpoints.rename(victim / "checkpoints")
    (elsewhere / ".mine.tmp").write_text("mine")
    (elsewhere / "step-999999999.pt").write_text("mine")
    run.checkpoints.symlink_to(elsewhere)
    before = content(victim)
    line = only_line(bnexp("train", "--resume", run.path, "training.steps=40"), 2)
    assert "checkpoints is a link" in line
    assert content(victim) == before


def test_pipes_and_folders_among_the_checkpoints_are_passed_over(bnexp, config):
    run = trained(bnexp, config, "training.steps=25")
    os.mkfifo(run.checkpoints / "step-000000026.pt")
    (run.checkpoints / "step-000000027.pt").mkdir()
    (run.checkpoints / ".step.tmp").mkdir()
    (run.checkpoints / "step-000000028.pt").symlink_to("/dev/zero")
    (run.checkpoints / "step-²00000029.pt").write_text("")
    assert bnexp("eval", run.path).code == 0
    done = bnexp("train", "--resume", run.path, "training.steps=26", "checkpoints.keep=1")
    assert done.code == 0, done.stderr
    os.mkfifo(run.checkpoints / "best-on-test.pt")
    assert "no ordinary file" in only_line(bnexp("eval", "--weights", "best-on-test"), 2)


def test_a_checkpoint_of_another_seed_or_run_is_refused(bnexp, config):
    run = trained(bnexp, config, "training.steps=25")
    other = trained(bnexp, config, "training.steps=25", "seed=1")
    same = trained(bnexp, config, "training.steps=25")
    name = "step-000000025.pt"
    for source, said in ((other, "another run"), (same, "another run")):
        shutil.copy(source.checkpoints / name, run.checkpoints / name)
        line = only_line(bnexp("train", "--resume", run.path, "training.steps=30"), 2)
        assert said in line and str(run.checkpoints) in line
    state = torch.load(other.checkpoints / name, weights_only=True)
    torch.save({**state, "run": None}, run.checkpoints / name)  # as older versions wrote it
    line = only_line(bnexp("train", "--resume", run.path, "training.steps=30"), 2)
    assert "another training (seed: 1 became 0)" in line
    state = torch.load(same.checkpoints / name, weights_only=True)
    state["model"]["bn1.running_mean"] = state["model"]["bn1.running_mean"].double()
    torch.save({**state, "run": run.id}, run.checkpoints / name)
    for command in (["train", "--resume", run.path, "training.steps=30"], ["eval", run.path]):
        assert "bn1.running_mean is torch.float64" in only_line(bnexp(*command), 2)


def test_another_number_of_threads_is_recorded_and_said(bnexp, config):
    run = trained(bnexp, config, "training.steps=5")
    environment = run.environment
    assert environment["threads"] == 1
    run.write_json("environment.json", {**environment, "threads": 3})
    done = bnexp("train", "--resume", run.path, "training.steps=10")
    assert done.code == 0 and "the run had 3 threads and goes on with 1" in done.stderr
    assert run.environment["resumes"][0]["threads"] == 1
    done = bnexp("train", "--resume", run.path, "training.steps=15")
    assert done.code == 0 and "the run had" not in done.stderr
    run.write_json("environment.json", {**environment, "threads": 3})
    done = bnexp("train", "--resume", run.path, "training.steps=20", "--quiet")
    assert done.code == 0
    assert only_line(done, 0).startswith("bnexp: the run had 3 threads and goes on with 1: from")


def test_data_that_have_changed_are_refused_until_they_are_accepted(bnexp, config):
    for number in range(60):
        folder = bnexp.cwd / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    images = ("data.name=image-folder", "data.root=images", "training.batch_size=8")
    run = trained(bnexp, config, *images, "training.steps=5", "test.every=null")
    moved = (bnexp.cwd / "images").rename(bnexp.cwd / "moved")
    assert bnexp("eval", run.path, f"data.root={moved}").code == 0
    assert bnexp("eval", f"data.root={moved}").code == 0
    assert "eval takes data.root" in only_line(bnexp("eval", run.path, "seed=1"), 2)
    (moved / "a" / "0.png").unlink()
    resume = ("train", "--resume", run.path, f"data.root={moved}", "training.steps=6")
    for command in (("eval", run.path, f"data.root={moved}"), resume):
        line = only_line(bnexp(*command), 2)
        assert "have changed: " in line and "class a" in line and "--changed-data" in line
        done = bnexp(*command, "--changed-data")
        assert done.code == 0 and "have changed" in done.stderr, done.stderr
    assert "class a" in run.environment["resumes"][0]["changed_data"]
    assert bnexp("eval", run.path).code == 0  # config.yaml and data.json are those of the resume


def test_nothing_but_ordinary_files_is_replaced(bnexp, config):
    run = trained(bnexp, config, "training.steps=5")
    pipe, link, page = (bnexp.cwd / name for name in ("pipe", "link.html", "page.html"))
    os.mkfifo(pipe)
    assert "no ordinary file" in only_line(bnexp("report", run.path, "-o", pipe), 2)
    page.write_text("old")
    link.symlink_to(page)
    assert bnexp("report", run.path, "-o", link).code == 0
    assert link.is_symlink() and "<html" in page.read_text()


def test_a_relative_data_root_means_the_same_from_everywhere(bnexp, config):
    for number in range(60):
        folder = bnexp.cwd / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    run = trained(
        bnexp,
        config,
        "data.name=image-folder",
        "data.root=images",
        "training.steps=5",
        "training.batch_size=8",
    )
    (bnexp.cwd / "elsewhere").mkdir()
    bnexp.cwd = bnexp.cwd / "elsewhere"
    assert bnexp("eval", run.path).code == 0


def test_a_run_can_not_become_shorter_than_it_is(bnexp, config):
    command, run = with_a_checkpoint(bnexp, config)
    command.signal(signal.SIGINT)
    assert command.wait().code == 130
    done = bnexp("train", "--resume", run.path, "training.steps=5")
    line = only_line(done, 2)
    assert f"has done {run.state['step']} steps already" in line and "can't become 5" in line


# ------------------------------------------------------------------------------ kills and signals


@pytest.mark.parametrize("ending", ["evaluation", "restored best"])
def test_kill_9_in_the_final_evaluation_changes_nothing(bnexp, config, ending):
    extra = ["model.name=small-cnn"]
    if ending == "restored best":
        extra += [
            "training.steps=2000",
            "training.early_stopping={metric: val_accuracy, patience: 3}",
        ]
    reference = trained(bnexp, config, *extra, "--name", "reference")
    if ending == "restored best":
        assert reference.state["weights"] == "best"
    last = f"step-{reference.state['step']:09d}.pt"
    kills = 0
    for attempt in range(5):
        name = f"killed{attempt}"
        command = bnexp.start("train", config, *extra, "--name", name)
        run = Run(bnexp.cwd / "runs" / f"{name}-1")
        wait_for((run.checkpoints / last).exists)
        time.sleep(0.04 * attempt)
        command.signal(signal.SIGKILL)
        if command.wait().code == 0 or run.state["state"] == "finished":
            continue
        kills += 1
        done = bnexp("train", "--resume", run.path)
        assert done.code == 0, done.stderr
        assert run.comparison() == reference.comparison()
        assert run.steps()["step"].tolist() == reference.steps()["step"].tolist()
        rows, expected = (
            [{**row, "seconds": 0} for row in each.evals()] for each in (run, reference)
        )
        assert rows == expected
    assert kills


def test_of_two_resumes_at_once_one_is_refused(bnexp, bnexp_beside, config):
    command, run = with_a_checkpoint(bnexp, config)
    command.signal(signal.SIGKILL)
    command.wait()
    written = set(run.checkpoints.glob("step-*.pt"))
    commands = [each.start("train", "--resume", run.path) for each in (bnexp, bnexp_beside)]

    def ended():
        return [c for c in commands if c.stderr_so_far().startswith("bnexp: ")]

    (refused,) = wait_for(ended)
    (going_on,) = [c for c in commands if c is not refused]
    assert "still being trained by another process" in only_line(refused.wait(), 2)
    wait_for(lambda: set(run.checkpoints.glob("step-*.pt")) - written)
    going_on.signal(signal.SIGINT)
    assert "checkpoint is written" in only_line(going_on.wait(), 130)


@needs_fashion_mnist
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_data_are_read_leaves_nothing_behind(bnexp, config, number):
    inject = (
        "import gzip, os\n"
        "original = gzip.decompress\n"
        "def decompress(data):\n"
        f"    os.kill(os.getpid(), {number:d})\n"
        "    return original(data)\n"
        "gzip.decompress = decompress\n"
    )
    done = bnexp("train", config, "data.name=fashion-mnist", *ENDLESS, inject=inject)
    assert only_line(done, 130) == "bnexp: interrupted"
    assert not (bnexp.cwd / "runs").exists() or not list((bnexp.cwd / "runs").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_eval_leaves_the_run_as_it_was(bnexp, config, number):
    run = trained(bnexp, config, "model.name=resnet20", "training.steps=5")
    before = content(run.path)
    command = bnexp.start("eval", run.path, "--recompute-stats", "--samples", "1167")
    wait_for(command.stderr_so_far)
    command.signal(number)
    assert only_line(command.wait(), 130) == "bnexp: interrupted"
    assert content(run.path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_command_that_is_ending_changes_nothing(bnexp, number):
    inject = (
        "import bnexp.cli, os\n"
        "original = bnexp.cli.flush_or_give_up\n"
        "def flush():\n"
        f"    os.kill(os.getpid(), {number:d})\n"
        "    original()\n"
        "bnexp.cli.flush_or_give_up = flush\n"
    )
    assert "nothing" in only_line(bnexp("train", "nothing.yaml", inject=inject), 2)
    done = bnexp("config", "digits", inject=inject)
    assert (done.code, done.stderr) == (0, "") and "digits" in done.stdout


# ------------------------------------------------------------------------------------- compiler


def test_without_a_compiler_compile_is_refused_in_a_line(bnexp, config, tmp_path_factory):
    cache = tmp_path_factory.mktemp("nothing compiled")
    done = bnexp(
        "train",
        config,
        "performance.compile=true",
        PATH="/nonexistent",
        CXX="",
        TORCHINDUCTOR_CACHE_DIR=str(cache),
    )
    line = only_line(done, 1)
    assert "torch.compile can't compile mlp" in line and "performance.compile=false" in line
    state = json.loads((bnexp.cwd / "runs" / "victim-1" / "state.json").read_text())
    assert state["state"] == "failed"


# ---------------------------------------------------------------------------------------- docs


def test_every_test_that_the_page_on_reliability_names_exists():
    here = Path(__file__).parent
    page = (here.parent / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (?!fault|---).*", page, flags=re.M)
    assert len(rows) > 20
    for row in rows:
        assert "::test_" in row, row
    file = None
    for path, name in re.findall(r"`(?:tests/)?([\w/]*\.py)?::(test_\w+)`", page):
        file = path or file
        assert f"def {name}(" in (here / file).read_text(), (file, name)
