"""Which files of a folder are images of which class, what is left out, what is tested on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_folders import write_images
from PIL import Image

from bnexp.data.folder import Listing, chosen_by_name, list_folder
from bnexp.data.sampling import generator, stratified_subset
from bnexp.errors import UserError

CLASSES = {"cat": 60, "dog": 30}


def files(*listings: Listing | None) -> set[tuple[int, str]]:
    return {
        (int(label), name)
        for listing in listings
        if listing is not None
        for name, label in zip(listing.names, listing.labels, strict=True)
    }


def everything(root: Path) -> set[tuple[int, str]]:
    folder = list_folder(root)
    return files(folder.train, folder.val, folder.test)


# ------------------------------------------------------------------------------ names of splits


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Testing", "TEST"])
@pytest.mark.parametrize("val", ["val", "Valid", "validation", None])
def test_splits_are_known_by_any_of_their_names(tmp_path, train, test, val):
    names = {train: 3, test: 2, **({val: 1} if val else {})}
    for seed, (name, count) in enumerate(names.items()):
        write_images(tmp_path / name, {"a": count, "b": count}, seed=seed)
    folder = list_folder(tmp_path)
    assert (len(folder.train), len(folder.test)) == (6, 4) and folder.classes == ("a", "b")
    assert (folder.val is None) if val is None else len(folder.val) == 2
    assert folder.split == "own folder" and folder.left_out == ""


@pytest.mark.parametrize(
    "names,message",
    [
        (["train", "Training", "test"], r"has Training/ and train/; leave one"),
        (["train", "val", "valid"], r"has val/ and valid/; leave one"),
        (["Training"], r"has Training/ but neither test/ nor val/"),
        (["Testing", "cat", "dog"], r"has Testing/ but no train/; add it, or give a class"),
        (["dataset"], r"it has 1 with images .*; is it .*/dataset that you mean\?"),
    ],
)
def test_folders_that_can_be_misread_are_refused(tmp_path, names, message):
    for name in names:
        write_images(tmp_path / name, {"a": 2, "b": 2})
    with pytest.raises(UserError, match=message):
        list_folder(tmp_path)


def test_test_images_without_any_class_are_refused(tmp_path):
    write_images(tmp_path / "train", CLASSES)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"test has no images in folders of its classes"):
        list_folder(tmp_path)


# --------------------------------------------------------------------------- what is left out


def test_what_is_no_image_is_left_out_and_counted(tmp_path):
    write_images(tmp_path, {"cat": 5, "dog": 5})
    for name in ("cat/._000.png", ".git/cat/1.png", "cat/.cache/2.png", "cat/deep/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"hidden")
    for name in ("cat/notes.txt", "cat/deep/more.TXT", "dog/list.csv", "beside.png", "dog/none"):
        (tmp_path / name).write_bytes(b"other")
    for name in ("empty/deep", "dog/folder.png", "__MACOSX/cat", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "__MACOSX" / "cat" / "1.png").write_bytes(b"foreign")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    folder = list_folder(tmp_path)
    assert folder.classes == ("cat", "dog") and len(folder.train) + len(folder.test) == 10
    assert folder.left_out == (
        "2 .png files, 2 .txt files, 1 .csv file, 1 other file, 5 hidden, "
        "the folders __MACOSX/, empty/"
    )


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".jpe", ".ppm", ".pbm", ".tga", ".dib"])
def test_suffixes_of_images(tmp_path, suffix):
    write_images(tmp_path, {"cat": 3})
    (tmp_path / "dog").mkdir()
    kind = {".jfif": "JPEG"}.get(suffix)
    for number in range(3):
        image = Image.new("1" if suffix == ".pbm" else "RGB", (4, 4))
        image.save(tmp_path / "dog" / f"{number}{suffix}", kind)
    assert len(everything(tmp_path)) == 6


def test_other_folders_beside_train_are_named(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / part, CLASSES)
    write_images(tmp_path, {"unlabelled": 3})
    assert list_folder(tmp_path).left_out == "the folder unlabelled/"


# ---------------------------------------------------------------------------------------- links


def test_links_are_followed(tmp_path):
    write_images(tmp_path / "store", {"cat": 8, "dog": 8})
    write_images(tmp_path / "d", {"cat": 2, "dog": 2}, seed=1)
    for name in "cat", "dog":
        (tmp_path / "d" / name / "more").symlink_to(tmp_path / "store" / name)
    (tmp_path / "d" / "eel").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "d" / "cat" / "one.png").symlink_to(tmp_path / "store" / "cat" / "000.png")
    found = everything(tmp_path / "d")
    assert len(found) == 11 + 10 + 8 and (0, "more/007.png") in found and (0, "one.png") in found


def test_links_that_lead_nowhere_new_are_left_out(tmp_path):
    write_images(tmp_path / "d", {"cat": 5, "dog": 5})
    before = everything(tmp_path / "d")
    (tmp_path / "d" / "cat" / "itself").symlink_to(".")
    (tmp_path / "d" / "cat" / "up").symlink_to("../..")
    (tmp_path / "d" / "round").symlink_to(tmp_path)
    (tmp_path / "d" / "root").symlink_to("/")
    (tmp_path / "d" / "cat" / "gone.png").symlink_to("nowhere")
    assert everything(tmp_path / "d") == before
    assert list_folder(tmp_path / "d").left_out == "5 links"


def test_a_folder_met_twice_is_read_once_under_its_own_name(tmp_path):
    write_images(tmp_path / "cat", {"own": 5})
    write_images(tmp_path, {"dog": 5})
    before = everything(tmp_path)
    (tmp_path / "cat" / "a link").symlink_to(tmp_path / "cat" / "own")
    assert everything(tmp_path) == before and list_folder(tmp_path).left_out == "1 link"


# --------------------------------------------------------------------- folders that can't be read


@pytest.mark.parametrize(
    "root,message",
    [
        ("/proc", r"/proc holds the system's state"),
        ("/sys/kernel", r"holds the system's state"),
        ("a" * 5000, r"a{60}\.\.\. can't be a folder: File name too long"),
        ("x\0y", r"x\\x00y can't be a folder: embedded null byte"),
        ("nowhere", r"no folder nowhere; if it has moved, say where to: data\.root="),
    ],
)
def test_roots_that_can_hold_no_images_are_one_line(root, message):
    if root.startswith(("/proc", "/sys")) and not Path(root).is_dir():
        pytest.skip("not here")
    with pytest.raises(UserError, match=message) as error:
        list_folder(Path(root))
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


@pytest.mark.parametrize("inside", ["", "cat", "cat/deep"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, inside):
    write_images(tmp_path, CLASSES)
    write_images(tmp_path / "cat", {"deep": 2})
    scandir = os.scandir

    def refusing(folder):
        if Path(folder) == tmp_path / inside:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError) as error:
        list_folder(tmp_path)
    assert str(error.value) == f"{tmp_path / inside} can't be read: Permission denied"


# ------------------------------------------------------------------------------ names in any bytes


def test_names_in_any_bytes(tmp_path):
    for name in (b"caf\xe9", b"new\nline", "naïve".encode()):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        for number in range(4):
            Image.new("RGB", (4, 4)).save(Path(os.fsdecode(folder)) / f"{number}\udcff.png")
    folder = list_folder(tmp_path)
    assert folder.classes == ("caf\\xe9", "naïve", "new\\nline")
    assert len(folder.train) + len(folder.test) == 12


# ------------------------------------------------------------------------------- the test images


def test_adding_and_removing_files_moves_no_other(tmp_path):
    write_images(tmp_path, CLASSES)
    before = list_folder(tmp_path)
    train, test = files(before.train), files(before.test)
    shutil.copy(tmp_path / "cat" / "000.png", tmp_path / "cat" / "9999.png")
    for name in "017", "018", "029":
        (tmp_path / "dog" / f"{name}.png").unlink()
    after = list_folder(tmp_path)
    assert not files(after.test) & train and not files(after.train) & test
    assert files(after.train) | files(after.test) == (
        (train | test | {(0, "9999.png")}) - {(1, f"{n}.png") for n in ("017", "018", "029")}
    )


def test_moved_folders_and_renamed_classes_keep_their_test_images(tmp_path):
    write_images(tmp_path / "here", CLASSES)
    before = list_folder(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there" / "cat").rename(tmp_path / "there" / "zcat")
    after = list_folder(tmp_path / "there")
    assert after.classes == ("dog", "zcat")
    assert files(after.test) == {(1 - label, name) for label, name in files(before.test)}


def test_a_fifth_of_many_names_is_for_testing():
    labels = np.repeat([0, 1], 20_000)
    share = chosen_by_name([f"{n}.png" for n in range(40_000)], labels)
    for label in 0, 1:  # within four standard deviations of a binomial
        assert abs(share[labels == label].mean() - 0.2) < 4 * (0.16 / 20_000) ** 0.5


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_small_classes_have_an_image_on_each_side(size):
    for start in range(300):
        names = [f"{start}-{n}.jpg" for n in range(size)] * 2
        labels = np.repeat([0, 1], size)
        for label in 0, 1:
            chosen = chosen_by_name(names, labels)[labels == label]
            assert (chosen.any() and not chosen.all()) if size > 1 else not chosen.any()


def test_the_former_choice_is_still_there(tmp_path):
    """Runs without a record of their data go on with the test images they had."""
    write_images(tmp_path, CLASSES)
    paths = sorted(tmp_path.rglob("*.png"))
    order = generator(0, "folder order").permutation(90)
    labels = np.array([0] * 60 + [1] * 30)[order]
    test = stratified_subset(labels, 18, generator(0, "folder test"))
    folder = list_folder(tmp_path, split_by_number=True)
    assert folder.test.paths == [paths[i] for i in order[test]] and folder.split == "by number"
