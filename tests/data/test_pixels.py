"""From bytes to normalized input, against float64 NumPy and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from bnexp.data.pixels import Normalization, pixel_mean_and_std

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(5000, 4, 3, 1), (300, 6, 5, 3)])
def test_mean_and_std_are_those_of_float64_numpy(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mean, std = pixel_mean_and_std(torch.from_numpy(pixels))
    scaled = pixels.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(std, scaled.std((0, 1, 2)), rtol=1e-12)


def test_mean_and_std_do_not_depend_on_the_order_of_images():
    pixels = torch.randint(0, 256, (999, 4, 4, 3), dtype=torch.uint8)
    assert pixel_mean_and_std(pixels) == pixel_mean_and_std(pixels.flip(0))


def test_small_scatter_on_a_large_mean_is_exact():
    pixels = torch.full((1000, 10, 10, 1), 255, dtype=torch.uint8)
    pixels[0, 0, 0] = 254
    _, (std,) = pixel_mean_and_std(pixels)
    n = 100_000
    assert std == pytest.approx(((1 / n) * (1 - 1 / n)) ** 0.5 / 255, rel=1e-12)


def test_a_constant_channel_becomes_zero():
    pixels = torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    pixels[..., 1] = 77
    pixels[0, 0, 0, 0] = 9
    mean, std = pixel_mean_and_std(pixels)
    assert std[1] == std[2] == 1.0
    x = Normalization(mean, std, (2, 2), (2, 2), CPU)(pixels)
    assert x[:, 1:].abs().max() < 1e-6 and x[:, 0].abs().max() > 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_normalization_equals_torchvisions(channels):
    pixels = torch.randint(0, 256, (16, 9, 7, channels), dtype=torch.uint8)
    mean, std = (0.3, 0.5, 0.1)[:channels], (0.2, 0.31, 0.05)[:channels]
    before = pixels.clone()
    x = Normalization(mean, std, (9, 7), (9, 7), CPU)(pixels)
    expected = TF.normalize(pixels.permute(0, 3, 1, 2).double() / 255, mean, std)
    assert x.dtype == torch.float32 and x.shape == (16, channels, 9, 7)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("size", [(20, 20), (5, 5)])
def test_resizing_is_torchvisions(size):
    pixels = torch.randint(0, 256, (3, 12, 10, 3), dtype=torch.uint8)
    mean, std = (0.3, 0.5, 0.1), (0.2, 0.31, 0.05)
    x = Normalization(mean, std, (12, 10), size, CPU)(pixels)
    resized = TF.resize(pixels.permute(0, 3, 1, 2).double() / 255, list(size), antialias=True)
    torch.testing.assert_close(x.double(), TF.normalize(resized, mean, std), rtol=1e-5, atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)
