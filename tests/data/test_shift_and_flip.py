"""Batched crop and flip against torchvision's transforms, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from bnexp.data import Augmentation
from bnexp.data.augmentation import shift_and_flip
from bnexp.data.sampling import draw_augmentation


def random_images(batch: int, height: int, width: int, channels: int) -> torch.Tensor:
    rng = np.random.default_rng(5)
    shape = (batch, height, width, channels)
    return torch.from_numpy(rng.integers(1, 256, shape, dtype=np.uint8))


def torchvision_one_by_one(images, draws, padding):
    height, width = images.shape[1:3]
    expected = []
    for image, (row, column, mirrored) in zip(images, draws.tolist(), strict=True):
        chw = TF.pad(image.permute(2, 0, 1), [padding] * 4)
        chw = TF.crop(chw, row, column, height, width)
        chw = TF.hflip(chw) if mirrored else chw
        expected.append(chw.permute(1, 2, 0))
    return torch.stack(expected)


@pytest.mark.parametrize("shape", [(40, 8, 8, 1), (40, 7, 11, 3), (1, 1, 1, 3)])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_equals_torchvision_given_the_same_draws(shape, padding, flip):
    images = random_images(*shape)
    augment = Augmentation(crop_padding=padding, flip=flip)
    draws = draw_augmentation(shape[0], augment, np.random.default_rng(1))
    if draws is None:
        assert padding == 0 and not flip
        return
    before = images.clone()
    result = shift_and_flip(images, draws, padding)
    assert torch.equal(result, torchvision_one_by_one(images, draws, padding))
    assert torch.equal(images, before)


def test_extreme_corners():
    images = random_images(4, 5, 6, 3)
    draws = torch.tensor([[0, 0, 0], [6, 6, 0], [0, 6, 1], [6, 0, 1]])
    result = shift_and_flip(images, draws, 3)
    assert torch.equal(result, torchvision_one_by_one(images, draws, 3))
    assert (result[0, :3] == 0).all() and (result[0, 3:, 3:] == images[0, :2, :3]).all()


def test_draws_cover_every_offset_evenly_and_flip_half():
    draws = draw_augmentation(
        90_000, Augmentation(crop_padding=1, flip=True), np.random.default_rng(0)
    )
    cells = torch.zeros(3, 3, 2, dtype=torch.int64)
    cells.index_put_(tuple(draws.T), torch.ones(len(draws), dtype=torch.int64), accumulate=True)
    # 18 cells of 5 000 expected; 6 standard deviations of a binomial count are about 412
    assert (cells - 5000).abs().max() < 412


def test_draws_leave_out_what_is_switched_off():
    flips_only = draw_augmentation(500, Augmentation(flip=True), np.random.default_rng(0))
    assert flips_only[:, :2].max() == 0 and set(flips_only[:, 2].tolist()) == {0, 1}
    shifts_only = draw_augmentation(500, Augmentation(crop_padding=2), np.random.default_rng(0))
    assert shifts_only[:, 2].max() == 0 and shifts_only[:, :2].max() == 4
