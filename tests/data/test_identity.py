"""What a run remembers of its data: the same for the same images, and what it says of others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_folders import write_images
from PIL import Image

from bnexp.data import DataSettings, identity, load_data
from bnexp.data.catalogue import data_of
from bnexp.data.files import Arrays
from bnexp.data.identity import describe_change, describe_renumbering, split_by_number

CLASSES = {"cat": 20, "dog": 10}


def load(root: Path, **keys):
    settings = DataSettings("image-folder", root=root, workers=0, **keys)
    return load_data(settings, seed=0, device="cpu")


def prints(root: Path, **keys) -> dict:
    fingerprint = load(root, **keys).fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    return fingerprint


@pytest.fixture
def root(tmp_path) -> Path:
    return write_images(tmp_path / "d", CLASSES)


def changes(before: dict, root: Path) -> str | None:
    return describe_change(before, prints(root))


# --------------------------------------------------------------------------------- image folders


def test_the_same_images_are_the_same_data(root):
    before = prints(root)
    root.rename(root.with_name("moved"))
    assert changes(before, root.with_name("moved")) is None
    assert before["classes"] == ["cat", "dog"] and before["split"] == "by name"
    images = [before["splits"][part]["images"] for part in ("train", "test")]
    assert np.sum(images, axis=0).tolist() == [20, 10]


def test_a_new_image_is_named_by_its_class(root):
    before = prints(root)
    train = before["splits"]["train"]["images"][1]
    shutil.copy(root / "dog" / "000.png", root / "dog" / "5.png")
    assert changes(before, root) == f"class dog has {train + 1} training images, not {train}"


def test_a_renamed_class(root):
    before = prints(root)
    (root / "cat").rename(root / "zcat")
    assert changes(before, root) == "class cat is called zcat now"


def test_classes_that_have_other_numbers(root):
    before = prints(root)
    write_images(root, {"eel": 4}, seed=3)
    assert describe_renumbering(before, prints(root)) is None
    write_images(root, {"ape": 4}, seed=4)
    assert describe_renumbering(before, prints(root)) == "class cat is number 1 now, not 0"
    shutil.rmtree(root / "ape")
    (root / "cat").rename(root / "zcat")
    assert describe_renumbering(before, prints(root)) == "class zcat is number 2 now, not 0"
    assert describe_renumbering({"classes": 3}, before) is None, "a damaged record"


def test_classes_that_come_and_go(root):
    before = prints(root)
    write_images(root, {"eel": 4}, seed=3)
    assert changes(before, root) == "class eel is new"
    assert describe_change(prints(root), before) == "class eel is gone"


def test_an_image_of_the_same_name_and_size_with_other_contents(root):
    before = prints(root)
    path = root / "cat" / "004.png"
    contents = bytearray(path.read_bytes())
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(path)
    contents_now = path.read_bytes()
    path.write_bytes(contents_now + bytes(max(0, len(contents) - len(contents_now))))
    said = changes(before, root)
    assert said is not None and said.endswith(
        "images of class cat are others, or have other contents"
    )


def test_exchanged_labels(root):
    before = prints(root)
    for name in "000", "001", "002", "003":
        cat, dog = root / "cat" / f"{name}.png", root / "dog" / f"{name}.png"
        cat.rename(root / "x.png")
        dog.rename(cat)
        (root / "x.png").rename(dog)
    assert "class cat are others" in (changes(before, root) or "")
    assert "class dog are others" in (changes(before, root) or "")


def test_a_split_that_became_another(root):
    assert prints(root) != prints(root, split_by_number=True)
    assert describe_change(prints(root), prints(root, split_by_number=True))
    assert split_by_number(prints(root, split_by_number=True)) and split_by_number(None)
    assert not split_by_number(prints(root))


def test_many_changes_stay_one_line(tmp_path):
    write_images(tmp_path, {f"class{n}": 2 for n in range(20)})
    before = prints(tmp_path)
    for n in range(20):
        (tmp_path / f"class{n}").rename(tmp_path / f"other{n}")
        write_images(tmp_path, {f"other{n}": 3}, seed=n + 9)
    said = changes(before, tmp_path)
    assert said.endswith("; 35 more changes") and "\n" not in said and len(said) < 300


def test_many_bytes_are_told_apart_by_names_and_sizes(root, monkeypatch):
    monkeypatch.setattr(identity, "COMPARED_BYTES", 0)
    data = load(root)
    assert data.fingerprint["compared"] == "names and sizes"
    assert any("was not looked for" in remark for remark in data.remarks)
    path = root / "cat" / "004.png"
    path.write_bytes(path.read_bytes() + b"x")
    assert "class cat are others" in (changes(data.fingerprint, root) or "")


def test_names_in_any_bytes(root):
    before = prints(root)
    os.rename(os.fsencode(root / "cat"), os.fsencode(root) + b"/caf\xe9")
    os.rename(os.fsencode(root / "dog" / "000.png"), os.fsencode(root / "dog") + b"/\xff.png")
    said = changes(before, root)
    assert said is not None and said.startswith("class cat is called caf\\xe9 now")
    assert said.isprintable() and prints(root)["classes"] == ["caf\\xe9", "dog"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: {},
        lambda d: {**d, "classes": 3},
        lambda d: {**d, "splits": None},
        lambda d: {**d, "classes": [["a"], None]},
        lambda d: {**d, "splits": {"train": {"images": ["x"], "hashes": []}}},
        lambda d: {**d, "splits": {"what": d["splits"]["train"]}},
        lambda d: [],
    ],
)
def test_a_damaged_record_is_said(root, damage):
    before = prints(root)
    said = describe_change(damage(before), before)
    assert said is not None and said.isprintable()


# --------------------------------------------------------------------------------- in two splits


def test_the_same_picture_in_two_splits_is_said(tmp_path):
    write_images(tmp_path / "train", CLASSES)
    write_images(tmp_path / "test", CLASSES, seed=1)
    assert not any("too" in remark for remark in load(tmp_path).remarks)
    for name in "003", "004":
        shutil.copy(tmp_path / "train" / "cat" / f"{name}.png", tmp_path / "test" / "dog")
    assert load(tmp_path).remarks[-1] == (
        "2 test images are training images, too, such as train/cat/003.png and test/dog/003.png"
    ) or load(tmp_path).remarks[-1] == (
        "2 test images are training images, too, such as train/cat/004.png and test/dog/004.png"
    )


def test_validation_images_too(tmp_path):
    for seed, part in enumerate(("train", "val", "test")):
        write_images(tmp_path / part, {"a": 3, "b": 3}, seed=seed)
    shutil.copy(tmp_path / "val" / "a" / "000.png", tmp_path / "train" / "a" / "x.png")
    assert load(tmp_path).remarks[-1] == (
        "1 validation images are training images, too, such as train/a/x.png and val/a/000.png"
    )


# --------------------------------------------------------------------------------- what was found


def test_classes_and_their_sizes_are_said(tmp_path):
    write_images(tmp_path / "train", CLASSES)
    write_images(tmp_path / "test", {"cat": 4}, seed=1)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("left out")
    assert load(tmp_path).remarks == (
        "2 classes (training + test images): cat 20 + 4, dog 10 + 0",
        "left out: 1 .txt file",
        "no test images of class dog",
    )
    split = load(tmp_path, val_fraction=0.2).remarks[0]
    assert split == "2 classes (training + validation + test images): cat 16 + 4 + 4, dog 8 + 2 + 0"


def test_of_many_classes_the_smallest_and_the_largest_are_said(tmp_path):
    write_images(tmp_path / "train", {f"c{n:02}": n for n in range(2, 22)}, size=(2, 2))
    write_images(tmp_path / "test", {f"c{n:02}": 1 for n in range(2, 22)}, size=(2, 2), seed=1)
    first = load(tmp_path).remarks[0]
    assert first == "20 classes (training + test images): from c02 2 + 1 to c21 21 + 1"


# ---------------------------------------------------------------------------------- published sets


def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    labels = np.tile(np.arange(3), 20)
    return Arrays(images[:40], labels[:40], images[40:], labels[40:], ("a", "b", "c"))


def of(read: Arrays) -> dict:
    return data_of(read, DataSettings("digits"), 0, "cpu").fingerprint


def test_published_sets_are_told_apart_by_pixels_and_labels():
    before = of(arrays())
    assert of(arrays()) == before
    other = arrays()
    other.test_images[3, 0, 0] ^= 1
    assert describe_change(before, of(other)) == (
        f"the {before['splits']['test']['images'][1]} test images of class b are others, or have "
        "other contents"
    )
    swapped = arrays()
    swapped.train_images[[0, 1]] = swapped.train_images[[1, 0]]
    swapped.train_labels[[0, 1]] = swapped.train_labels[[1, 0]]
    assert describe_change(before, of(swapped)) == (
        "the same classes and images are split in another way"
    )
    fewer = data_of(arrays(), DataSettings("digits", limit_test=6), 0, "cpu").fingerprint
    assert "test images, not" in (describe_change(before, fewer) or "")
    renamed = {**before, "name": "mnist"}
    assert describe_change(before, renamed) == "the data set was digits and is mnist"
