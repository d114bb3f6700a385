"""The streamed split against the in-memory one, and what it holds on to."""

from __future__ import annotations

import os
import random
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bnexp.data import Augmentation, stream
from bnexp.data.images import decode
from bnexp.data.memory import InMemorySplit
from bnexp.data.pixels import Normalization
from bnexp.data.stream import ImageFiles, StreamedSplit
from bnexp.errors import RunFailed, UserError

CPU = torch.device("cpu")
SIZE = (8, 8)
AUGMENT = Augmentation(crop_padding=2, flip=True)
BLACK = np.zeros((*SIZE, 3), dtype=np.uint8)


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
        ImageFiles(paths, SIZE, resize=True, workers=workers),
        torch.arange(len(paths)),
        normalize,
        AUGMENT,
        seed,
        CPU,
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


def test_threads_end_with_their_batches(paths):
    before = set(threading.enumerate())
    batches = streamed(paths, 2).training_batches(5)
    next(batches)
    assert 0 < len(set(threading.enumerate()) - before) <= 2
    batches.close()
    assert set(threading.enumerate()) <= before


def test_batches_are_decoded_only_a_little_ahead(paths, monkeypatch):
    decoded = []
    monkeypatch.setattr(stream, "decode", lambda path, *_: decoded.append(path) or BLACK)
    batches = streamed(paths, 2).training_batches(5)
    for _ in range(10):
        next(batches)
    assert len(decoded) <= (10 + 2 * 2) * 5
    batches.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_batches_that_are_kept_hold_no_files_and_no_shared_memory(paths):
    def held() -> list[str]:
        maps = Path("/proc/self/maps").read_text()
        return [*os.listdir("/proc/self/fd"), *(line for line in maps if "/dev/shm" in line)]

    before = len(held())
    batches = list(islice(streamed(paths, 2).training_batches(2), 60))
    assert len(batches) == 60 and len(held()) <= before + 2


def test_a_system_without_threads_is_said_in_one_line(paths, monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(RunFailed, match=r"can't start new thread\); set data.workers to 0"):
        next(streamed(paths, 2).training_batches(5))


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
    assert str(error.value).startswith(f"{bad} can't be ")
    assert "\n" not in str(error.value)
