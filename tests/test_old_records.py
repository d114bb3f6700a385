"""A record made before the house was rebuilt (bnexp 0.1.0) opens with every command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_of

OLD = ROOT / "tests" / "records" / "before-the-rebuild"


@pytest.fixture
def old(bnexp):
    """The record, below `runs/` of the folder the commands run in."""
    shutil.copytree(OLD / "before-1", bnexp.cwd / "runs" / "before-1")
    return "before-1"


def recorded(name):
    comparison = json.loads((OLD / "before-1" / "comparison.json").read_text())
    return next(kind for kind in comparison["kinds"] if kind["name"] == name)


def evaluated(bnexp, *arguments):
    done = bnexp("eval", "before-1", "--json", "--recompute-stats", *arguments)
    assert done.code == 0, done.stderr
    return {kind["name"]: kind for kind in json.loads(done.stdout)["kinds"]}


def test_eval_finds_the_numbers_of_then(bnexp, old):
    kinds = evaluated(bnexp)
    assert list(kinds) == ["running", "slow", "average", "window", "recomputed"]
    for name, kind in kinds.items():
        assert kind["accuracy"] == pytest.approx(recorded(name)["accuracy"], abs=0.0051), name
        assert kind["loss"] == pytest.approx(recorded(name)["loss"], abs=1e-5), name


def test_eval_of_averaged_weights_says_whose_weights_and_whose_statistics(bnexp, old):
    kinds = evaluated(bnexp, "--weights", "ema")
    for name in ("ema/running", "ema/recomputed"):
        assert kinds[name]["loss"] == pytest.approx(recorded(name)["loss"], abs=1e-5)
        assert "EMA weights" in kinds[name]["label"]
    assert "running" not in kinds
    done = bnexp("eval", old, "--recompute-stats", "--weights", "ema")
    assert "EMA weights" in done.stdout.splitlines()[1]


def test_report_runs_and_compare(bnexp, old):
    shutil.copytree(OLD / "before-1", bnexp.cwd / "runs" / "before-2")
    done = bnexp("report", old)
    assert done.code == 0, done.stderr
    page = (bnexp.cwd / "runs" / old / "report.html").read_text()
    assert "SWA" not in page and "EMA weights" in page
    rows = json.loads(bnexp("runs", "--json").stdout)
    assert [(r["name"], r["state"], r["test_accuracy"]) for r in sorted(rows, key=str)] == [
        ("before-1", "finished", 0.82),
        ("before-2", "finished", 0.82),
    ]
    done = bnexp("compare", old, "before-2", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["comparison"]["kinds"][0]["accuracy"] == 0.82


def test_resume_goes_on_as_it_would_have_then(bnexp, old):
    done = bnexp("train", "--resume", old, "training.steps=60")
    assert done.code == 0, done.stderr
    steps = run_of(bnexp, done).path / "steps.csv"
    then = (OLD / "resumed-steps.csv").read_text().splitlines()
    assert steps.read_text().splitlines()[:41] == then[:41]
    numbers = np.loadtxt(steps, delimiter=",", skiprows=1)
    expected = np.loadtxt(then, delimiter=",", skiprows=1)
    assert numbers.shape == expected.shape == (60, 6)
    # The same bits on the processor it was made on; elsewhere, rounding.
    np.testing.assert_allclose(numbers[:, 3], expected[:, 3], atol=1e-4)
