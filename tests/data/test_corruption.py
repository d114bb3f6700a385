"""Corrupted test images against torchvision's transforms."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from bnexp.config.schema import CorruptionConfig
from bnexp.data import DataSettings, corruption, load_data
from bnexp.data.corruption import SEVERITIES, Corruption
from bnexp.data.sampling import generator

NAMES = tuple(SEVERITIES)


def images(count=6, size=(12, 9), channels=3):
    smooth = torch.rand((count, channels, 4, 3), generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(smooth, size, mode="bilinear")
    return (large * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", range(1, 6))
def test_they_are_torchvision_s(severity, channels):
    given = images(channels=channels)
    planes = given.permute(0, 3, 1, 2).contiguous()

    def made(name):
        return Corruption(name, severity).apply(given, range(6)).permute(0, 3, 1, 2)

    level = severity - 1
    sigma = SEVERITIES["gaussian-blur"][level]
    radius = [min(int(np.ceil(3 * sigma)), side - 1) for side in (9, 12)]
    blurred = functional.gaussian_blur(planes, [2 * r + 1 for r in radius], [sigma] * 2)
    assert torch.equal(made("gaussian-blur"), blurred)
    for name, function in (
        ("brightness", functional.adjust_brightness),
        ("contrast", functional.adjust_contrast),
    ):
        assert torch.equal(made(name), function(planes, SEVERITIES[name][level]))
    quality = int(SEVERITIES["jpeg"][level])
    assert torch.equal(made("jpeg"), torch.stack([functional.jpeg(p, quality) for p in planes]))
    for number, (plane, noisy) in enumerate(zip(planes, made("gaussian-noise"), strict=True)):
        with torch.random.fork_rng():
            torch.manual_seed(int(generator(0, "corruption", number).integers(2**63)))
            expected = functional.gaussian_noise(
                plane / 255, 0.0, SEVERITIES["gaussian-noise"][level]
            )
        assert torch.equal(noisy, (expected * 255).round().to(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_worse_with_severity_and_a_function_of_image_and_number(name):
    given = images()
    state = torch.get_rng_state()
    errors = [
        (Corruption(name, s).apply(given, range(6)).float() - given).abs().mean().item()
        for s in range(1, 6)
    ]
    assert errors == sorted(errors) and 0 < errors[0] < errors[-1]
    some = Corruption(name, 3).apply(given[[4, 1]], [4, 1])
    assert torch.equal(some, Corruption(name, 3).apply(given, range(6))[[4, 1]])
    assert torch.equal(state, torch.get_rng_state())


def test_the_config_has_the_same_names():
    assert typing.get_args(CorruptionConfig.model_fields["name"].annotation) == NAMES
    assert typing.get_args(corruption.Name) == NAMES


def pixels(split) -> torch.Tensor:
    return torch.cat([x for x, _ in split.batches(100)])


@pytest.mark.parametrize("name", NAMES)
def test_test_images_alone_and_each_by_itself(name):
    plain = load_data(DataSettings("digits"), seed=0, device="cpu")
    worse = DataSettings("digits", corruption=Corruption(name, 5))
    data = load_data(worse, seed=1, device="cpu")
    assert torch.equal(pixels(data.train), pixels(plain.train))
    assert not torch.equal(pixels(data.test), pixels(plain.test))
    assert data.fingerprint == plain.fingerprint and data.info == plain.info
    few = load_data(
        DataSettings("digits", corruption=Corruption(name, 5), limit_test=40), seed=0, device="cpu"
    )
    some, everything = pixels(few.test).flatten(1), pixels(data.test).flatten(1)
    assert all((everything == row).all(1).any() for row in some)


@pytest.mark.parametrize("streamed", [False, True])
def test_of_a_folder(tmp_path, monkeypatch, streamed):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for number in range(6):
            folder = tmp_path / part / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                folder / f"{number}.png"
            )
    if streamed:
        monkeypatch.setattr("bnexp.data.image_folder.IN_MEMORY_BYTES", 0)
    plain, worse = (
        load_data(DataSettings("image-folder", root=tmp_path, corruption=c), seed=0, device="cpu")
        for c in (None, Corruption("gaussian-noise", 2))
    )
    assert torch.equal(pixels(plain.train), pixels(worse.train))
    assert not torch.equal(pixels(plain.test), pixels(worse.test))
    assert torch.equal(pixels(worse.test), pixels(worse.test))
    assert plain.fingerprint == worse.fingerprint
