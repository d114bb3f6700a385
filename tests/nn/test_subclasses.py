"""Subclasses of torch.nn's layers whose forward is batch normalization and something else."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnexp.errors import UserError
from bnexp.nn import freeze_batchnorm, set_normalization_batch, unfreeze_batchnorm
from bnexp.nn.batchnorm import TrackedBatchNorm
from bnexp.nn.find import batchnorm_layers, is_plain
from bnexp.nn.folding import folded
from bnexp.statistics import (
    Cumulative,
    Ema,
    StatisticsTracker,
    recompute_statistics,
    running_statistics,
)


class Silu(nn.BatchNorm2d):
    """Calls its parent's forward."""

    def forward(self, x):
        return F.silu(super().forward(x))


class ChannelsLast(nn.BatchNorm1d):
    """Other order of dimensions, keyword arguments, an affine part of its own."""

    def forward(self, x, *, gain=1.0):
        self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x.movedim(-1, 1),
            self.running_mean,
            self.running_var,
            weight=self.weight * gain,
            bias=self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )
        return x.movedim(1, -1)


class Named(nn.BatchNorm2d):
    """No forward of its own."""


class Double(nn.BatchNorm2d):
    """Two layers in one: its own, then another inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.other = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.other(super().forward(x))


class Formula(nn.BatchNorm2d):
    def forward(self, x):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
        return (x - mean) / (var + self.eps).sqrt()


def network(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 4, 3), norm(4))
    for layer in batchnorm_layers(model).values():
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def outputs_and_gradients(model, x):
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    return [output, *torch.autograd.grad(output.pow(3).sum(), [leaf, *model.parameters()])]


KINDS = [Silu, Named, Double, BatchNormAct2d]
inputs = [2 * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_tracking_changes_nothing_in_training_and_keeps_torchs_averages(kind):
    model, reference = network(kind), network(kind)
    tracker = StatisticsTracker(model, {"ema": Ema(0.9), "mean": Cumulative()})
    for x in inputs:
        pairs = zip(*(outputs_and_gradients(m, x) for m in (model, reference)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        tracker.update()
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))
    assert set(tracker.statistics()["mean"].count.values()) == {3}
    assert torch.equal(model.eval()(inputs[0]), model(inputs[0]))
    tracker.close()
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    torch.testing.assert_close(model(inputs[0]), reference.eval()(inputs[0]))


def test_a_subclass_without_a_forward_of_its_own_is_stood_in_for_as_a_whole():
    model = network(Named)
    StatisticsTracker(model, {"ema": Ema(0.9)})
    assert all(is_plain(layer) for layer in batchnorm_layers(model).values())


def test_layers_inside_a_layer_keep_their_own_statistics():
    model, reference = network(Double), network(Double)
    tracker = StatisticsTracker(model, {"mean": Cumulative()})
    model(inputs[0]), reference(inputs[0])
    statistics = tracker.statistics()["mean"]
    inner = reference[1].other
    assert not torch.allclose(statistics.mean["1"], statistics.mean["1.other"], atol=1e-3)
    inner.reset_running_stats()
    inner.momentum = 1.0
    nn.BatchNorm2d.forward(reference[1].train(), reference[0](inputs[0]))
    before = nn.BatchNorm2d.forward(reference[1], reference[0](inputs[0]))
    inner(before)
    torch.testing.assert_close(statistics.mean["1.other"], inner.running_mean)

    population = recompute_statistics(model, [inputs[0]])
    torch.testing.assert_close(population.mean["1.other"].float(), inner.running_mean)


@pytest.mark.parametrize("kind", [Silu, Named, BatchNormAct2d])
@pytest.mark.parametrize("tracked", [False, True])
def test_ghost_batches(kind, tracked):
    """In the first layer, whose parts don't meet: torch's on each part."""
    model, reference = network(kind)[:2], network(kind)[:2]
    set_normalization_batch(model, 3)
    tracker = StatisticsTracker(model, {"mean": Cumulative()}) if tracked else None
    x = inputs[0]
    # Where a vector of the CPU's registers begins decides the last digit of an activation.
    parts = torch.cat([reference(part) for part in x.split(3)])
    torch.testing.assert_close(model(x), parts, rtol=1e-6, atol=1e-6)
    reference[1].momentum = None
    reference[1].reset_running_stats()
    for part in x.split(3):
        reference(part)
    if tracker:
        tracker.update()
        expected = reference[1].running_var
    else:
        expected = 0.9 * network(kind)[1].running_var + 0.1 * reference[1].running_var
    torch.testing.assert_close(model[1].running_var, expected)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("kind", KINDS)
def test_frozen(kind):
    model, reference = freeze_batchnorm(network(kind)), network(kind).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pairs = zip(
        outputs_and_gradients(model.train(), inputs[0]),
        outputs_and_gradients(reference, inputs[0]),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    unfreeze_batchnorm(model)
    assert torch.equal(model(inputs[0]), network(kind)(inputs[0]))


def test_keyword_arguments_and_other_orders_of_dimensions():
    layer, reference = ChannelsLast(4), ChannelsLast(4)
    tracker = StatisticsTracker(layer, {"ema": Ema(0.9)})
    x = torch.randn(5, 7, 4)
    assert torch.equal(layer(x, gain=2.0), reference(x, gain=2.0))
    tracker.update()
    torch.testing.assert_close(dict(layer.named_buffers()), dict(reference.named_buffers()))


def test_activation_checkpointing_counts_once():
    model, reference = network(Silu), network(Silu)
    tracker = StatisticsTracker(model, {"ema": Ema(0.9)})
    for x in inputs:
        checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
        reference(x)
        tracker.update()
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


@pytest.mark.slow
def test_compiled():
    model, reference = network(BatchNormAct2d), network(BatchNormAct2d)
    tracker = StatisticsTracker(model, {"ema": Ema(0.9)})
    compiled = torch.compile(model, backend="eager")
    for x in inputs:
        torch.testing.assert_close(compiled(x), reference(x))
        tracker.update()
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def test_what_calls_no_batch_norm_says_so_in_training():
    model = network(Formula)
    tracker = StatisticsTracker(model, {"ema": Ema(0.9)})
    with pytest.raises(UserError, match="Formula with a forward of its own that does not call"):
        model(inputs[0])
    tracker.close()
    model(inputs[0])


def test_copies_and_pickles():
    model = freeze_batchnorm(network(Silu))
    tracker = StatisticsTracker(model, {"ema": Ema(0.9)})
    expected = model(inputs[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs[0]), expected)
        assert isinstance(other[1], Silu) and isinstance(other[1], TrackedBatchNorm)
        assert other[1].slot is None
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(inputs[0]), expected)
    tracker.close()


class Residual(nn.BatchNorm2d):
    def forward(self, x):
        return x + super().forward(x)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x)


class Gained(nn.BatchNorm2d):
    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight * 2, self.bias, self.training, 0.1, self.eps)


@pytest.mark.parametrize(
    "kind, foldable",
    [(Silu, 2), (BatchNormAct2d, 2), (Named, 2), (Residual, 0), (Doubled, 0), (Gained, 0)],
)
def test_folding(kind, foldable):
    model = network(kind).eval()
    weights = [model[0].weight, model[2].weight]
    with torch.no_grad():
        expected = model(inputs[0])
        with folded(model):
            changed = sum(model[i].weight is not w for i, w in zip((0, 2), weights, strict=True))
            torch.testing.assert_close(model(inputs[0]), expected, rtol=1e-4, atol=1e-5)
        assert changed == foldable
        assert torch.equal(model(inputs[0]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnetv2_50", "efficientnet_b0", "regnety_002"])
def test_networks_of_timm(name):
    def build():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=5)

    model, reference = build(), build()
    tracker = StatisticsTracker(model, {"ema": Ema(0.9)})
    x = torch.randn(4, 3, 64, 64)
    for seed in range(2):
        outputs = []
        for m in (model, reference):
            torch.manual_seed(seed)  # some have dropout
            outputs.append(m(x + seed))
        assert torch.equal(*outputs)
        tracker.update()
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))
    tracker.close()

    with torch.no_grad():
        expected = reference.eval()(x)
        with folded(reference):
            torch.testing.assert_close(reference(x), expected, rtol=1e-3, atol=1e-5)
        freeze_batchnorm(model, running_statistics(reference))
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert torch.equal(model(x), expected)
