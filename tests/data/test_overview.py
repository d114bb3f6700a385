"""What `bnexp data` says, against what the loaders know and find."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct

import numpy as np
import pytest
from torchvision import datasets

from bnexp.data import DATA_SETS, DataSettings, load_data
from bnexp.data.files import FASHION_MNIST, IDX, MNIST
from bnexp.data.overview import DATA_SETS as KNOWN
from bnexp.data.overview import DIGITS, place_of

BY_NAME = {each.name: each for each in KNOWN}


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    monkeypatch.delenv("BNEXP_DATA", raising=False)
    monkeypatch.setattr("bnexp.data.files.DEBIAN_FOLDER", tmp_path / "no datasets")
    monkeypatch.chdir(tmp_path)


def idx_file(path, values):
    header = struct.pack(">4B", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def idx_set(folder):
    folder.mkdir(parents=True)
    for stem, n in (("train", 20), ("t10k", 10)):
        idx_file(folder / f"{stem}-images-idx3-ubyte.gz", np.zeros((n, 28, 28)))
        idx_file(folder / f"{stem}-labels-idx1-ubyte.gz", np.arange(n) % 10)


def test_it_lists_what_can_be_loaded():
    assert [*BY_NAME, "image-folder"] == list(DATA_SETS)
    assert {name for name, each in BY_NAME.items() if not each.files} == {"digits", *IDX}


def test_the_digits_are_as_said():
    data = load_data(DataSettings("digits"), seed=0, device="cpu")
    height, width, channels = DIGITS.shape
    assert (len(data.train), len(data.test)) == (DIGITS.training_images, DIGITS.test_images)
    assert (data.info.channels, data.info.image_size) == (channels, (height, width))
    assert len(data.info.classes) == DIGITS.classes
    assert (place_of(DIGITS, None) / "digits.npz").is_file()


def test_classes_and_files_are_those_of_torchvision():
    for name, kind in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        whole, (archive,) = BY_NAME[name].files
        listed = [*kind.train_list, *kind.test_list, (kind.meta["filename"], "")]
        assert set(whole) == {f"{kind.base_folder}/{file}" for file, _ in listed}
        assert archive == kind.filename
    lists = datasets.SVHN.split_list
    assert BY_NAME["svhn"].files == ((lists["train"][1], lists["test"][1]),)
    assert all(BY_NAME[name].classes == len(known.classes) for name, known in IDX.items())


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_an_idx_set_is_here_once_it_is_whole_and_is_then_read_from_there(name, tmp_path):
    root = tmp_path / "elsewhere"
    assert place_of(BY_NAME[name], root) is None
    place = root / name
    idx_set(place)
    assert place_of(BY_NAME[name], root) == place
    assert len(load_data(DataSettings(name, root=root), seed=0, device="cpu").test) == 10
    (place / "t10k-labels-idx1-ubyte.gz").unlink()
    assert place_of(BY_NAME[name], root) is None


def test_files_that_are_known_to_be_anothers_are_not_here(tmp_path, monkeypatch):
    idx_set(tmp_path / "raw")
    labels = gzip.decompress((tmp_path / "raw" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    md5 = hashlib.md5(labels, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(FASHION_MNIST.md5, "test-labels", md5)
    monkeypatch.setattr("bnexp.data.files._OWNERS", {md5: ("fashion-mnist", "test-labels")})
    monkeypatch.setattr("bnexp.data.files.PUBLISHED_IMAGES", {"train": 60_000, "test": 10})
    assert place_of(BY_NAME["fashion-mnist"], tmp_path) == tmp_path / "raw"
    assert place_of(BY_NAME[MNIST.name], tmp_path) is None


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_others_are_here_with_all_their_files_or_the_archive(name, tmp_path):
    for names in BY_NAME[name].files:
        for each in names:
            assert place_of(BY_NAME[name], tmp_path / "root") is None
            path = tmp_path / "root" / name / each
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        assert place_of(BY_NAME[name], tmp_path / "root") == tmp_path / "root" / name
        shutil.rmtree(tmp_path / "root")


def test_the_command(bnexp):
    idx_set(bnexp.cwd / "data" / "MNIST" / "raw")
    done = bnexp("data")
    assert done.code == 0
    assert "in the package" in done.stdout and "data/MNIST/raw" in done.stdout
    (bnexp.cwd / "data" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"none")
    damaged = bnexp("data")
    assert damaged.code == 0 and "t10k-labels-idx1-ubyte.gz is corrupt" in damaged.stdout
    rows = {row["name"]: row for row in json.loads(bnexp("data", "--json").stdout)}
    assert not rows["mnist"]["here"] and "corrupt" in rows["mnist"]["damaged"]
    assert rows["svhn"] == {
        "name": "svhn", "training_images": 73_257, "test_images": 26_032, "shape": [32, 32, 3],
        "classes": 10, "here": False, "path": None, "damaged": None, "download_megabytes": 246,
    }  # fmt: skip
