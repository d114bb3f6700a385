"""The streamed split against the in-memory one, and decoding against torchvision's transforms."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from bnexp.data import Augmentation
from bnexp.data.memory import InMemorySplit
from bnexp.data.pixels import Normalization
from bnexp.data.stream import ImageFiles, StreamedSplit, decode
from bnexp.errors import UserError

CPU = torch.device("cpu")
SIZE = (8, 8)
AUGMENT = Augmentation(crop_padding=2, flip=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(23)]
    for path in paths:
        pixels = rng.integers(0, 256, (*rng.integers(6, 20, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def streamed(paths: list[Path], workers: int = 0, seed: int = 5) -> StreamedSplit:
    normalize = Normalization((0.4,) * 3, (0.2,) * 3, SIZE, SIZE, CPU)
    return StreamedSplit(
        ImageFiles(paths, SIZE, resize=True),
        torch.arange(len(paths)),
        normalize,
        AUGMENT,
        seed,
        CPU,
        workers,
    )


def in_memory(paths: list[Path], seed: int = 5) -> InMemorySplit:
    normalize = Normalization((0.4,) * 3, (0.2,) * 3, SIZE, SIZE, CPU)
    images = torch.from_numpy(np.stack([decode(path, SIZE, resize=True) for path in paths]))
    return InMemorySplit(images, torch.arange(len(paths)), normalize, AUGMENT, seed, CPU)


def assert_equal_batches(a, b) -> None:
    pairs = list(zip(a, b, strict=True))
    assert pairs
    for (x1, y1), (x2, y2) in pairs:
        assert torch.equal(x1, x2) and torch.equal(y1, y2)
        assert x1.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_batches_are_those_of_the_same_images_in_memory(paths, workers):
    assert_equal_batches(
        islice(streamed(paths, workers).training_batches(5), 11),
        islice(in_memory(paths).training_batches(5), 11),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_batches_of_the_uninterrupted_run(paths, workers):
    assert_equal_batches(
        islice(streamed(paths, workers).training_batches(5, start_step=6), 7),
        islice(in_memory(paths).training_batches(5), 6, 13),
    )


@pytest.mark.parametrize("arguments", [{}, {"samples": 12}, {"samples": 12, "augment": True}])
def test_inference_batches_are_those_of_the_same_images_in_memory(paths, arguments):
    assert_equal_batches(
        streamed(paths, 1).batches(5, **arguments), in_memory(paths).batches(5, **arguments)
    )


def test_global_random_state_is_untouched(paths):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(islice(streamed(paths, 1).training_batches(5), 3))
    list(streamed(paths, 0).batches(5))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_workers_outlive_a_ctrl_c_and_end_with_their_batches(paths):
    others = set(multiprocessing.active_children())
    batches = streamed(paths, 2).training_batches(5)
    for _ in range(2):  # one batch from each worker: both are up
        next(batches)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    assert_equal_batches(islice(batches, 12), islice(in_memory(paths).training_batches(5), 2, 14))
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (150, 37), (8, 8), (5, 4), (8, 300)])
@pytest.mark.parametrize("side", [8, 13])
def test_decoding_is_torchvisions_resize_and_center_crop(tmp_path, size, side):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    theirs = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    ours = decode(tmp_path / "image.png", (side, side), resize=True)
    np.testing.assert_array_equal(ours, np.array(theirs(Image.fromarray(pixels))))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    Image.fromarray(np.full((4, 4, 3), 255, dtype=np.uint8)).convert(mode).save(tmp_path / "i.png")
    decoded = decode(tmp_path / "i.png", (4, 4), resize=False)
    assert decoded.shape == (4, 4, 3) and decoded.dtype == np.uint8 and (decoded == 255).all()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "not an image", "missing"])
def test_a_damaged_image_is_named(paths, tmp_path, workers, damage):
    bad = tmp_path / "bad.png"
    if damage == "truncated":
        bad.write_bytes(paths[0].read_bytes()[:-60])
    elif damage == "not an image":
        bad.write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        list(streamed([*paths[:6], bad], workers).batches(4))
    assert str(error.value).startswith(f"{bad} can't be decoded")
    assert "\n" not in str(error.value)


def test_without_resizing_all_images_must_have_one_size(tmp_path):
    Image.new("RGB", (7, 9)).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"odd.png has 7x9 pixels .* 8x8; set data.image_size"):
        decode(tmp_path / "odd.png", (8, 8), resize=False)
