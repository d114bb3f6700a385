"""From a config to splits: the embedded digits, limits, validation, image folders."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from image_folders import write_images
from PIL import Image

from bnexp.data import DATA_SETS, Augmentation, DataSettings, image_folder, load_data
from bnexp.data.memory import InMemorySplit
from bnexp.data.stream import StreamedSplit
from bnexp.errors import UserError

CPU = torch.device("cpu")


def load(name="digits", seed=0, **keys):
    return load_data(DataSettings(name, **keys), seed=seed, device=CPU)


def pixels_of(data, split) -> np.ndarray:
    """The bytes behind a split's batches, (N, H, W, C)."""
    x = torch.cat([x for x, _ in split.batches(100)]).permute(0, 2, 3, 1).double().numpy()
    scaled = (x * np.array(data.info.std) + np.array(data.info.mean)) * 255
    rounded = scaled.round()
    np.testing.assert_allclose(scaled, rounded, atol=1e-3)
    return rounded.astype(int)


# ---------------------------------------------------------------------------------------- digits


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_binary_images_are_black_and_white_from_half_of_the_brightest_on(part):
    grey, binary = load(val_fraction=0.2), load(val_fraction=0.2, binary=True)
    before, after = pixels_of(grey, getattr(grey, part)), pixels_of(binary, getattr(binary, part))
    np.testing.assert_array_equal(after, np.where(before < 128, 0, 255))
    assert np.unique(after).tolist() == [0, 255]
    share = (pixels_of(binary, binary.train) == 255).mean()
    assert binary.info.mean == pytest.approx([share], rel=1e-6)
    assert binary.fingerprint["splits"][part] != grey.fingerprint["splits"][part]


def test_folders_are_not_made_binary():
    with pytest.raises(UserError, match=r"data\.binary"):
        load("image-folder", root=Path(), binary=True)


def test_digits_are_scikit_learns():
    data = load()
    assert (len(data.train), len(data.test), data.val) == (1297, 500, None)
    assert np.bincount(data.test.labels).tolist() == [50] * 10
    ours = sorted(
        (int(y), *image.ravel().tolist())
        for split in (data.train, data.test)
        for image, y in zip(pixels_of(data, split), split.labels, strict=True)
    )
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    theirs = sorted(
        (int(y), *(15 * image.astype(int)).tolist())
        for image, y in zip(images, labels, strict=True)
    )
    assert ours == theirs


def test_digits_info():
    info = load().info
    assert (info.name, info.channels, info.image_size) == ("digits", 1, (8, 8))
    assert info.classes == tuple("0123456789")
    data = load()
    x = torch.cat([x for x, _ in data.train.batches(100)]).double()
    assert abs(x.mean()) < 1e-6 and abs(x.std(unbiased=False) - 1) < 1e-6


def test_digits_are_small_and_come_with_source_and_licence():
    folder = resources.files("bnexp.data")
    assert len((folder / "digits.npz").read_bytes()) < 200_000
    text = (folder / "digits.txt").read_text()
    for part in ("UCI", "Alpaydin", "Kaynak", "1998", "CC BY 4.0"):
        assert part in text


