"""Checkpoints are whole or absent, checked when read, and never run code."""

from __future__ import annotations

import pickle
import random

import pytest
import torch

from bnexp.errors import UserError
from bnexp.training.checkpoints import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    step_checkpoints,
)


def state_of(step):
    return {"step": step, "weights": torch.full((1000,), float(step)), "name": "digits"}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path, state_of(7), keep=2, best=None)
    loaded = load_checkpoint(path)
    assert loaded["step"] == 7 and loaded["name"] == "digits"
    assert torch.equal(loaded["weights"], state_of(7)["weights"])


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 30, 400):
        save_checkpoint(tmp_path, state_of(step), keep=2, best="best.pt" if step == 2 else None)
    assert [p.name for p in step_checkpoints(tmp_path)] == [
        "step-000000400.pt",
        "step-000000030.pt",
    ]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2
    assert not list(tmp_path.glob(".*"))


def test_any_flipped_bit_in_the_data_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, state_of(1), keep=2, best=None)
    whole = path.read_bytes()
    start = whole.index(state_of(1)["weights"].numpy().tobytes())
    rng = random.Random(0)
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[start + rng.randrange(4000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path):
    """Headers too: what is loaded is either what was saved, or refused in one line."""
    path = save_checkpoint(tmp_path, {**state_of(1), "weights": torch.arange(4.0)}, 2, None)
    whole = path.read_bytes()
    for position in range(0, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)
        except UserError:
            continue
        assert torch.equal(state["weights"], torch.arange(4.0)), position
        assert state["step"] == 1 and state["name"] == "digits"


def test_any_truncation_is_noticed_and_the_one_before_is_used(tmp_path):
    save_checkpoint(tmp_path, state_of(1), keep=2, best=None)
    newest = save_checkpoint(tmp_path, state_of(2), keep=2, best=None)
    whole = newest.read_bytes()
    for size in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        newest.write_bytes(whole[:size])
        state, passed_over = newest_checkpoint(tmp_path)
        assert state["step"] == 1
        assert len(passed_over) == 1 and "damaged" in passed_over[0]


def test_without_any_whole_checkpoint_the_reason_is_said(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, [])
    save_checkpoint(tmp_path, state_of(1), keep=2, best=None).write_bytes(b"PK")
    with pytest.raises(UserError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in the checkpoint ran')",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, zipped):
    path = tmp_path / "step-000000001.pt"
    if zipped:
        torch.save({"format": 1, "step": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        load_checkpoint(path)


def test_other_files_of_torch_are_not_taken_for_checkpoints(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)


def test_a_failing_write_leaves_the_former_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state_of(1), keep=1, best="best.pt")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, state_of(2), keep=1, best="best.pt")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "step-000000001.pt"]
    assert newest_checkpoint(tmp_path)[0]["step"] == 1
