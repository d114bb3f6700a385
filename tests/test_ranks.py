"""Several ranks: what is not made for them says so on each of them, in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bnexp.errors import UserError
from bnexp.ranks import Alone, choose_ranks, refuse_launcher

TWO_RANKS = """
import sys
import torch, bnexp
import torch.distributed as dist
from torch import nn
from bnexp.ranks import Alone

rank, store = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
before = dict(model.state_dict())
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
lines = []
for attempt in ACTIONS:
    try:
        attempt(None)
        lines.append("accepted")
    except bnexp.UserError as error:
        lines.append(str(error))
assert type(model[1]) is nn.BatchNorm1d
for attempt in ACTIONS:
    attempt(Alone())
print("\\n".join(lines))
dist.destroy_process_group()
"""


def run_two_ranks(script, folder):
    path = folder / "script.py"
    path.write_text(script)
    ranks = [
        subprocess.Popen(
            [sys.executable, path, str(rank), folder / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, error) in zip(ranks, results, strict=True):
        assert rank.returncode == 0, error
    return [output.splitlines() for output, _ in results]


@pytest.mark.slow
def test_the_tracker_asks_for_a_choice_on_every_rank(tmp_path):
    actions = (
        'lambda ranks: bnexp.StatisticsTracker(model, {"a": bnexp.Ema(0.9)}, ranks=ranks).close()'
    )
    for lines in run_two_ranks(TWO_RANKS.replace("ACTIONS", f"[{actions}]"), tmp_path):
        assert len(lines) == 1
        assert "one of 2 ranks" in lines[0] and "ranks=bnexp.ranks.Alone()" in lines[0]


def test_a_process_by_itself_need_not_choose():
    assert choose_ranks(None, "this") == choose_ranks(Alone(), "this") == Alone()


def test_launchers_of_several_processes_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    refuse_launcher("bnexp train")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_launcher("bnexp train")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="bnexp train was started 2 times by a launcher"):
        refuse_launcher("bnexp train")
