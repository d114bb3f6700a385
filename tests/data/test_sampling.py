"""Choices of images: stratified, exact in number, and a function of the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnexp.data import Augmentation, sampling
from bnexp.errors import UserError

PLAIN = Augmentation()
AUGMENT = Augmentation(crop_padding=2, flip=True)


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_stratified_subsets_are_exact_in_number_and_fair_to_every_class(labels, share, seed):
    labels = np.array(labels)
    count = round(share * len(labels))
    chosen = sampling.stratified_subset(labels, count, np.random.default_rng(seed))
    assert len(chosen) == count == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all()
    for label in np.unique(labels):
        exact = count * (labels == label).sum() / len(labels)
        assert abs((labels[chosen] == label).sum() - exact) < 1


def test_stratified_subsets_differ_by_seed_only():
    labels = np.repeat(np.arange(10), 50)

    def subset(seed):
        return sampling.stratified_subset(labels, 100, np.random.default_rng(seed)).tolist()

    assert subset(1) == subset(1) != subset(2)


def test_split_off_is_a_partition():
    labels = np.repeat(np.arange(3), [10, 20, 70])
    stays, apart = sampling.split_off(labels, 0.2, np.random.default_rng(0))
    assert sorted([*stays, *apart]) == list(range(100))
    assert np.bincount(labels[apart]).tolist() == [2, 4, 14]


def test_an_epoch_visits_no_image_twice_and_drops_the_remainder():
    order = sampling.training_pass(103, 10, 3, PLAIN, seed=7).order
    assert len(order) == 100 == len(set(order.tolist()))
    assert order.max() < 103


def test_epochs_have_orders_and_augmentation_of_their_own():
    passes = [sampling.training_pass(50, 5, epoch, AUGMENT, seed=7) for epoch in (0, 1)]
    assert passes[0].order.tolist() != passes[1].order.tolist()
    assert passes[0].draws.tolist() != passes[1].draws.tolist()


def test_the_order_is_the_same_with_and_without_augmentation():
    plain, augmented = (sampling.training_pass(50, 5, 0, a, seed=7) for a in (PLAIN, AUGMENT))
    assert torch.equal(plain.order, augmented.order)
    assert plain.draws is None


@pytest.mark.parametrize("start", [0, 1, 9, 10, 25])
def test_steps_continue_as_if_never_interrupted(start):
    def steps(first, last):
        passes = sampling.training_passes(53, 5, first, AUGMENT, seed=1)
        parts = (part for whole in passes for part in whole.batches(5))
        return [next(parts) for _ in range(last - first)]

    whole, resumed = steps(0, 35)[start:], steps(start, 35)
    assert len(whole) == len(resumed) > 0
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.order, b.order) and torch.equal(a.draws, b.draws)


@pytest.mark.parametrize("seeds", [(0, 1), (0, 2**32 - 1)])
def test_seeds_differ(seeds):
    orders = [sampling.training_pass(50, 5, 0, PLAIN, seed).order.tolist() for seed in seeds]
    assert orders[0] != orders[1]


def test_inference_passes():
    assert sampling.inference_pass(9, None, None, 0).order.tolist() == list(range(9))
    some = sampling.inference_pass(50, 20, AUGMENT, 0)
    more = sampling.inference_pass(50, 30, AUGMENT, 0)
    assert more.order[:20].tolist() == some.order.tolist() != list(range(20))
    assert len(sampling.inference_pass(9, 100, None, 0)) == 9
    assert sampling.inference_pass(9, 5, PLAIN, 0).draws is None


def test_a_batch_larger_than_the_training_set_is_refused():
    assert sampling.steps_per_epoch(128, 128) == 1
    with pytest.raises(UserError, match=r"batch of 129 .* 128 training images"):
        sampling.steps_per_epoch(128, 129)
