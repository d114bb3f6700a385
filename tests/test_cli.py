"""The command line end to end: the real command, real data, real errors."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_fashion_mnist, run_of

from bnexp.config import load_config
from bnexp.records import Run, all_runs

QUICK = """
data: {name: digits}
model: {name: small-cnn}
statistics:
  estimators:
    slow: {rule: ema, decay: 0.99}
    average: {rule: cumulative}
training: {steps: 40, batch_size: 64, optimizer: {lr: 0.05}, check_every: 10}
test: {every: 15, statistics: [running, recomputed, batch], train_accuracy: true}
"""


@pytest.fixture
def quick(bnexp):
    (bnexp.cwd / "quick.yaml").write_text(QUICK)
    return "quick.yaml"


def trained(bnexp, *arguments):
    done = bnexp("train", *arguments)
    assert done.code == 0, done.stderr
    return done, run_of(bnexp, done)


def training_numbers(run):
    return (run.path / "steps.csv").read_bytes()


def test_train_then_eval(bnexp, quick):
    done, run = trained(bnexp, quick)
    assert "McNemar" in done.stdout
    steps = run.steps()
    assert steps["step"].tolist() == list(range(1, 41))
    assert np.isfinite(steps["loss"]).all()

    rows = run.evals()
    kinds = ["running", "slow", "average", "recomputed", "batch"]
    assert [(r["step"], r["statistics"]) for r in rows if r["split"] == "test"] == [
        (step, kind) for step in (15, 30, 40) for kind in kinds
    ]
    assert [r["step"] for r in rows if r["split"] == "train"] == [15, 30, 40]
    assert {r["samples"] for r in rows if r["split"] == "test"} == {500}

    evaluated = bnexp("eval", "--recompute-stats", "--json")
    assert evaluated.code == 0, evaluated.stderr
    result = json.loads(evaluated.stdout)
    assert [k["name"] for k in result["kinds"]] == ["running", "slow", "average", "recomputed"]
    at_end = [r for r in rows if r["step"] == 40 and r["split"] == "test"]
    final = {r["statistics"]: r["accuracy"] for r in at_end}
    for kind in result["kinds"]:
        assert kind["accuracy"] == pytest.approx(final[kind["name"]], abs=1e-6)
    assert {row["name"] for row in result["layers"]["recomputed"]} == {"bn1", "bn2", "bn3"}

    table = bnexp(
        "eval",
        run.name,
        "--recompute-stats",
        "--method",
        "pooled",
        "--method",
        "exact",
        "--samples",
        "500",
        "--batch",
    )
    assert table.code == 0, table.stderr
    for said in ("recomputed/pooled", "recomputed/exact", "batch", "furthest", "bn1"):
        assert said in table.stdout


def test_the_ema_column_is_the_moving_average_of_the_accuracy_column(bnexp, quick):
    _, run = trained(bnexp, quick, "training.ema_accuracy_decay=0.9")
    steps = run.steps()
    for t in (1, 7, 40):
        weights = 0.9 ** np.arange(t)[::-1]
        expected = np.average(steps["accuracy"][:t], weights=weights)
        assert steps["ema_accuracy"][t - 1] == pytest.approx(expected, rel=1e-6)


def test_whole_train_accuracy_is_that_of_the_checkpoint(bnexp, quick):
    """The train row of evals.csv against a plain loop over the data with plain torch."""
    _, run = trained(bnexp, quick)
    from bnexp.data import load_data
    from bnexp.networks import build_model
    from bnexp.training.build import data_settings
    from bnexp.training.checkpoints import newest_checkpoint

    config = load_config(run.path / "config.yaml")
    data = load_data(data_settings(config.data), seed=config.seed, device="cpu")
    info = data.info
    model = build_model(
        "small-cnn",
        channels=info.channels,
        image_size=info.image_size,
        num_classes=len(info.classes),
    )
    model.load_state_dict(newest_checkpoint(run.checkpoints)[0]["model"])
    model.eval()
    right = 0
    with torch.no_grad():
        for x, y in data.train.batches(97):
            right += int((model(x).argmax(1) == y).sum())
    logged = next(r for r in run.evals() if r["split"] == "train" and r["step"] == 40)
    assert logged["samples"] == len(data.train)
    assert round(logged["accuracy"] * logged["samples"]) == pytest.approx(right, abs=1)


def test_same_config_and_seed_give_the_same_bytes(bnexp, quick):
    first = trained(bnexp, quick)[1]
    second = trained(bnexp, quick)[1]
    other = trained(bnexp, quick, "seed=1")[1]
    assert first.path != second.path
    assert training_numbers(first) == training_numbers(second)
    assert training_numbers(first) != training_numbers(other)


@pytest.mark.parametrize(
    "changes",
    [
        ["test.every=null", "test.train_accuracy=false"],
        ["test.every=1", "test.statistics=[running]"],
        ["statistics.estimators={}", "statistics.decay=0.5"],
        ["statistics.recompute.method=pooled", "statistics.recompute.samples=100"],
        ["training.check_every=1", "checkpoints.every_steps=3"],
        ["training.averages={ema: {}, swa: {}}"],
    ],
    ids=lambda c: c[0],
)
def test_what_is_logged_never_changes_what_is_learned(bnexp, quick, changes):
    reference = trained(bnexp, quick)[1]
    changed = trained(bnexp, quick, *changes)[1]
    assert training_numbers(reference) == training_numbers(changed)


def test_an_expectation_that_is_not_met_exits_with_3(bnexp, quick):
    done = bnexp("train", quick, "training.steps=2", "expect.test_accuracy=0.99")
    assert done.code == 3
    assert done.stderr.splitlines()[-1].startswith("bnexp: expect.test_accuracy: 99.00%")


def test_a_record_with_a_gate_that_could_not_be_held_is_read(bnexp, quick):
    """Trainings with such gates were begun before they were refused."""
    _, run = trained(bnexp, quick, "test.statistics=[running]")
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("worst_cost: null", "worst_cost: 0.1"))
    assert bnexp("eval", run.path).code == 0
    assert bnexp("export", run.path, "network.pt").code == 0
    longer = ("train", "--resume", run.path, "training.steps=50")
    assert "expect.worst_cost needs recomputed" in error_line(bnexp(*longer))
    assert bnexp(*longer, "expect.worst_cost=null").code == 0


def test_all_expectations_that_are_not_met_are_said(bnexp, quick):
    never_counted = ("statistics.decay=0.999", "expect.cost=0.01", "expect.worst_cost=0.01")
    done = bnexp("train", quick, *never_counted, "expect.test_accuracy=0.99")
    assert done.code == 3
    line = done.stderr.splitlines()[-1]
    assert line.startswith("bnexp: expect.test_accuracy: ")
    assert "; expect.cost: running was to cost" in line and "; expect.worst_cost: " in line


def test_a_network_without_bn_is_trained_and_compared_with_nothing(bnexp, quick):
    _done, run = trained(bnexp, quick, "model.norm=none", "training.optimizer.lr=0.01")
    assert {r["statistics"] for r in run.evals()} == {"none"}
    assert bnexp("eval", "--recompute-stats").code == 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precisions_learn(bnexp, quick, precision):
    _, run = trained(bnexp, quick, f"training.precision={precision}", "training.steps=60")
    assert run.steps()["ema_accuracy"][-1] > 0.6


def test_piped_output_is_plain(bnexp, quick):
    done, _ = trained(bnexp, quick)
    assert "\x1b" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) < 10


def test_what_ascii_lacks_is_shown_in_its_characters():
    """A difference must not lose its sign."""
    program = (
        "import bnexp.cli; bnexp.cli._prepare_streams(); print('−0.40 (−1.45 … 0.37) – 0.1 σ é')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-0.40 (-1.45 .. 0.37) - 0.1 sd ?\n"


def test_records_in_a_folder_whose_name_is_no_text(bnexp, quick):
    folder = os.fsdecode(b"l\xe4ufe")
    done = bnexp("train", quick, "--runs-dir", folder)
    assert done.code == 0, done.stderr
    (run,) = all_runs(bnexp.cwd / folder)
    assert (run.path / "results.png").exists()
    assert r"l\xe4ufe" in run.environment["command"]
    assert bnexp("report", "--runs-dir", folder).code == 0


def test_config_prints_the_resolved_yaml_and_the_schema(bnexp, quick):
    resolved = bnexp("config", quick, "seed=3")
    (bnexp.cwd / "resolved.yaml").write_text(resolved.stdout)
    assert bnexp("config", "resolved.yaml").stdout == resolved.stdout
    assert json.loads(bnexp("config", "--schema").stdout)["title"] == "Config"


def error_line(done, code=2):
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", "nowhere.yaml"], ["no config at nowhere.yaml", "quick.yaml"]),
        (["train"], ["name a config"]),
        (["train", "quick.yaml", "data.name=digit"], ["digit", "digits"]),
        (["train", "quick.yaml", "model.name=resnet2"], ["resnet2", "resnet20"]),
        (["train", "quick.yaml", "model.name=torchvision/resnet19"], ["torchvision/resnet18"]),
        (
            ["train", "quick.yaml", "training.batch_size=1", "model.name=mlp"],
            ["training.batch_size is 1", "one value per channel"],
        ),
        (["train", "quick.yaml", "training.batch_size=5000"], ["5000", "1297"]),
        (["train", "quick.yaml", "--device", "cuda:7"], ["cuda:7"]),
        (["train", "quick.yaml", "data={name: image-folder, root: absent}"], ["absent"]),
        (["train", "quick.yaml", "training.early_stopping={}"], ["data.val_fraction"]),
        (
            ["train", "quick.yaml", "test.statistics=[running]", "expect.worst_cost=0.1"],
            ["expect.worst_cost needs recomputed in test.statistics"],
        ),
        (["train", "quick.yaml", "model.norm=none", "expect.cost=0.1"], ["model.norm none"]),
        (["eval", "nothing"], ["no run nothing"]),
        (["eval", "."], ["not a run folder"]),
        (["eval"], ["no finished run", "bnexp train"]),
        (["eval", "a" * 300], ["no run aaa"]),
        (["train", "quick.yaml", "training.epochs=1e308"], ["training.epochs", "1000000"]),
        (["train", "quick.yaml", "data.root=~no-such-user/x"], ["data.root", "home directory"]),
        (["train", "quick.yaml", "data.augment.crop_padding=1000000000"], ["crop_padding"]),
        (
            ["train", "quick.yaml", "data.limit.test=1"],
            ["test.statistics has batch", "one test image"],
        ),
        (["train", "--resume", "nothing"], ["no run nothing"]),
        (["train", "quick.yaml", "--nmae", "x"], ["--nmae", "--name", "bnexp train --help"]),
        (["train", "quick.yaml", "--processes", "two"], ["--processes", "integer"]),
        (["train", "quick.yaml", "--processes", "0"], ["--processes"]),
        (["export"], ["RUN", "bnexp export --help"]),
        (["eval", "--device"], ["--device"]),
        (["trian"], ["trian", "bnexp --help"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_errors_are_one_clear_line_with_exit_code_2(bnexp, quick, arguments, said):
    line = error_line(bnexp(*arguments))
    for part in said:
        assert part in line


def test_a_dry_run_is_of_a_training_from_its_start(bnexp, quick):
    """It would not know what is left to do, nor what a resume refuses."""
    _, run = trained(bnexp, quick, "training.steps=5")
    line = error_line(bnexp("train", "--resume", run.path, "--dry-run"))
    assert "leave --resume out" in line


def test_checkpoints_that_are_damaged_foreign_or_malicious(bnexp, quick):
    _, run = trained(bnexp, quick, "checkpoints.keep=1")
    (checkpoint,) = run.checkpoints.glob("step-*.pt")
    whole = checkpoint.read_bytes()

    checkpoint.write_bytes(whole[:-100])
    assert "damaged" in error_line(bnexp("eval"))

    class Bomb:
        def __reduce__(self):
            return open, (str(bnexp.cwd / "ran"), "w")

    torch.save({"format": 1, "step": Bomb()}, checkpoint)
    assert "could run code" in error_line(bnexp("eval"))
    assert not (bnexp.cwd / "ran").exists()

    checkpoint.write_bytes(whole)
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("name: small-cnn", "name: mlp"))
    assert "belongs to another model" in error_line(bnexp("eval"))


def test_the_verdict_names_the_method_that_was_asked_for(bnexp, quick):
    trained(bnexp, quick)
    for method in ("pooled", "batch-mean"):
        done = bnexp("eval", "--recompute-stats", "--method", method, "--samples", "300")
        assert f"recomputed statistics ({method})" in done.stdout, done.stderr


def test_an_estimator_with_a_dot_in_its_name_can_be_overridden(bnexp, quick):
    _, run = trained(
        bnexp,
        quick,
        "statistics.estimators={ema-0.99: {rule: ema, decay: 0.99}}",
        "statistics.estimators.ema-0.99.decay=0.5",
    )
    assert run.config["statistics"]["estimators"]["ema-0.99"]["decay"] == 0.5


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_fit_narrow_terminals(bnexp, quick, width):
    """FORCE_COLOR makes rich take the file for a terminal of COLUMNS."""
    trained(bnexp, quick)
    terminal = {"FORCE_COLOR": "1", "COLUMNS": str(width)}
    done = bnexp("eval", "--recompute-stats", **terminal)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines).replace(" … ", "")
    assert any(line.split()[:1] == ["bn3"] for line in lines)
    assert any(line.startswith("statistics") and line.split()[-1] == "p" for line in lines)


def test_averaged_weights_are_compared_with_stale_and_recomputed_statistics(bnexp, quick):
    averages = "training.averages={ema: {decay: 0.9}, swa: {start: 0.5, every: 2}}"
    _, run = trained(bnexp, quick, averages)
    kinds = {k["name"] for k in run.comparison()["kinds"]}
    assert {"ema/running", "ema/recomputed", "swa/running", "swa/recomputed"} <= kinds
    for weights in ("ema", "swa", "last"):
        done = bnexp("eval", "--weights", weights, "--recompute-stats", "--json")
        assert done.code == 0, done.stderr
        result = {k["name"]: k["accuracy"] for k in json.loads(done.stdout)["kinds"]}
        if weights in ("ema", "swa"):
            logged = {k["name"]: k["accuracy"] for k in run.comparison()["kinds"]}
            assert result[f"{weights}/recomputed"] == logged[f"{weights}/recomputed"]
            assert f"{weights.upper()} weights with " in json.loads(done.stdout)["verdict"]


def test_help_and_import_need_no_torch():
    code = (
        "import sys, bnexp, bnexp.cli\n"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'scipy', 'pydantic'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "line, words",
    [
        ("bnexp train d", ["digits", "draft.yml"]),
        ("bnexp train dr", ["draft.yml"]),
        ("bnexp train --resume s", ["some-1"]),
        ("bnexp study 00", ["00-ema-accuracy"]),
        ("bnexp init sm", ["smoke"]),
        ("bnexp eval so", ["some-1"]),
        # A shell completes these itself: folders without a space after them, quoted names.
        ("bnexp train drafts/", []),
        ("bnexp train my", []),
        ("bnexp report some-1 dr", []),
    ],
)
def test_shells_are_told_how_words_go_on(tmp_path, line, words):
    config = load_config(ROOT / "configs/digits.yaml").to_yaml()
    for folder in ("drafts", "runs/some-1"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("draft.yml", "drafts/other.yml", "my own.yml", "draft.txt"):
        (tmp_path / name).touch()
    (tmp_path / "runs/some-1/config.yaml").write_text(config)
    (tmp_path / "runs/some-1/steps.csv").touch()
    asked = {
        "_BNEXP_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "import bnexp.cli; bnexp.cli.main()"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **asked},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == words


@pytest.mark.parametrize(
    "arguments, unwanted",
    [
        (["train", "--help"], ("torch", "scipy", "numpy")),
        (["config", "configs/digits.yaml"], ("torch", "numpy")),
        (["config", "--schema"], ("torch", "numpy")),
        (["runs"], ("torch", "matplotlib", "scipy")),
        (["data"], ("torch", "matplotlib", "scipy")),
        (["study", "none.yaml"], ("torch", "matplotlib", "scipy.stats")),
        (["train", "configs/digits.yaml", "training.stpes=1"], ("torch",)),
        (["eval", "--method", "none"], ("torch",)),
    ],
    ids=" ".join,
)
def test_what_answers_at_once_imports_nothing_heavy(arguments, unwanted):
    code = (
        "import sys, bnexp.cli\n"
        f"sys.argv[1:] = {arguments}\n"
        "try: bnexp.cli.main()\n"
        "except SystemExit: pass\n"
        f"assert not {{*{unwanted}}} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.slow
def test_trainings_and_evaluations_import_no_compiler(tmp_path):
    code = (
        "import sys, bnexp.cli\n"
        "for words in ('train smoke training.steps=3 expect.test_accuracy=0', 'eval --batch'):\n"
        "    sys.argv[1:] = words.split()\n"
        "    try: bnexp.cli.main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'torch._dynamo', 'sympy', 'scipy.stats', 'torchvision'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env, timeout=200)


def test_python_m_bnexp():
    done = subprocess.run(
        [sys.executable, "-m", "bnexp", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    for command in ("train", "eval", "report", "runs", "compare", "config"):
        assert command in done.stdout


@needs_fashion_mnist
def test_fashion_mnist_is_learned(bnexp):
    done = bnexp(
        "train",
        ROOT / "configs" / "fashion-mnist.yaml",
        "training.steps=60",
        "test.every=null",
        "expect.test_accuracy=0.7",
        "statistics.recompute.samples=1000",
    )
    assert done.code == 0, done.stderr
    run = Run(bnexp.cwd / "runs" / "fashion-mnist-1")
    with open(run.path / "steps.csv") as file:
        assert len(list(csv.DictReader(file))) == 60


def test_a_best_chosen_on_the_test_images_is_kept_by_that_name_alone_and_says_so(bnexp, quick):
    _, run = trained(bnexp, quick)
    assert not list(run.checkpoints.glob("best*.pt"))
    assert "has no best weights" in error_line(bnexp("eval", "--weights", "best"))
    _, run = trained(bnexp, quick, "checkpoints.best=best-on-test")
    assert [path.name for path in run.checkpoints.glob("best*.pt")] == ["best-on-test.pt"]
    done = bnexp("eval", "--weights", "best-on-test", "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert "on these very test images" in result["remarks"][0]
    assert all(kind["label"].startswith("best-on-test weights") for kind in result["kinds"])
    (run.checkpoints / "best-on-test.pt").rename(run.checkpoints / "best.pt")  # as older versions
    done = bnexp("eval", "--weights", "best")
    assert done.code == 0, done.stderr
    assert "on these very test images" in " ".join(done.stdout.split())
    line = error_line(
        bnexp(
            "train",
            quick,
            "checkpoints.best=best-on-test",
            "data.val_fraction=0.2",
            "training.early_stopping={}",
        )
    )
    assert "early_stopping goes by the validation images" in line
