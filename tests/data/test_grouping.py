"""Mini-batches of a few classes each."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnexp.data import Augmentation, DataSettings, load_data, sampling
from bnexp.data.grouping import ClassBatches
from bnexp.errors import UserError


def labels_of(sizes) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))


def most(parts: list[int], k: int) -> int:
    """The most batches of k different classes, by brute force: from the last one down."""
    return max(t for t in range(sum(parts) // k + 1) if sum(min(p, t) for p in parts) >= k * t)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    k=st.integers(1, 3),
    share=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_batches_hold_so_many_classes_in_equal_shares(sizes, k, share, seed):
    labels, batch_size = labels_of(sizes), k * share
    grouping = ClassBatches(labels, k)
    parts = [n // share for n in sizes]
    if k > len(sizes) or most(parts, k) == 0:
        with pytest.raises(UserError, match=r"data\.batches\.classes"):
            grouping.steps(batch_size)
        return
    steps = grouping.steps(batch_size)
    assert steps == most(parts, k)
    order = grouping.order(batch_size, np.random.default_rng(seed))
    assert len(order) == steps * batch_size == len(set(order.tolist()))
    for batch in labels[order].reshape(steps, batch_size):
        assert np.unique(batch, return_counts=True)[1].tolist() == [share] * k


def test_every_class_meets_every_other_and_comes_at_any_place():
    labels = labels_of([40] * 5)
    order = ClassBatches(labels, 2).order(4, np.random.default_rng(0))
    batches = labels[order].reshape(-1, 4)
    assert len({tuple(sorted(set(batch.tolist()))) for batch in batches}) == 10
    assert any(batch[0] > batch[-1] for batch in batches)
    assert any(batch[0] < batch[-1] for batch in batches)


@pytest.mark.parametrize("start", [0, 1, 9, 24, 25, 60])
def test_steps_continue_as_if_never_interrupted(start):
    grouping = ClassBatches(labels_of([20, 30, 25, 25]), 2)
    augmentation = Augmentation(crop_padding=2)

    def steps(first, last):
        passes = sampling.training_passes(100, 4, first, augmentation, 1, grouping)
        parts = (part for whole in passes for part in whole.batches(4))
        return list(islice(parts, last - first))

    assert sampling.steps_per_epoch(100, 4, grouping) == 24
    for a, b in zip(steps(0, 70)[start:], steps(start, 70), strict=True):
        assert torch.equal(a.order, b.order) and torch.equal(a.draws, b.draws)


def test_the_training_images_alone_are_grouped():
    data = load_data(DataSettings("digits", classes_per_batch=2), seed=3, device="cpu")
    for _, y in islice(data.train.training_batches(16), 5):
        assert len(set(y.tolist())) == 2
    assert len({*next(iter(data.train.batches(16, samples=16)))[1].tolist()}) > 2
    plain = load_data(DataSettings("digits"), seed=3, device="cpu")
    assert data.fingerprint == plain.fingerprint


def test_more_classes_than_there_are():
    with pytest.raises(UserError, match="is 11, and the training images have 10 classes"):
        data = load_data(DataSettings("digits", classes_per_batch=11), seed=0, device="cpu")
        data.train.steps_per_epoch(22)
    with pytest.raises(UserError, match="equal shares of 3 classes"):
        ClassBatches(labels_of([9] * 4), 3).steps(8)
