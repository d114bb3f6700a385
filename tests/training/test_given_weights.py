"""Starting from weights: a file of `bnexp export`, of strangers, and what becomes of a resume."""

from __future__ import annotations

import shutil

import pytest
import torch

from bnexp.cli.export import run_export
from bnexp.config import resolve
from bnexp.errors import UserError
from bnexp.experiment import run_experiment
from bnexp.nn import BatchNorm2d
from bnexp.records import Run
from bnexp.training.build import build_training
from bnexp.training.trained import load_trained

CPU = torch.device("cpu")
BASE = {
    "name": "given",
    "device": "cpu",
    "data": {"name": "digits", "limit": {"train": 200, "test": 60}},
    "model": {"name": "mlp"},
    "statistics": {"estimators": {"average": {"rule": "cumulative"}}},
    "training": {"steps": 6, "batch_size": 20, "schedule": {"name": "constant"}},
    "checkpoints": {"every_steps": 2, "every_seconds": None},
}


def config(**changes):
    tree = {**BASE, **changes}
    return resolve(tree, [], "test")


def weights_file(path, seed=5, classes=10):
    """A state_dict of this network as `bnexp export` writes it, with averages that moved."""
    model = build_training(config(seed=seed), CPU).state.model
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_()
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        if name.endswith("num_batches_tracked"):
            tensor.fill_(77)
    if classes != 10:
        state["fc4.weight"], state["fc4.bias"] = torch.randn(classes, 100), torch.randn(classes)
    torch.save(state, path)
    return state


def test_a_training_starts_from_them(tmp_path):
    state = weights_file(tmp_path / "w.pt")
    given = config(model={"name": "mlp", "weights": str(tmp_path / "w.pt")})
    training = build_training(given, CPU)
    now = training.state.model.state_dict()
    assert all(torch.equal(now[name], state[name]) for name in state)
    # The estimators start from the file's averages, too.
    for estimate in training.state.estimates().values():
        assert torch.equal(estimate.mean["bn1"], state["bn1.running_mean"])
    assert training.remarks == (f"starting from {tmp_path}/w.pt",)
    outcome = run_experiment(given, tmp_path / "run")
    assert outcome.record.environment["weights"]["hash"] == training.given.hash


def test_frozen_from_the_first_step(tmp_path):
    state = weights_file(tmp_path / "w.pt")
    given = config(
        model={"name": "mlp", "weights": str(tmp_path / "w.pt")},
        statistics={"freeze_from_step": 0},
    )
    record = run_experiment(given, tmp_path / "run").record
    content = torch.load(record.checkpoints / "step-000000006.pt", weights_only=True)["model"]
    assert torch.equal(content["bn1.running_mean"], state["bn1.running_mean"])
    assert not torch.equal(content["bn1.weight"], state["bn1.weight"])


def test_a_classifier_for_other_classes_starts_afresh(tmp_path):
    state = weights_file(tmp_path / "w.pt", classes=7)
    given = config(model={"name": "mlp", "weights": str(tmp_path / "w.pt")})
    training = build_training(given, CPU)
    fresh = build_training(config(), CPU).state.model.state_dict()
    now = training.state.model.state_dict()
    for name, tensor in now.items():
        assert torch.equal(tensor, fresh[name] if name.startswith("fc4") else state[name])
    assert "fc4.weight, fc4.bias start afresh: the file's are for 7 classes" in training.remarks


def killed_at(step, whole, folder):
    """The record as it was after the checkpoint of `step`."""
    shutil.copytree(whole.path, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.stem.rpartition("-")[2]) > step:
            path.unlink()
    run = Run(folder)
    run.write_state("interrupted", step, 6)
    return run


def test_a_resume_needs_the_file_only_before_the_first_checkpoint(tmp_path):
    weights_file(tmp_path / "w.pt")
    given = config(model={"name": "mlp", "weights": str(tmp_path / "w.pt")})
    whole = run_experiment(given, tmp_path / "whole").record
    early, late = (killed_at(step, whole, tmp_path / f"at-{step}") for step in (0, 4))
    run_experiment(resume=early)
    other = killed_at(0, whole, tmp_path / "other")
    weights_file(tmp_path / "w.pt", seed=6)
    with pytest.raises(UserError, match=r"are others than when .* was begun"):
        run_experiment(resume=other)
    (tmp_path / "w.pt").unlink()
    run_experiment(resume=late)
    for run in (early, late):
        assert (run.path / "steps.csv").read_bytes() == (whole.path / "steps.csv").read_bytes()


@pytest.mark.parametrize("norm", ["batch-renorm", "moving-average"])
def test_an_exported_run_is_gone_on_from_with_batch_normalization(tmp_path, norm):
    of = config(
        model={"name": "small-cnn", "norm": norm},
        training={**BASE["training"], "optimizer": {"name": "sgd", "lr": 0.01}},
    )
    record = run_experiment(of, tmp_path / "run").record
    out = tmp_path / "exported.pt"
    run_export(str(record.path), out, None, None, "cpu", tmp_path)
    plain = config(model={"name": "small-cnn", "weights": str(out)})
    model = build_training(plain, CPU).state.model.eval()
    trained = load_trained(record, of, CPU, "last")
    x, _ = next(iter(trained.data.test.batches(20)))
    with torch.no_grad():
        assert torch.equal(model(x), trained.model.eval()(x))
    assert type(model.bn1) is BatchNorm2d


def test_no_weights_of_this_network(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        build_training(config(model={"name": "mlp", "weights": str(tmp_path / "none.pt")}), CPU)
    weights_file(tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt"):
        build_training(config(model={"name": "small-cnn", "weights": str(tmp_path / "w.pt")}), CPU)
    with pytest.raises(UserError, match="is for torchvision's networks"):
        config(model={"name": "mlp", "weights": "torchvision/IMAGENET1K_V1"})
