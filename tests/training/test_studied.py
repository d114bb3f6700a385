"""What studies need of a run: resuming bit for bit, and statistics of the test images."""

from __future__ import annotations

import shutil

import pytest
import torch

from bnexp.condition import Condition
from bnexp.config import resolve
from bnexp.errors import UserError
from bnexp.experiment import run_experiment
from bnexp.records import Run
from bnexp.statistics import recompute_statistics, running_statistics
from bnexp.statistics.blend import blend
from bnexp.training.build import build_training
from bnexp.training.subject import run_sources, run_subject
from bnexp.training.trained import load_trained

CPU = torch.device("cpu")


def config(**changes):
    tree = {
        "device": "cpu",
        "data": {"name": "digits", "limit": {"train": 200, "test": 60}},
        "model": {"name": "small-cnn"},
        "training": {"steps": 8, "batch_size": 8, "schedule": {"name": "constant"}},
        "checkpoints": {"every_steps": 2, "every_seconds": None, "keep": 5},
        "test": {"every": 3},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value}
    return resolve(tree, [], "test")


RENORM = {"r_max": 2.0, "d_max": 1.0, "start": 1, "r_full": 5, "d_full": 6}
STUDIED = {
    "batch-renorm": {"model": {"norm": "batch-renorm", "renorm": RENORM}},
    "moving-average": {
        "model": {"norm": "moving-average"},
        "training": {"optimizer": {"name": "sgd", "lr": 1e-3}},
    },
    "classes": {"data": {"batches": {"classes": 2}}},
    "everything": {
        "model": {"norm": "batch-renorm", "renorm": RENORM},
        "data": {"batches": {"classes": 4}, "corruption": {"name": "contrast", "severity": 4}},
        "statistics": {"normalization_batch": 4, "adapted": {"adapted": {}}},
    },
}


@pytest.mark.parametrize("studied", STUDIED)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, studied):
    whole = run_experiment(config(**STUDIED[studied]), tmp_path / "whole").record
    shutil.copytree(whole.path, tmp_path / "killed")
    run = Run(tmp_path / "killed")
    for path in run.checkpoints.iterdir():
        if int(path.stem.rpartition("-")[2]) > 4:
            path.unlink()
    run.write_state("interrupted", 4, 8)
    run_experiment(resume=run)
    assert (run.path / "steps.csv").read_bytes() == (whole.path / "steps.csv").read_bytes()
    one, other = (
        torch.load(r.checkpoints / "step-000000008.pt", weights_only=True)["model"]
        for r in (run, whole)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)
    strip = [[row[k] for k in row if k != "seconds"] for r in (run, whole) for row in r.evals()]
    assert strip[: len(strip) // 2] == strip[len(strip) // 2 :]


def test_adapted_statistics_are_those_of_test_images(tmp_path):
    adapted = {"all": {}, "few": {"samples": 10}, "pulled": {"samples": 10, "prior": 30.0}}
    of = config(
        data={"corruption": {"name": "brightness", "severity": 5}}, statistics={"adapted": adapted}
    )
    outcome = run_experiment(of, tmp_path / "run")
    trained = load_trained(outcome.record, of, CPU, "last")
    subject = run_subject(trained.model, trained.data, of)
    found = run_sources(subject, trained.estimates, of, recompute=True)
    images = [torch.cat([x for x, _ in trained.data.test.batches(7, samples=n)]) for n in (60, 10)]
    every, few = (recompute_statistics(trained.model, [x], method="exact") for x in images)
    expected = {
        "all": every,
        "few": few,
        "pulled": blend(running_statistics(trained.model), few, 30.0, 10),
    }
    for name, statistics in expected.items():
        made = found[Condition(name)]()
        for layer in statistics.names:
            for ours, theirs in (
                (made.mean[layer], statistics.mean[layer]),
                (made.var[layer], statistics.var[layer]),
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    results = {str(r.condition) for r in outcome.comparison.results}
    assert results == {"running", "recomputed", "all", "few", "pulled"}
    assert Condition("all") not in run_sources(subject, trained.estimates, of, recompute=False)


def test_more_test_images_than_there_are():
    with pytest.raises(UserError, match="samples is 61, and there are 60 test images"):
        build_training(config(statistics={"adapted": {"few": {"samples": 61}}}), CPU)


def test_what_the_config_refuses():
    for changes, message in (
        ({"model": {"renorm": {"r_max": 2}}}, "model.renorm is for model.norm: batch-renorm"),
        ({"model": {"norm": "batch-renorm", "renorm": {"r_full": 1}}}, "no later than"),
        ({"data": {"batches": {"classes": 3}}}, "can't share training.batch_size 8 equally"),
        ({"data": {"corruption": {"name": "fog"}}}, "data.corruption.name"),
        ({"data": {"corruption": {"name": "contrast", "severity": 6}}}, "severity"),
        ({"statistics": {"adapted": {"running": {}}}}, "can't name adapted statistics"),
        ({"statistics": {"adapted": {"a": {"samples": 1}}}}, "samples"),
        (
            {"statistics": {"adapted": {"a": {}}, "estimators": {"a": {"rule": "cumulative"}}}},
            "names both an estimator and adapted statistics",
        ),
    ):
        with pytest.raises(UserError, match=message):
            config(**changes)
