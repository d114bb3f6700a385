"""Runs of the command line on folders that changed, moved, or have names in any bytes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from image_folders import write_images

CONFIG = """
data: {name: image-folder, root: d, workers: 1}
model: {name: mlp}
training: {steps: 4, batch_size: 8}
statistics: {estimators: {}}
"""


@pytest.fixture
def root(bnexp) -> Path:
    (bnexp.cwd / "f.yaml").write_text(CONFIG)
    return write_images(bnexp.cwd / "d", {"cat": 20, "dog": 20}, size=(4, 4))


def test_a_run_says_what_it_found_and_knows_its_data(bnexp, root):
    (root / "cat" / "notes.txt").write_text("no image")
    train = bnexp("train", "f.yaml")
    assert train.code == 0, train.stderr
    assert "2 classes (training + test images): cat " in train.stderr
    assert "left out: 1 .txt file" in train.stderr
    before = json.loads((bnexp.cwd / "runs/f-1/data.json").read_text())
    assert bnexp("eval", "f-1").code == 0

    root.rename(bnexp.cwd / "moved")
    lost = bnexp("eval", "f-1")
    assert lost.code == 2 and "data.root=" in lost.stderr
    assert bnexp("eval", "f-1", "data.root=moved").code == 0

    (bnexp.cwd / "moved" / "cat").rename(bnexp.cwd / "moved" / "bat")
    for arguments in (("eval", "f-1"), ("train", "--resume", "f-1", "training.steps=6")):
        refused = bnexp(*arguments, "data.root=moved")
        assert refused.code == 2 and "class cat is called bat now" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    assert json.loads((bnexp.cwd / "runs/f-1/data.json").read_text()) == before
    assert bnexp("eval", "f-1", "data.root=moved", "--changed-data").code == 0
    resumed = bnexp(
        "train", "--resume", "f-1", "training.steps=6", "data.root=moved", "--changed-data"
    )
    assert resumed.code == 0 and "class cat is called bat now" in resumed.stderr
    assert bnexp("eval", "f-1").code == 0, "the new data are those of the run now"


def test_classes_with_other_numbers_are_refused_whatever_is_said(bnexp, root):
    """The model's outputs would be taken for other classes': all right became all wrong."""
    assert bnexp("train", "f.yaml").code == 0
    (root / "cat").rename(root / "zcat")
    for arguments in (("eval", "f-1"), ("train", "--resume", "f-1", "training.steps=6")):
        refused = bnexp(*arguments, "--changed-data")
        assert refused.code == 2 and "class zcat is number 1 now, not 0" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    (root / "zcat").rename(root / "cat")
    assert bnexp("eval", "f-1").code == 0


def test_one_picture_more_is_refused_and_trained_on_by_no_test(bnexp, root):
    assert bnexp("train", "f.yaml").code == 0
    shutil.copy(root / "cat" / "000.png", root / "cat" / "more.png")
    refused = bnexp("eval", "f-1")
    assert refused.code == 2 and "class cat has " in refused.stderr


def test_runs_without_a_record_of_their_data_keep_their_test_images(bnexp, root):
    from bnexp.data.folder import list_folder

    assert bnexp("train", "f.yaml").code == 0
    (bnexp.cwd / "runs/f-1/data.json").unlink()
    found = bnexp("eval", "f-1", "--json")
    former = list_folder(root, split_by_number=True)
    assert found.code == 0, found.stderr
    assert json.loads(found.stdout)["samples"] == len(former.test)


def test_classes_with_names_in_any_bytes(bnexp, root):
    os.rename(os.fsencode(root / "cat"), os.fsencode(root) + b"/caf\xe9\n")
    train = bnexp("train", "f.yaml")
    assert train.code == 0, train.stderr
    for arguments in (("eval", "f-1"), ("eval", "f-1", "--json"), ("report", "f-1"), ("runs",)):
        done = bnexp(*arguments)
        assert done.code == 0, done.stderr
    comparison = json.loads((bnexp.cwd / "runs/f-1/comparison.json").read_text())
    assert comparison["classes"] == ["caf\\xe9\\n", "dog"]
    assert "caf\\xe9\\n" in (bnexp.cwd / "runs/f-1/report.html").read_text()
