"""The in-memory split against plain indexing of the same arrays."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch

from bnexp.data import Augmentation
from bnexp.data.memory import InMemorySplit
from bnexp.data.pixels import Normalization

CPU = torch.device("cpu")
IDENTITY = ((0.0,) * 3, (1 / 255,) * 3)  # normalization that gives back the pixel values


def numbered_split(count=53, size=(4, 6), augment=None, seed=3) -> InMemorySplit:
    """Image i is i everywhere, but for a column that tells left from right; label i is i."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, *size, 3)
    images[:, :, 0] = 255
    normalize = Normalization(*IDENTITY, size, size, CPU)
    return InMemorySplit(
        images, torch.arange(count), normalize, augment or Augmentation(), seed, CPU
    )


def equal_batches(a, b) -> bool:
    pairs = list(zip(a, b, strict=True))
    assert pairs
    return all(torch.equal(x1, x2) and torch.equal(y1, y2) for (x1, y1), (x2, y2) in pairs)


def test_images_and_labels_stay_together():
    split = numbered_split()
    for x, y in [*islice(split.training_batches(10), 12), *split.batches(10, samples=30)]:
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(x[:, :, :, 1:], y.view(-1, 1, 1, 1).float(), atol=1e-3)


def test_an_epoch_is_a_permutation_without_the_remainder():
    split = numbered_split()
    assert len(split) == 53 and split.steps_per_epoch(10) == 5
    seen = torch.cat([y for _, y in islice(split.training_batches(10), 5)])
    assert len(set(seen.tolist())) == 50 and seen.tolist() != sorted(seen.tolist())


def test_inference_in_order_with_a_short_last_batch():
    labels = [y.tolist() for _, y in numbered_split().batches(20)]
    assert labels == [list(range(20)), list(range(20, 40)), list(range(40, 53))]


def test_samples_are_the_beginning_of_one_fixed_shuffle():
    split = numbered_split()
    few = torch.cat([y for _, y in split.batches(7, samples=25)]).tolist()
    all_of_them = torch.cat([y for _, y in split.batches(11, samples=1000)]).tolist()
    assert len(few) == 25 and all_of_them[:25] == few
    assert sorted(all_of_them) == list(range(53)) != all_of_them


@pytest.mark.parametrize("start", [0, 3, 5, 17])
def test_resuming_gives_the_batches_of_the_uninterrupted_run(start):
    augment = Augmentation(crop_padding=2, flip=True)
    whole = islice(numbered_split(augment=augment).training_batches(10), start, 25)
    resumed = islice(numbered_split(augment=augment).training_batches(10, start), 25 - start)
    assert equal_batches(whole, resumed)


def test_calls_do_not_disturb_each_other_and_repeat():
    split = numbered_split(augment=Augmentation(crop_padding=2, flip=True))
    undisturbed = list(islice(split.training_batches(10), 8))
    disturbed = []
    for batch in islice(split.training_batches(10), 8):
        disturbed.append(batch)
        assert equal_batches(
            split.batches(10, samples=30, augment=True), split.batches(10, samples=30, augment=True)
        )
    assert equal_batches(undisturbed, disturbed)


def test_augmentation_is_for_training_and_on_request():
    split = numbered_split(augment=Augmentation(flip=True))

    def mirrored(batches):
        x = torch.cat([x for x, _ in batches])
        return (x[:, 0, 0, -1] > 200).float().mean().item()

    assert 0.3 < mirrored(islice(split.training_batches(10), 25)) < 0.7
    assert 0.3 < mirrored(split.batches(10, augment=True)) < 0.7
    assert mirrored(split.batches(10)) == 0


def test_global_random_state_is_untouched():
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    split = numbered_split(augment=Augmentation(crop_padding=2, flip=True))
    list(islice(split.training_batches(10), 12))
    list(split.batches(10, samples=30, augment=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_a_batch_may_be_changed_without_harm():
    split = numbered_split()
    first = [(x.clone(), y.clone()) for x, y in split.batches(10)]
    for x, y in split.batches(10):
        x.zero_()
        y.zero_()
    assert equal_batches(first, split.batches(10))