def test_loading_digits_imports_neither_torchvision_nor_the_config():
    program = (
        "import sys, bnexp.data as d; d.load_data(d.DataSettings('digits'), seed=0, device='cpu');"
        "assert not [m for m in sys.modules if m in ('torchvision', 'bnexp.config')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ------------------------------------------------------------------------ choice of the images


def test_unknown_names():
    assert set(DATA_SETS) == {
        "digits",
        "mnist",
        "fashion-mnist",
        "kmnist",
        "cifar10",
        "cifar100",
        "svhn",
        "image-folder",
    }
    with pytest.raises(UserError, match=r"'fashion_mnits'; did you mean fashion-mnist"):
        load("fashion_mnits")
    with pytest.raises(UserError, match=r"'CIFAR-10'; did you mean cifar10"):
        load("CIFAR-10")
    with pytest.raises(UserError, match=r"'xxxx'; there are digits, .*image-folder"):
        load("xxxx")


def identities(data, split) -> set[tuple]:
    return {(*image.ravel().tolist(),) for image in pixels_of(data, split)}


def test_validation_images_are_stratified_and_taken_from_training():
    whole, data = load(), load(val_fraction=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (1038, 259, 500)
    shares = np.bincount(whole.train.labels) * 259 / 1297
    assert np.abs(np.bincount(data.val.labels) - shares).max() < 1
    everything = identities(whole, whole.train)
    train, val = identities(data, data.train), identities(data, data.val)
    assert train | val == everything and not train & val
    assert identities(data, data.test) == identities(whole, whole.test)


def test_the_seed_decides_validation_and_limited_training_but_not_the_test_images():
    keys = {"val_fraction": 0.2, "limit_train": 300, "limit_test": 100}
    a, same, other = load(**keys), load(**keys), load(seed=1, **keys)
    for split in "train", "val", "test":
        assert np.array_equal(
            pixels_of(a, getattr(a, split)), pixels_of(same, getattr(same, split))
        )
    assert identities(a, a.train) != identities(other, other.train)
    assert identities(a, a.val) != identities(other, other.val)
    assert np.array_equal(pixels_of(a, a.test), pixels_of(other, other.test))
    assert (len(a.train), len(a.val), len(a.test)) == (240, 60, 100)
    assert np.bincount(a.test.labels).tolist() == [10] * 10


def test_limits_beyond_the_data_change_nothing():
    data = load(limit_train=5000, limit_test=5000)
    assert (len(data.train), len(data.test)) == (1297, 500)


def test_normalization_uses_the_training_images_alone():
    data = load(val_fraction=0.5)
    scaled = pixels_of(data, data.train) / 255
    assert data.info.mean[0] == pytest.approx(scaled.mean(), rel=1e-9)
    assert data.info.std[0] == pytest.approx(scaled.std(), rel=1e-9)
    assert data.info.mean != load().info.mean


def test_a_validation_share_without_images_is_refused():
    with pytest.raises(UserError, match=r"val_fraction 0.01 of 20 images leaves none for valid"):
        load(val_fraction=0.01, limit_train=20)


def test_only_training_batches_are_augmented():
    data = load(val_fraction=0.1, augmentation=Augmentation(crop_padding=1))
    plain = identities(data, data.train)
    x = next(data.train.training_batches(64))[0].permute(0, 2, 3, 1).double().numpy()
    bytes_ = ((x * data.info.std[0] + data.info.mean[0]) * 255).round().astype(int)
    assert sum((*image.ravel().tolist(),) in plain for image in bytes_) < 32
    for split in data.val, data.test:
        pairs = zip(split.batches(50, augment=True), split.batches(50), strict=True)
        assert all(torch.equal(x1, x2) for (x1, _), (x2, _) in pairs)


def test_image_size_resizes():
    data = load(image_size=20)
    assert data.info.image_size == (20, 20)
    assert next(data.train.training_batches(4))[0].shape == (4, 1, 20, 20)


# ------------------------------------------------------------------------------- image folders

CLASSES = {"cat": 20, "dog": 10, "eel": 10}


def test_folder_with_test_folder(tmp_path):
    write_images(tmp_path / "train", CLASSES)
    write_images(tmp_path / "test", {"cat": 3, "eel": 2}, seed=1)
    data = load("image-folder", root=tmp_path, workers=0)
    assert isinstance(data.train, InMemorySplit)
    assert data.info.classes == ("cat", "dog", "eel") and data.info.image_size == (12, 10)
    assert (len(data.train), data.val, len(data.test)) == (40, None, 5)
    assert np.bincount(data.test.labels, minlength=3).tolist() == [3, 0, 2]
    assert identities(data, data.train) == {
        (*np.array(Image.open(path)).ravel().tolist(),)
        for path in (tmp_path / "train").rglob("*.png")
    }


def test_folder_with_val_folder_only_tests_on_it(tmp_path):
    write_images(tmp_path / "train", CLASSES)
    write_images(tmp_path / "val", {"cat": 3, "dog": 2}, seed=1)
    data = load("image-folder", root=tmp_path, workers=0, val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 5)


def test_folder_with_val_and_test_folders(tmp_path):
    for seed, (part, count) in enumerate({"train": 9, "val": 4, "test": 5}.items()):
        write_images(tmp_path / part, {"a": count, "b": count}, seed=seed)
    data = load("image-folder", root=tmp_path, workers=0)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 8, 10)
    with pytest.raises(UserError, match=r"has a folder of validation .* take data.val_fraction"):
        load("image-folder", root=tmp_path, workers=0, val_fraction=0.5)


def test_folder_without_test_folder_gets_a_test_set_whatever_the_seed(tmp_path):
    write_images(tmp_path, CLASSES)
    a, b = (load("image-folder", root=tmp_path, workers=0, seed=seed) for seed in (0, 1))
    assert len(a.train) + len(a.test) == 40 and set(a.test.labels.tolist()) == {0, 1, 2}
    assert np.array_equal(pixels_of(a, a.test), pixels_of(b, b.test))
    assert not identities(a, a.train) & identities(a, a.test)


def test_batches_of_a_folder_mix_the_classes(tmp_path):
    write_images(tmp_path, {"a": 40, "b": 40})
    data = load("image-folder", root=tmp_path, workers=0)
    for split in data.train, data.test:
        _, y = next(split.batches(10))
        assert 0 < y.sum() < 10


def test_a_large_folder_streams_with_the_same_batches(tmp_path, monkeypatch):
    write_images(tmp_path, CLASSES)
    keys = {
        "root": tmp_path,
        "workers": 1,
        "image_size": 8,
        "augmentation": Augmentation(flip=True),
    }
    held = load("image-folder", **keys)
    monkeypatch.setattr(image_folder, "IN_MEMORY_BYTES", 40 * 8 * 8 * 3 - 1)
    flowing = load("image-folder", **keys)
    assert isinstance(held.train, InMemorySplit) and isinstance(flowing.train, StreamedSplit)
    assert held.info == flowing.info
    for a, b in [
        (islice(held.train.training_batches(8), 6), islice(flowing.train.training_batches(8), 6)),
        (held.test.batches(8), flowing.test.batches(8)),
    ]:
        assert all(
            torch.equal(x1, x2) and torch.equal(y1, y2)
            for (x1, y1), (x2, y2) in zip(a, b, strict=True)
        )


def test_statistics_of_a_large_folder_come_from_a_part_of_it(tmp_path, monkeypatch):
    write_images(tmp_path, CLASSES)
    monkeypatch.setattr(image_folder, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(image_folder, "STATISTICS_IMAGES", 7)
    data = load("image-folder", root=tmp_path, workers=0)
    pixels = pixels_of(data, data.train)[:7] / 255
    np.testing.assert_allclose(data.info.mean, pixels.mean((0, 1, 2)), rtol=1e-9)


def damaged_folders(tmp_path):
    return {
        "no root": (None, r"needs data\.root"),
        "no such folder": (tmp_path / "nowhere", r"there is no folder .*nowhere"),
        "no classes": (tmp_path, r"needs a folder of images per class; it has 0"),
        "no test": (tmp_path, r"has train/ but neither test/ nor val/"),
        "no images": (tmp_path, r"per class; it has 0 with images \(\.apng, "),
        "unknown class": (tmp_path, r"test/yak is a class that the training images don't have"),
        "corrupt": (tmp_path, r"002\.png can't be decoded"),
        "odd size": (tmp_path, r"pixels and the first image has .*set data\.image_size"),
    }


@pytest.mark.parametrize("fault", list(damaged_folders(Path())))
def test_bad_folders_are_refused_in_one_line(tmp_path, fault):
    root, message = damaged_folders(tmp_path)[fault]
    if fault == "no test":
        write_images(tmp_path / "train", CLASSES)
    elif fault == "no images":
        write_images(tmp_path, {"a": 0, "b": 0})
    elif fault == "unknown class":
        write_images(tmp_path / "train", CLASSES)
        write_images(tmp_path / "test", {"cat": 1, "yak": 1})
    elif fault == "corrupt":
        write_images(tmp_path, CLASSES)
        path = tmp_path / "dog" / "002.png"
        path.write_bytes(path.read_bytes()[:100])
    elif fault == "odd size":
        write_images(tmp_path, CLASSES)
        write_images(tmp_path, {"fox": 1}, size=(9, 9))
    with pytest.raises(UserError, match=message) as error:
        load("image-folder", root=root, workers=0)
    assert "\n" not in str(error.value)


def test_too_few_images_for_a_test_set(tmp_path):
    write_images(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(UserError, match="too few to set a fifth apart"):
        load("image-folder", root=tmp_path)
