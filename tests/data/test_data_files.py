"""Files of the published data sets: found, read like torchvision reads them, damage named."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import socket
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision

from bnexp.data import files
from bnexp.errors import UserError

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(
    not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path):
    """An empty working directory, no Debian folder, and no network."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("BNEXP_DATA", raising=False)
    monkeypatch.setattr(files, "DEBIAN_FOLDER", tmp_path / "debian")

    def no_network(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_like(seed: int = 0, train: int = 30, test: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "train-images-idx3": rng.integers(0, 256, (train, 28, 28), dtype=np.uint8),
        "train-labels-idx1": rng.integers(0, 10, train, dtype=np.uint8),
        "t10k-images-idx3": rng.integers(0, 256, (test, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1": rng.integers(0, 10, test, dtype=np.uint8),
    }


def write_idx(folder: Path, arrays=None, joint="-", compress=True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (arrays or mnist_like()).items():
        stem, kind = name.rsplit("-", 1)
        path = folder / f"{stem}{joint}{kind}-ubyte{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    return folder


def assert_same(arrays: files.Arrays, expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(arrays.train_images[..., 0], expected["train-images-idx3"])
    np.testing.assert_array_equal(arrays.train_labels, expected["train-labels-idx1"])
    np.testing.assert_array_equal(arrays.test_images[..., 0], expected["t10k-images-idx3"])
    np.testing.assert_array_equal(arrays.test_labels, expected["t10k-labels-idx1"])


@pytest.mark.parametrize("data_set", [files.MNIST, files.FASHION_MNIST, files.KMNIST])
def test_reads_what_torchvision_reads(tmp_path, data_set):
    write_idx(tmp_path / data_set.torchvision_name / "raw", compress=False)
    ours = files.load_idx(data_set, tmp_path)
    for train in True, False:
        theirs = getattr(torchvision.datasets, data_set.torchvision_name)(tmp_path, train=train)
        images = ours.train_images if train else ours.test_images
        labels = ours.train_labels if train else ours.test_labels
        np.testing.assert_array_equal(images[..., 0], theirs.data.numpy())
        np.testing.assert_array_equal(labels, theirs.targets.numpy())
    assert [c[0] for c in ours.classes] == [c[0] for c in theirs.classes]
    assert images.shape == (20, 28, 28, 1) and images.dtype == np.uint8


@pytest.mark.parametrize(
    "place", ["", "raw", "FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "fashion_mnist/raw"]
)
@pytest.mark.parametrize("joint,compress", [("-", True), ("-", False), (".", True), (".", False)])
def test_layouts(tmp_path, place, joint, compress):
    write_idx(tmp_path / "root" / place, joint=joint, compress=compress)
    assert_same(files.load_idx(files.FASHION_MNIST, tmp_path / "root"), mnist_like())


def test_order_of_search(tmp_path, monkeypatch):
    places = [
        tmp_path / "root",
        tmp_path / "environment",
        Path("data"),
        tmp_path / "debian" / "fashion-mnist",
    ]
    monkeypatch.setenv("BNEXP_DATA", str(tmp_path / "environment"))
    for seed, place in enumerate(places):
        write_idx(place, mnist_like(seed))
    for seed, place in enumerate(places):
        assert_same(files.load_idx(files.FASHION_MNIST, tmp_path / "root"), mnist_like(seed))
        shutil.rmtree(place)
    with pytest.raises(UserError, match="fashion-mnist is not in"):
        files.load_idx(files.FASHION_MNIST, tmp_path / "root")


def test_offline_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BNEXP_DATA", str(tmp_path / "environment"))
    write_idx(tmp_path / "environment")
    (tmp_path / "environment" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError) as error:
        files.load_idx(files.FASHION_MNIST, tmp_path / "root")
    message = str(error.value)
    assert "\n" not in message
    for part in (
        f"{tmp_path / 'root'}, {tmp_path / 'environment'}, data, {tmp_path / 'debian'}",
        f"{tmp_path / 'environment'} lacks t10k-labels-idx1-ubyte.gz",
        "Name or service not known",
        "dataset-fashion-mnist",
        f"{tmp_path / 'root' / 'FashionMNIST' / 'raw'}",
    ):
        assert part in message
    assert not (tmp_path / "root").exists()
    output = capsys.readouterr()
    assert output.out == "" and "downloading into" in output.err
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["mnist", "kmnist", "cifar10", "cifar100", "svhn"])
def test_every_set_has_an_offline_message(name):
    from bnexp.data.catalogue import _ARRAYS

    with pytest.raises(UserError, match=rf"^{name} is not in data, .*not known.*root") as error:
        _ARRAYS[name](None)
    assert "\n" not in str(error.value)
    assert not Path("data").exists()


def damage_truncated_gz(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flipped_gz(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 255
    path.write_bytes(contents)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_not_gz(path: Path) -> None:
    path.write_bytes(b"<html>404 not found</html>")


def damage_short_contents(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def damage_header_only(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:6]))


def damage_wrong_type(path: Path) -> None:
    contents = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(b"\0\0\x0d" + contents[3:]))


def damage_trailing_bytes(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\0"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated_gz,
        damage_flipped_gz,
        damage_empty,
        damage_not_gz,
        damage_short_contents,
        damage_header_only,
        damage_wrong_type,
        damage_trailing_bytes,
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = write_idx(tmp_path) / f"{name}-ubyte.gz"
    if name.endswith("idx1") and damage is damage_truncated_gz:
        path.write_bytes(path.read_bytes()[:-9])
    else:
        damage(path)
    with pytest.raises(UserError) as error:
        files.load_idx(files.MNIST, tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "delete it to have it downloaded again" in str(error.value)


def test_a_truncated_plain_file_is_named(tmp_path):
    path = write_idx(tmp_path, compress=False) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte is truncated or corrupt: 23535"):
        files.load_idx(files.MNIST, tmp_path)


def test_images_and_labels_must_be_as_many(tmp_path):
    arrays = mnist_like()
    write_idx(tmp_path, {**arrays, "t10k-labels-idx1": arrays["t10k-labels-idx1"][:-1]})
    with pytest.raises(UserError, match=r"holds 20 images and .*t10k-labels.* 19 labels"):
        files.load_idx(files.MNIST, tmp_path)


@pytest.mark.parametrize("size", [(14, 14), (0, 28)])
def test_images_of_both_splits_must_have_the_same_size(tmp_path, size):
    arrays = mnist_like()
    arrays["t10k-images-idx3"] = np.zeros((20, *size), dtype=np.uint8)
    write_idx(tmp_path, arrays)
    with pytest.raises(UserError, match=f"images of 28x28 and {size[0]}x{size[1]} pixels"):
        files.load_idx(files.MNIST, tmp_path)


def test_labels_must_be_classes(tmp_path):
    arrays = mnist_like()
    arrays["train-labels-idx1"][3] = 10
    with pytest.raises(UserError, match=r"train-labels.* should hold labels 0 to 9"):
        files.load_idx(files.MNIST, write_idx(tmp_path, arrays))


def test_wrong_contents_of_the_published_size_are_corrupt(tmp_path):
    write_idx(tmp_path, mnist_like(train=60_000, test=10_000), compress=False)
    with pytest.raises(UserError, match=r"-ubyte is corrupt: .*md5 .*not a25bea73"):
        files.load_idx(files.MNIST, tmp_path)


@needs_fashion
@pytest.mark.parametrize(("source", "target"), [("train", "t10k"), ("t10k", "train")])
def test_one_split_under_the_names_of_the_other_is_found(tmp_path, source, target):
    """Whole and consistent files: training on test images, or testing on those of training."""
    for path in DEBIAN_FASHION.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for kind in "images-idx3", "labels-idx1":
        moved = tmp_path / f"{target}-{kind}-ubyte.gz"
        moved.unlink()
        moved.symlink_to(DEBIAN_FASHION / f"{source}-{kind}-ubyte.gz")
    with pytest.raises(UserError, match=rf"{target}-.* holds fashion-mnist's .* instead of its"):
        files.load_idx(files.FASHION_MNIST, tmp_path)


@needs_fashion
def test_fashion_mnist_is_not_taken_for_mnist(tmp_path, monkeypatch):
    """Both use the same file names. The search goes on, and says what it passed by."""
    monkeypatch.setenv("BNEXP_DATA", str(DEBIAN_FASHION))
    with pytest.raises(UserError, match=r"mnist is not in .*labels.* belongs to fashion-mnist"):
        files.load_idx(files.MNIST, tmp_path)
    write_idx(Path("data") / "MNIST" / "raw")
    assert_same(files.load_idx(files.MNIST, tmp_path), mnist_like())


@needs_fashion
def test_a_flipped_bit_in_fashion_mnist_is_found(tmp_path):
    for path in DEBIAN_FASHION.iterdir():
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    path = tmp_path / "t10k-images-idx3-ubyte"
    contents = bytearray(path.read_bytes())
    contents[5_000_000] ^= 1
    path.write_bytes(contents)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte is corrupt"):
        files.load_idx(files.FASHION_MNIST, tmp_path)


@needs_fashion
def test_debians_fashion_mnist(monkeypatch):
    monkeypatch.setattr(files, "DEBIAN_FOLDER", DEBIAN_FASHION.parent)
    arrays = files.load_idx(files.FASHION_MNIST, None)
    assert arrays.train_images.shape == (60_000, 28, 28, 1)
    assert np.bincount(arrays.train_labels).tolist() == [6000] * 10
    assert np.bincount(arrays.test_labels).tolist() == [1000] * 10


def test_a_download_by_torchvision_is_read(tmp_path, monkeypatch, capsys):
    """The transfer itself is replaced; torchvision's checks and unpacking are not."""
    source = write_idx(tmp_path / "server")
    digests = [
        (f"{name}-ubyte.gz", hashlib.md5((source / f"{name}-ubyte.gz").read_bytes()).hexdigest())
        for name in NAMES
    ]
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", digests)
    utilities = torchvision.datasets.utils
    monkeypatch.setattr(utilities, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(
        utilities,
        "_urlretrieve",
        lambda url, target, *rest: shutil.copy(source / url.rsplit("/", 1)[1], target),
    )
    assert_same(files.load_idx(files.KMNIST, tmp_path / "root"), mnist_like())
    assert (tmp_path / "root" / "KMNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").is_file()
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------- CIFAR and SVHN


def write_cifar10(folder: Path, monkeypatch) -> tuple[dict, Path]:
    """A tiny CIFAR-10 in the published format, with torchvision expecting its checksums."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    kind, images, labels = torchvision.datasets.CIFAR10, {}, {}

    def dump(name: str, contents: dict) -> str:
        (base / name).write_bytes(pickle.dumps(contents))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def dump_batch(name: str) -> list[str]:
        images[name] = rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        labels[name] = rng.integers(0, 10, 4).tolist()
        return [name, dump(name, {"data": images[name].reshape(4, -1), "labels": labels[name]})]

    train = [dump_batch(f"data_batch_{i}") for i in range(1, 6)]
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [dump_batch("test_batch")])
    meta = dump("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta})
    expected = {
        "train_images": np.concatenate([images[name] for name, _ in train]).transpose(0, 2, 3, 1),
        "train_labels": [label for name, _ in train for label in labels[name]],
        "test_images": images["test_batch"].transpose(0, 2, 3, 1),
        "test_labels": labels["test_batch"],
    }
    return expected, base


@pytest.mark.parametrize("place", ["", "cifar10"])
@pytest.mark.parametrize("form", ["folder", "archive", "root is the folder"])
def test_cifar10(tmp_path, monkeypatch, place, form):
    expected, base = write_cifar10(tmp_path / "root" / place, monkeypatch)
    root = tmp_path / "root"
    if form == "archive":
        archive = base.with_name("cifar-10-python.tar.gz")
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(base, base.name)
        shutil.rmtree(base)
        digest = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", digest)
    elif form == "root is the folder":
        root = base
    arrays = files.load_cifar("cifar10", root)
    for name, array in expected.items():
        np.testing.assert_array_equal(getattr(arrays, name), array)
    assert arrays.classes == tuple("abcdefghij") and arrays.train_labels.dtype == np.int64


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_cifar_file_is_named_and_not_unpickled(tmp_path, monkeypatch, name):
    _, base = write_cifar10(tmp_path, monkeypatch)

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (base / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=rf"{name} is truncated or corrupt"):
        files.load_cifar("cifar10", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_truncated_archive_is_named(tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"cifar-100-python.tar.gz is truncated or corrupt"):
        files.load_cifar("cifar100", tmp_path)


def test_svhn(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    written, listed = {}, {}
    (tmp_path / "svhn").mkdir()
    for split, count in ("train", 6), ("test", 4):
        path = tmp_path / "svhn" / f"{split}_32x32.mat"
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = rng.integers(1, 11, (count, 1), dtype=np.uint8)
        scipy.io.savemat(path, {"X": images, "y": labels})
        written[split] = images.transpose(3, 0, 1, 2), labels[:, 0] % 10
        listed[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    arrays = files.load_svhn(tmp_path)
    for split in "train", "test":
        np.testing.assert_array_equal(getattr(arrays, f"{split}_images"), written[split][0])
        np.testing.assert_array_equal(getattr(arrays, f"{split}_labels"), written[split][1])
    path = tmp_path / "svhn" / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"test_32x32.mat is truncated or corrupt"):
        files.load_svhn(tmp_path)


@pytest.mark.parametrize("failure", ["timeout", "checksum"])
def test_a_failing_download_is_one_line(tmp_path, monkeypatch, failure):
    utilities = torchvision.datasets.utils
    if failure == "timeout":

        def retrieve(*args):
            raise TimeoutError("timed out")

        reason = "timed out"
    else:

        def retrieve(url, target, *rest):
            Path(target).write_bytes(b"half of i")

        reason = "File not found or corrupted"
    monkeypatch.setattr(utilities, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(utilities, "_urlretrieve", retrieve)
    for load in (
        lambda: files.load_idx(files.MNIST, tmp_path),
        lambda: files.load_svhn(tmp_path),
    ):
        with pytest.raises(UserError, match=reason) as error:
            load()
        assert "\n" not in str(error.value)
