"""The performance settings: that they change no result, and that memory stays flat."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from bnexp.config import resolve
from bnexp.evaluation.predictions import predict
from bnexp.nn import BatchNorm2d
from bnexp.records import Run, create_run
from bnexp.training.build import build_training
from bnexp.training.display import Silent
from bnexp.training.loop import train
from bnexp.training.signals import Interruption

TREE = {
    "name": "fast",
    "data": {"name": "digits", "val_fraction": 0.1},
    "model": {"name": "mlp"},
    "statistics": {
        "estimators": {
            "slow": {"rule": "ema", "decay": 0.99},
            "window": {"rule": "pooled", "window": 5},
        },
        "recompute": {"samples": 300},
    },
    "training": {
        "steps": 40,
        "batch_size": 32,
        "optimizer": {"lr": 0.05},
        "schedule": {"name": "constant"},
        "averages": {"ema": {"decay": 0.9}},
        "check_every": 10,
    },
    "test": {"every": 10, "statistics": ["running", "recomputed", "batch"]},
    "checkpoints": {"every_steps": 20, "every_seconds": None},
}
CPU = torch.device("cpu")


def training_with(**sections):
    tree = {**TREE, **{key: {**TREE.get(key, {}), **part} for key, part in sections.items()}}
    return build_training(resolve(tree, [], "test"), CPU)


def trained(training, folder, display=None):
    config = training.config
    run = create_run(config.name, config.to_yaml(), {}, folder)
    return run, train(run, training, display or Silent(), Interruption(()))


@pytest.fixture(scope="module")
def compiler_cache(tmp_path_factory):
    """One folder for what the tests of this file compile, so that each graph is built once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("compiled")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


# ------------------------------------------------------------------------------------- compile


@pytest.mark.slow
def test_a_compiled_run_computes_what_an_eager_one_does_in_one_graph(tmp_path, compiler_cache):
    """Evaluations under all kinds of statistics in between compile nothing anew, and the
    estimators get the moments of every step."""
    eager = training_with()
    eager_run, eager_outcome = trained(eager, tmp_path)
    torch._dynamo.reset()
    counters.clear()
    compiled = training_with(performance={"compile": True})
    compiled_run, compiled_outcome = trained(compiled, tmp_path)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"] and not counters["recompiles"]

    assert np.allclose(compiled_run.steps()["loss"], eager_run.steps()["loss"], rtol=1e-4)
    expected, found = eager.state.estimates(), compiled.state.estimates()
    assert found.keys() == {"running", "slow", "window"}
    for name in expected:
        for layer in expected[name].names:
            assert found[name].count[layer] == 40
            for part in ("mean", "var"):
                ours, theirs = (getattr(s[name], part)[layer] for s in (found, expected))
                assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    kinds = [str(r.condition) for r in eager_outcome.comparison.results]
    assert [str(r.condition) for r in compiled_outcome.comparison.results] == kinds
    assert {"running", "recomputed", "ema/recomputed"} <= set(kinds)
    for one, other in zip(
        eager_outcome.comparison.results, compiled_outcome.comparison.results, strict=True
    ):
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.005)


@pytest.mark.slow
def test_freezing_compiles_once_more_and_no_oftener(tmp_path, compiler_cache):
    torch._dynamo.reset()
    counters.clear()
    training = training_with(
        performance={"compile": True}, statistics={"freeze_from_step": 15}, test={"every": None}
    )
    trained(training, tmp_path)
    assert counters["stats"]["unique_graphs"] == 2
    assert set(training.state.estimates()["slow"].count.values()) == {15}


def test_a_compiled_run_is_resumed_as_if_it_had_not_stopped(bnexp, compiler_cache):
    import yaml

    (bnexp.cwd / "fast.yaml").write_text(yaml.safe_dump(TREE))
    env = {"TORCHINDUCTOR_CACHE_DIR": str(compiler_cache)}
    whole = bnexp("train", "fast.yaml", "performance.compile=true", "--name", "whole", **env)
    assert whole.code == 0, whole.stderr
    half = bnexp(
        "train",
        "fast.yaml",
        "performance.compile=true",
        "training.steps=20",
        "--name",
        "half",
        **env,
    )
    assert half.code == 0, half.stderr
    rest = bnexp("train", "--resume", "runs/half-1", "training.steps=40", **env)
    assert rest.code == 0, rest.stderr
    one, other = (bnexp.cwd / "runs" / f"{name}-1" for name in ("whole", "half"))
    assert (one / "steps.csv").read_bytes() == (other / "steps.csv").read_bytes()
    assert Run(one).comparison()["kinds"] == Run(other).comparison()["kinds"]


# ------------------------------------------------------------------------ folding, channels_last


def test_folding_changes_neither_training_nor_verdicts(tmp_path):
    outcomes = []
    for fold in (True, False):
        training = training_with(model={"name": "small-cnn"}, performance={"fold_batchnorm": fold})
        outcomes.append(trained(training, tmp_path))
    (with_it, result), (without, expected) = outcomes
    assert (with_it.path / "steps.csv").read_bytes() == (without.path / "steps.csv").read_bytes()
    for found, wanted in zip(result.comparison.results, expected.comparison.results, strict=True):
        assert found.condition == wanted.condition and found.accuracy == wanted.accuracy
        assert found.loss == pytest.approx(wanted.loss, rel=1e-4)
    for found, wanted in zip(with_it.evals(), without.evals(), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


def test_folding_is_what_the_setting_says(tmp_path, monkeypatch):
    calls = []
    plain = BatchNorm2d.forward

    def forward(layer, x):
        calls.append(layer.training)
        return plain(layer, x)

    monkeypatch.setattr(BatchNorm2d, "forward", forward)
    monkeypatch.setattr("bnexp.nn.folding.is_plain", lambda layer: True)
    counts = {}
    for fold in (True, False):
        training = training_with(
            model={"name": "small-cnn"},
            performance={"fold_batchnorm": fold},
            training={"steps": 2, "averages": {}},
            test={"statistics": ["running"], "every": 1},
            data={"val_fraction": 0.0},
            statistics={"estimators": {}},
        )
        calls.clear()
        trained(training, tmp_path)
        counts[fold] = calls.count(False)
    assert counts[True] < counts[False]


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_reaches_the_convolutions_or_does_not(channels_last):
    """Also with one channel, where a tensor's strides alone leave it open."""
    training = training_with(
        model={"name": "small-cnn"}, performance={"channels_last": channels_last}
    )
    formats = []
    training.state.model.conv2.register_forward_hook(
        lambda layer, inputs, output: formats.append(
            output.is_contiguous(memory_format=torch.channels_last)
        )
    )
    predict(training.state.model, training.data.test.batches(250))
    assert set(formats) == {channels_last}


# -------------------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps(tmp_path):
    """Python's memory after 3 000 steps is that after 500; resident memory is watched by
    benchmarks/memory.py."""
    traced = {}

    class Watching(Silent):
        def step(self, step, images):
            if step in (500, 3000):
                gc.collect()
                traced[step] = tracemalloc.get_traced_memory()[0]
            return False

    training = training_with(
        training={"steps": 3000, "batch_size": 4, "optimizer": {"lr": 0.001}},
        test={"every": 300, "statistics": ["running"]},
        statistics={"recompute": {"samples": 100}},
        checkpoints={"every_steps": 250},
    )
    tracemalloc.start()
    try:
        run, _ = trained(training, tmp_path, Watching())
    finally:
        tracemalloc.stop()
    assert len(run.steps()["step"]) == 3000
    assert traced[3000] - traced[500] < 60_000  # a number kept for every step would take 80 000
