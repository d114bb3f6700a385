"""Batch renormalization against the formulas of Ioffe 2017, written out in numpy with float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnexp.errors import UserError
from bnexp.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    MovingAverageNorm1d,
    MovingAverageNorm2d,
    MovingAverageNorm3d,
    RenormLimits,
    freeze_batchnorm,
    restore_batchnorm,
    set_normalization_batch,
    use_batch_renorm,
    use_moving_averages,
)
from bnexp.nn.folding import folded
from bnexp.statistics.recompute import recompute_statistics
from bnexp.statistics.rules import Cumulative, Ema
from bnexp.statistics.tracker import StatisticsTracker

OPEN = RenormLimits(r_max=3.0, d_max=5.0, start=0, r_full=0, d_full=0)
TIGHT = RenormLimits(r_max=1.1, d_max=0.1, start=0, r_full=0, d_full=0)
RENORM = {"1d": BatchRenorm1d, "2d": BatchRenorm2d, "3d": BatchRenorm3d}
MOVING = {"1d": MovingAverageNorm1d, "2d": MovingAverageNorm2d, "3d": MovingAverageNorm3d}
PLAIN = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}
SHAPES = {"1d": (4, 5), "2d": (4, 5, 2, 3), "3d": (4, 5, 2, 1, 3)}


def flat(x: torch.Tensor) -> np.ndarray:
    """(values per channel, channels)."""
    return x.detach().movedim(1, -1).reshape(-1, x.shape[1]).numpy()


def like(values: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    moved = x.movedim(1, -1)
    return torch.from_numpy(values).reshape(moved.shape).movedim(-1, 1)


def renormalized(x, g, weight, bias, mean, var, eps, r_max, d_max):
    """Output and gradients (of x, weight, bias) for the outputs' gradient g, (m, C) each, as
    Algorithm 1 of Ioffe 2017 and the formulas below it have them, with the running deviation
    sqrt(var + eps)."""
    m = len(x)
    mu_b = x.mean(0)
    sigma_b = np.sqrt(((x - mu_b) ** 2).mean(0) + eps)
    sigma = np.sqrt(var + eps)
    r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
    d = np.clip((mu_b - mean) / sigma, -d_max, d_max)
    x_hat = (x - mu_b) / sigma_b * r + d
    d_x_hat = g * weight
    d_sigma_b = (d_x_hat * (x - mu_b) * -r / sigma_b**2).sum(0)
    d_mu_b = (d_x_hat * -r / sigma_b).sum(0)
    d_x = d_x_hat * r / sigma_b + d_sigma_b * (x - mu_b) / (m * sigma_b) + d_mu_b / m
    return weight * x_hat + bias, d_x, (g * x_hat).sum(0), g.sum(0)


def moved_on(cls, kind, **options):
    """A float64 layer that has averages of its own already."""
    torch.manual_seed(3)
    layer = cls(5, **options).double()
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.3, 3)
    layer.num_batches_tracked += 7
    x = (torch.randn(SHAPES[kind], dtype=torch.float64) * 2 + 1).requires_grad_()
    return layer, x, torch.randn_like(x)


@pytest.mark.parametrize("limits", [OPEN, TIGHT])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("tracked", [False, True])
def test_forward_and_backward_are_the_paper_s(kind, limits, tracked):
    layer, x, g = moved_on(RENORM[kind], kind, limits=limits, eps=1e-3)
    tracker = StatisticsTracker(layer, {"running": Ema(0.9)}) if tracked else None
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    y = layer(x)
    found = [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], g)]
    expected = renormalized(
        *map(flat, (x, g)),
        *(t.detach().numpy() for t in (layer.weight, layer.bias, mean, var)),
        layer.eps,
        limits.r_max,
        limits.d_max,
    )
    for ours, theirs in zip(found, expected, strict=True):
        theirs = like(theirs, x) if theirs.ndim == 2 else torch.from_numpy(theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if tracker:
        tracker.update()
    plain = PLAIN[kind](5, momentum=0.1).double()
    plain.running_mean, plain.running_var = mean, var
    plain(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-14, atol=1e-14)
    assert layer.num_batches_tracked == 8


@pytest.mark.parametrize("kind", SHAPES)
def test_without_limits_training_computes_what_inference_does(kind):
    wide = RenormLimits(r_max=1e6, d_max=1e6, start=0, r_full=0, d_full=0)
    layer, x, _ = moved_on(RENORM[kind], kind, limits=wide)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SHAPES)
def test_with_limits_1_and_0_it_is_batch_normalization(kind):
    layer, x, g = moved_on(RENORM[kind], kind, limits=RenormLimits(start=7))
    plain = PLAIN[kind](5).double()
    plain.load_state_dict(layer.state_dict())
    for module in (plain, layer):
        module.y = module(x)
        module.grads = torch.autograd.grad(module.y, [x, module.weight, module.bias], g)
    for a, b in zip((layer.y, *layer.grads), (plain.y, *plain.grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    ("seen", "r", "d"), [(0, 1, 0), (10, 1, 0), (15, 1.5, 2.5), (20, 2, 5), (30, 3, 5), (99, 3, 5)]
)
def test_the_limits_open_linearly(seen, r, d):
    limits = RenormLimits(r_max=3, d_max=5, start=10, r_full=30, d_full=20)
    assert limits.at(torch.tensor(seen)) == (r, d)


def test_limits_that_open_at_once():
    limits = RenormLimits(r_max=3, d_max=5, start=4, r_full=4, d_full=4)
    assert limits.at(torch.tensor(3)) == (1, 0) and limits.at(torch.tensor(4)) == (3, 5)


@pytest.mark.parametrize("change", [{"r_max": 0.5}, {"d_max": -1.0}, {"start": 30_000}])
def test_limits_that_are_none(change):
    with pytest.raises(UserError):
        RenormLimits(**change)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("tracked", [False, True])
def test_moving_averages_are_constants(kind, tracked):
    layer, x, g = moved_on(MOVING[kind], kind)
    tracker = StatisticsTracker(layer, {"running": Ema(0.9)}) if tracked else None
    mean, var = flat_buffers(layer)
    y = layer(x)
    if tracker:
        tracker.update()  # before the backward pass, which must not read what is new
    d_x, d_weight, d_bias = torch.autograd.grad(y, [x, layer.weight, layer.bias], g)
    x_hat = (flat(x) - mean) / np.sqrt(var + layer.eps)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    close(y, like(x_hat * weight + bias, x))
    close(d_x, like(flat(g) * weight / np.sqrt(var + layer.eps), x))
    close(d_weight, torch.from_numpy((flat(g) * x_hat).sum(0)))
    close(d_bias, torch.from_numpy(flat(g).sum(0)))
    now = flat_buffers(layer)
    np.testing.assert_allclose(now[0], 0.9 * mean + 0.1 * flat(x).mean(0), rtol=1e-12)
    np.testing.assert_allclose(now[1], 0.9 * var + 0.1 * flat(x).var(0, ddof=1), rtol=1e-12)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def flat_buffers(layer):
    return layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()


@pytest.mark.parametrize("cls", [BatchRenorm2d, MovingAverageNorm2d])
def test_ghost_batches_are_the_parts_one_by_one(cls):
    layer, x, g = moved_on(cls, "2d")
    if cls is BatchRenorm2d:
        layer.limits = TIGHT
    reference = copy.deepcopy(layer)
    set_normalization_batch(layer, 2)
    y = layer(x)
    found = [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], g)]
    # the parts read the averages as they were: each from a copy of the layer
    outputs = [copy.deepcopy(reference)(part) for part in x.split(2)]
    close(y, torch.cat(outputs))
    close(found[1], torch.autograd.grad(torch.cat(outputs), x, g)[0])
    mean = torch.stack([p.mean((0, 2, 3)) for p in x.split(2)]).mean(0)
    var = torch.stack([p.var((0, 2, 3)) for p in x.split(2)]).mean(0)
    close(layer.running_mean, 0.9 * reference.running_mean + 0.1 * mean.detach())
    close(layer.running_var, 0.9 * reference.running_var + 0.1 * var.detach())


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
        BatchNorm1d(3),
    )


@pytest.mark.parametrize("use", [use_batch_renorm, use_moving_averages])
def test_a_network_converted_and_restored(use):
    model = network()
    state = copy.deepcopy(model.state_dict())
    use(model)
    now = model.state_dict()
    assert state.keys() == now.keys() and all(torch.equal(state[n], now[n]) for n in state)
    batches = [torch.randn(6, 2, 5, 5) * 2 + 1 for _ in range(3)]
    rules = {"running": Ema(0.5), "average": Cumulative()}
    with StatisticsTracker(model, rules) as tracker:
        for x in batches:
            model(x)
            tracker.update()
        estimates = tracker.statistics()
    assert estimates["running"].count == {"1": 3, "5": 3}
    # Population statistics are those of batch normalization with these weights.
    for method in ("exact", "pooled", "batch-mean"):
        plain = restore_batchnorm(copy.deepcopy(model))
        assert type(plain[1]) is nn.BatchNorm2d
        a, b = (recompute_statistics(m, batches, method=method) for m in (model, plain))
        assert all(torch.equal(a.mean[n], b.mean[n]) for n in a.names)
        assert all(torch.equal(a.var[n], b.var[n]) for n in a.names)
    model.eval()
    with torch.no_grad():
        before = model(batches[0])
        with folded(model):
            torch.testing.assert_close(model(batches[0]), before)
        assert torch.equal(restore_batchnorm(copy.deepcopy(model))(batches[0]), before)
    freeze_batchnorm(model.train())
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), before)


@pytest.mark.parametrize("use", [use_batch_renorm, use_moving_averages])
def test_training_goes_on_bit_for_bit(use):
    def make():
        model = use(network()) if use is use_moving_averages else use(network(), TIGHT)
        return model, StatisticsTracker(model, {"running": Ema(0.9)})

    def train(model, tracker, batches):
        for x in batches:
            model(x).square().sum().backward()
            tracker.update()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-3 * parameter.grad
                    parameter.grad = None

    batches = [torch.randn(6, 2, 5, 5) for _ in range(4)]
    whole, tracker = make()
    train(whole, tracker, batches)
    first, tracker = make()
    train(first, tracker, batches[:2])
    saved = copy.deepcopy((first.state_dict(), tracker.state_dict()))
    second, tracker = make()
    second.load_state_dict(saved[0])
    tracker.load_state_dict(saved[1])
    train(second, tracker, batches[2:])
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", [BatchRenorm1d, MovingAverageNorm1d])
def test_what_is_refused(cls):
    with pytest.raises(UserError, match="track_running_stats=True"):
        cls(3, track_running_stats=False)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="more than 1 value"):
        cls(3)(torch.randn(1, 3))
    with pytest.raises(UserError, match="activation checkpointing"):
        x = torch.randn(4, 3, requires_grad=True)
        checkpoint(cls(3), x, use_reentrant=False).sum().backward()
    with pytest.raises(UserError, match="TorchScript"):
        torch.jit.script(cls(3))


def test_layers_that_cannot_be_renormalized():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.BatchNorm2d(2), Own(2))
    with pytest.raises(UserError, match="'1' is a Own"):
        use_batch_renorm(model)
    with pytest.raises(UserError, match="keeps no running statistics"):
        use_moving_averages(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)))
    assert type(model[0]) is nn.BatchNorm2d


def test_bfloat16_under_autocast():
    layer = BatchRenorm2d(5, limits=OPEN)
    x = torch.randn(4, 5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
