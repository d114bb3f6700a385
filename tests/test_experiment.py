"""`run_experiment`, called as a notebook or a worker does."""

from __future__ import annotations

import json
import threading

import pytest
import torch

import bnexp
from bnexp.condition import Condition
from bnexp.config import resolve
from bnexp.errors import RunFailed, UserError

TREE = {
    "name": "made",
    "data": {"name": "digits", "limit": {"train": 200, "test": 100}, "val_fraction": 0.2},
    "model": {"name": "mlp"},
    "statistics": {"recompute": {"samples": 50}},
    "training": {"steps": 12, "batch_size": 16, "schedule": {"name": "constant"}},
    "checkpoints": {"every_steps": 4, "every_seconds": None},
}


def test_an_experiment_from_a_mapping_in_a_folder_of_its_own(tmp_path, capfd):
    before = json.dumps(TREE)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    outcome = bnexp.run_experiment(TREE, tmp_path / "deep" / "one")
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers go on as they were
    assert json.dumps(TREE) == before
    assert capfd.readouterr() == ("", "")
    record = outcome.record
    assert record.path == tmp_path / "deep" / "one"
    assert outcome.weights == "last" and outcome.message is None and outcome.unmet is None
    assert outcome.comparison.base.condition == Condition("running")
    assert record.comparison()["kinds"][0]["accuracy"] == outcome.comparison.base.accuracy
    assert record.state["state"] == "finished" and record.state["step"] == 12
    assert record.environment["threads"] == torch.get_num_threads()
    assert not record.is_locked()
    with pytest.raises(UserError, match="exists already"):
        bnexp.run_experiment(TREE, tmp_path / "deep" / "one")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one"]


def test_runs_of_a_path_a_config_and_a_mapping_are_the_same(tmp_path):
    config = resolve({**TREE}, [], "test")
    path = tmp_path / "made.yaml"
    path.write_text(config.to_yaml())
    made = [
        bnexp.run_experiment(each, runs=tmp_path / "runs", overrides=["training.steps=5"])
        for each in (path, str(path), config, TREE)
    ]
    assert [one.record.name for one in made] == [f"made-{n}" for n in range(1, 5)]
    steps = {(one.record.path / "steps.csv").read_bytes() for one in made}
    assert len(steps) == 1 and steps.pop().count(b"\n") == 6


def test_resuming_ends_as_the_whole_run(tmp_path):
    whole = bnexp.run_experiment(TREE, tmp_path / "whole")
    part = bnexp.run_experiment(TREE, tmp_path / "part", overrides=["training.steps=6"])
    for given in (part.record, part.record.path):
        outcome = bnexp.run_experiment(resume=given, overrides=["training.steps=12"])
        assert outcome.comparison == whole.comparison
        one, other = (r.record.path / "steps.csv" for r in (whole, part))
        assert one.read_bytes() == other.read_bytes()
        part.record.write_state("running", 12, 12)  # as if it had been killed before that
    with pytest.raises(UserError, match=r"model\.name"):
        bnexp.run_experiment(resume=part.record, overrides=["model.name=small-cnn"])


def test_what_was_expected_and_not_reached_is_said_and_raises_nothing(tmp_path):
    overrides = ["training.steps=1", "expect.test_accuracy=1"]
    outcome = bnexp.run_experiment(TREE, tmp_path / "one", overrides=overrides)
    assert "expect.test_accuracy: 100.00% was expected" in outcome.unmet


def test_a_failed_run_says_so_in_its_record(tmp_path):
    with pytest.raises(RunFailed, match="diverged"):
        bnexp.run_experiment(TREE, tmp_path / "one", overrides=["training.optimizer.lr=1e30"])
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    assert state["state"] == "failed" and "diverged" in state["message"] and state["step"] == 0


def test_autocast_of_the_caller_would_be_another_precision(tmp_path):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="call it outside"):
        bnexp.run_experiment(TREE, tmp_path)
    assert not any(tmp_path.iterdir())


def test_it_runs_beside_the_main_thread(tmp_path):
    outcomes = []
    thread = threading.Thread(
        target=lambda: outcomes.append(
            bnexp.run_experiment(TREE, tmp_path / "one", handle_signals=True)
        )
    )
    thread.start()
    thread.join()
    assert outcomes[0].record.state["state"] == "finished"


def test_several_processes_of_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        bnexp.run_experiment(TREE, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_nothing_to_run_is_a_user_error():
    with pytest.raises(UserError, match="name a config"):
        bnexp.run_experiment()
