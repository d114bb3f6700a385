"""What `bnexp export` writes loads without bnexp and does what the run's network did."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import torch
from conftest import ROOT, trained

CONFIG = """
data: {name: digits, image_size: 32, limit: {train: 200, test: 40}}
model: {name: torchvision/resnet18}
statistics: {estimators: {slow: {rule: ema, decay: 0.99}}}
training: {steps: 6, batch_size: 32, optimizer: {lr: 0.01}, averages: {ema: {decay: 0.5}}}
"""


@pytest.fixture
def run(bnexp):
    (bnexp.cwd / "c.yaml").write_text(CONFIG)
    return trained(bnexp, "c.yaml")


def plain(path):
    """torchvision's own network, for grey images, with the exported weights: as the docs say."""
    page = (ROOT / "docs" / "pipeline.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names = {}
    with contextlib.chdir(path.parent):
        exec(code.replace('"network.pt"', repr(path.name)), names)
    return names["model"]


@pytest.mark.slow
def test_the_exported_network_predicts_as_the_run_says(bnexp, run):
    from bnexp.data import DataSettings, load_data

    settings = DataSettings(name="digits", image_size=32, limit_train=200, limit_test=40)
    test = load_data(settings, seed=0, device="cpu").test
    kinds = {
        kind["name"]: kind
        for kind in json.loads((run.path / "comparison.json").read_text())["kinds"]
    }
    for options, name in (
        ((), "running"),
        (("--statistics", "recomputed"), "recomputed"),
        (("--statistics", "slow"), "slow"),
        (("--weights", "ema"), "ema/recomputed"),
    ):
        out = bnexp.cwd / f"{name.replace('/', '-')}.pt"
        done = bnexp("export", run.path, out, *options)
        assert done.code == 0, done.stderr
        model = plain(out)
        with torch.no_grad():
            pairs = [(model(x), y) for x, y in test.batches(20)]
        logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        assert loss.item() == pytest.approx(kinds[name]["loss"], rel=1e-4), name


def test_what_is_refused(bnexp, run):
    (bnexp.cwd / "there.pt").write_text("precious")
    for arguments, said in (
        ((run.path, "there.pt"), "exists already"),
        ((run.path, "no/folder.pt"), "no folder"),
        ((run.path, "x.safetensor"), "must end in .pt, .pth, .safetensors"),
        ((run.path, "x"), "must end in"),
        ((run.path, "x.pt", "--statistics", "fast"), "this run has running, slow, recomputed"),
        ((run.path, "x.pt", "--weights", "swa"), "no swa weights"),
    ):
        done = bnexp("export", *arguments)
        assert done.code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (bnexp.cwd / "there.pt").read_text() == "precious"
    assert not (bnexp.cwd / "x.pt").exists()


def test_a_checkpoint_that_is_passed_over_is_said(bnexp, run):
    done = bnexp("train", "--resume", run.path, "training.steps=9")
    assert done.code == 0, done.stderr
    newest = max(run.checkpoints.glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    done = bnexp("export", run.path, "x.pt")
    assert done.code == 0 and f"{newest} is damaged" in done.stderr, done.stderr
    assert "after 6 steps" in done.stderr
