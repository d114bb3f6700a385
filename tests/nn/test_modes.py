"""Ghost batches and frozen layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnexp.errors import UserError
from bnexp.nn import (
    BatchNorm2d,
    convert_batchnorm,
    freeze_batchnorm,
    set_normalization_batch,
    unfreeze_batchnorm,
)
from bnexp.statistics.rules import Cumulative, Ema
from bnexp.statistics.statistics import Statistics, running_statistics
from bnexp.statistics.tracker import StatisticsTracker


def random_layer(cls, channels=5, **options):
    layer = cls(channels, **options)
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    return layer


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 20),
    size=st.integers(1, 22),
    space=st.sampled_from([(), (3,), (2, 3)]),
    channels_last=st.booleans(),
    affine=st.booleans(),
    tracked=st.booleans(),
)
def test_ghost_batches_are_torch_on_the_parts(n, size, space, channels_last, affine, tracked):
    cls = nn.BatchNorm2d if len(space) == 2 else nn.BatchNorm1d
    reference = random_layer(cls, affine=affine)
    layer = set_normalization_batch(copy.deepcopy(reference), size)
    x = torch.randn(n, 5, *space) * 3 + 1
    if channels_last and len(space) == 2:
        x = x.to(memory_format=torch.channels_last)
    parts = x.split(size)
    tracker = StatisticsTracker(layer, {"mean": Cumulative()}) if tracked else None
    if any(part.numel() == 5 for part in parts):
        with pytest.raises(ValueError, match=r"(one|more than 1) value"):
            layer(x)
        return

    def gradients(module, split):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        output = torch.cat([module(p) for p in leaf.split(size)]) if split else module(leaf)
        return [output, *torch.autograd.grad(output.pow(3).sum(), [leaf, *module.parameters()])]

    for a, b in zip(gradients(layer, False), gradients(reference, True), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    dims = [d for d in range(x.dim()) if d != 1]
    mean = torch.stack([p.double().mean(dims) for p in parts]).mean(0)
    var = torch.stack([p.double().var(dims) for p in parts]).mean(0)
    if tracker:
        expected = mean, var
        tracker.update()
    else:
        expected = 0.1 * mean, 0.9 + 0.1 * var
    torch.testing.assert_close(layer.running_mean.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked == 1


def test_ghost_batches_with_momentum_none_average_over_mini_batches():
    layer = set_normalization_batch(nn.BatchNorm1d(3, momentum=None), 4)
    batches = [torch.randn(8, 3) + i for i in range(3)]
    for x in batches:
        layer(x)
    expected = torch.stack([x.mean(0) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, expected)


def test_ghost_batches_leave_eval_and_layers_without_buffers_right():
    layer = set_normalization_batch(BatchNorm2d(3, track_running_stats=False), 2)
    reference = nn.BatchNorm2d(3, track_running_stats=False)
    x = torch.randn(6, 3, 4, 4)
    assert torch.equal(layer(x), torch.cat([reference(p) for p in x.split(2)]))
    assert torch.equal(layer.eval()(x), reference.eval()(x))
    assert torch.equal(set_normalization_batch(layer.train(), None)(x), reference(x))


@pytest.mark.parametrize("size", [0, -3, 2.0, True, "8"])
def test_ghost_batch_sizes_that_make_no_sense_are_refused(size):
    with pytest.raises(UserError, match="normalization batch"):
        set_normalization_batch(nn.BatchNorm1d(3), size)


def test_a_part_of_one_value_is_refused_with_a_way_out():
    layer = set_normalization_batch(nn.BatchNorm1d(3), 4)
    with pytest.raises(UserError, match="normalization batches of 4 leave one value per channel"):
        layer(torch.randn(9, 3))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    )
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize("tracked", [False, True])
def test_frozen_layers_are_affine_functions_in_both_modes(tracked):
    model, reference = network(), network().eval()
    tracker = StatisticsTracker(model, {"mean": Cumulative(), "ema": Ema(0.5)}) if tracked else None
    assert freeze_batchnorm(model) is model
    before = {k: v.clone() for k, v in model.named_buffers()}
    x = torch.randn(5, 2, 8, 8)
    for mode in (True, False):
        results = []
        for m in (model.train(mode), reference):
            leaf = x.clone().requires_grad_()
            output = m(leaf)
            if m is model and tracker:
                tracker.update()
            results.append(
                [output, *torch.autograd.grad(output.pow(2).sum(), [leaf, *m.parameters()])]
            )
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    if tracker:
        assert set(tracker.statistics()["mean"].count.values()) == {0}

    unfreeze_batchnorm(model)
    reference = network()
    assert torch.equal(model.train()(x), reference(x))
    if tracker:
        tracker.update()
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("first", [Cumulative(), Ema(0.9), Ema(0.9, debias=True)])
def test_freezing_with_given_statistics(first):
    model = network()
    tracker = StatisticsTracker(model, {"first": first})
    model(torch.randn(4, 2, 8, 8))
    tracker.update()
    layers = {"1": 4, "4": 3}
    given_ones = Statistics(
        {k: torch.full((c,), 0.25) for k, c in layers.items()},
        {k: torch.full((c,), 4.0) for k, c in layers.items()},
        dict.fromkeys(layers, 7),
    )
    freeze_batchnorm(model, given_ones)
    x = torch.randn(6, 4, 3, 3)
    expected = F.batch_norm(
        x, given_ones.mean["1"], given_ones.var["1"], model[1].weight, model[1].bias
    )
    assert torch.equal(model[1].train()(x), expected)
    tracker.update()
    tracker.close()
    assert torch.equal(model[4].running_var, given_ones.var["4"])


def test_freezing_in_part_leaves_the_other_layers_counting():
    model = network()
    tracker = StatisticsTracker(model, {"mean": Cumulative()})
    freeze_batchnorm(model[1])
    frozen = model[1].running_mean.clone()
    x = torch.randn(4, 2, 8, 8)
    inner = model[:4](x)
    model(x)
    tracker.update()
    assert torch.equal(model[1].running_mean, frozen)
    torch.testing.assert_close(model[4].running_mean, inner.mean((0, 2, 3)))
    assert tracker.statistics()["mean"].count == {"1": 0, "4": 1}


def test_frozen_survives_a_copy_and_shows():
    model = copy.deepcopy(freeze_batchnorm(network()))
    x = torch.randn(4, 2, 8, 8)
    assert torch.equal(model.train()(x), network().eval()(x))
    assert "frozen=True" in str(model)


def test_what_cannot_be_frozen_is_refused_and_nothing_frozen():
    for odd in (nn.BatchNorm2d(3, track_running_stats=False), nn.LazyBatchNorm2d()):
        model = nn.Sequential(nn.BatchNorm2d(3), odd)
        with pytest.raises(UserError, match="'1' has no running statistics"):
            freeze_batchnorm(model)
        assert not getattr(model[0], "frozen", False)
    model = convert_batchnorm(network())
    with pytest.raises(UserError, match="another model"):
        freeze_batchnorm(model, running_statistics(nn.Sequential(nn.BatchNorm2d(2))))
    assert not model[1].frozen
