"""The user's data: folders of images, and what their own code gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bnexp.data.folder import list_folder
from bnexp.data.open import Preparation, classes_of, open_batches, transform_of
from bnexp.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.full((8, 12, 3), 40 * label + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_what_a_preparation_does_is_said_with_what_it_leaves_out():
    assert Preparation(resize=32, crop=28).words == (
        "shorter side 32 px, middle 28 px; values from 0 to 1, no mean or std taken off "
        "(data.mean, data.std)"
    )
    assert Preparation(mean=(0.5,), std=(0.25,)).words == "their own size; mean 0.5, std 0.25"


def test_a_folder_per_class(folder):
    preparation = Preparation(resize=4, crop=4, mean=[0.5, 0, 0], std=[0.5, 1, 1])
    opened = open_batches(
        str(folder), transform=preparation.transform(), classes=("ape", "cat", "dog"), batch_size=4
    )
    batches = list(opened.batches)
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 4, 4), (4, 3, 4, 4), (2, 3, 4, 4)]
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() != sorted(labels.tolist()) and set(labels.tolist()) == {1, 2}
    for x, y in zip(torch.cat([x for x, _ in batches]), labels, strict=True):
        value = x[1, 0, 0] * 255
        assert round(float(value)) // 40 == int(y) - 1
        assert torch.allclose(x[0], (x[1] - 0.5) / 0.5)
    assert torch.equal(torch.cat([y for _, y in opened.batches]), labels), "the order is fixed"
    assert classes_of(str(folder)) == ("cat", "dog")


@pytest.mark.parametrize("other", ["test", "Validation"])
def test_splits_are_no_classes(folder, other):
    for name, split in (("cat", "train"), ("dog", other)):
        (folder / name).rename(folder / split)
    with pytest.raises(UserError, match="no classes: name the one that is meant"):
        classes_of(str(folder))
    (folder / other).rename(folder / "apple")
    assert classes_of(str(folder)) == ("apple", "train")


def test_classes_that_are_shown_alike_are_refused(folder):
    """One was taken for the other."""
    (folder / "cat").rename(folder / "caf\udce9")
    (folder / "dog").rename(folder / r"caf\xe9")
    with pytest.raises(UserError, match=r"both shown as caf\\xe9; rename one"):
        classes_of(str(folder))
    with pytest.raises(UserError, match=r"both shown as caf\\xe9; rename one"):
        list_folder(folder)


def test_a_folder_without_labels_takes_every_image(folder):
    opened = open_batches(str(folder), transform=Preparation().transform(), batch_size=10)
    ((x, y),) = opened.batches
    assert len(x) == 10 and set(y.tolist()) == {-1}


def test_grey_images_where_there_is_one_mean(folder):
    opened = open_batches(
        str(folder), transform=Preparation(mean=[0.1], std=[0.2]).transform(), batch_size=10
    )
    assert next(iter(opened.batches))[0].shape == (10, 1, 8, 12)


@pytest.mark.slow
def test_transforms_of_the_libraries():
    image = Image.fromarray(np.zeros((300, 400, 3), np.uint8))
    for name, said in [
        ("torchvision/resnet18", "torchvision's resnet18 weights IMAGENET1K_V1"),
        ("torchvision/resnet50.IMAGENET1K_V2", "IMAGENET1K_V2"),
        ("timm/resnet10t", "timm's data config of resnet10t"),
    ]:
        transform, words = transform_of(name)
        assert said in words and transform(image).shape[0] == 3
    for name in ("torchvision/nothing", "timm/nothing", "resnet18"):
        with pytest.raises(UserError):
            transform_of(name)


def test_what_the_users_own_code_gives(tmp_path, monkeypatch):
    (tmp_path / "her_data.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "def dataset(n=10):\n"
        "    return TensorDataset(torch.arange(float(n)), torch.arange(n))\n"
        "loader = DataLoader(dataset(), batch_size=3)\n"
        "def dicts():\n    return [{'image': torch.ones(2, 3), 'label': torch.zeros(2).long()}]\n"
        "def generator():\n    yield torch.ones(2)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    opened = open_batches("her_data:dataset", arguments={"n": 6}, batch_size=4)
    batches = list(opened.batches)
    assert [len(x) for x, _ in batches] == [4, 2]
    assert sorted(torch.cat([x for x, _ in batches]).tolist()) == list(range(6))
    assert len(next(iter(open_batches("her_data:loader").batches))[0]) == 3
    assert "image" in next(iter(open_batches("her_data:dicts").batches))
    for name, said in [
        ("her_data:generator", "iterator, which ends after one pass"),
        ("her_data:number", "gave a int"),
        ("her_data:loder", "did you mean loader"),
        ("nowhere", "no folder nowhere"),
        (str(tmp_path), "how its images are prepared"),
    ]:
        with pytest.raises(UserError, match=said):
            open_batches(name)


def test_broken_images_are_named(folder):
    (folder / "cat" / "1.png").write_bytes(b"no image")
    opened = open_batches(str(folder), transform=Preparation().transform(), batch_size=10)
    with pytest.raises(UserError, match=r"1\.png can't be decoded"):
        list(opened.batches)


def test_folders_and_images_are_read_as_those_of_a_run(folder):
    """16 bits are scaled, hidden and empty folders are no classes, EXIF data turn an image."""
    values = np.full((8, 12), 65535, dtype=np.uint16)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(values).resize((8, 12)).save(folder / "dog" / "white.png", exif=exif)
    for name in (".hidden/x", "empty/deep", "__MACOSX/cat"):
        (folder / name).mkdir(parents=True)
    (folder / ".hidden" / "x" / "1.png").write_bytes(b"hidden")
    assert classes_of(str(folder)) == ("cat", "dog")
    for classes in (("cat", "dog"), None):
        opened = open_batches(
            str(folder), transform=Preparation().transform(), classes=classes, batch_size=20
        )
        ((x, _),) = opened.batches
        assert x.shape == (11, 3, 8, 12) and (x == 1).flatten(1).all(1).sum() == 1
