"""Batch normalization over several processes, against one process with the joined mini-batch."""

from __future__ import annotations

import copy

import pytest
import torch
from several import run_ranks, values
from torch import nn
from torch.autograd import gradcheck

from bnexp import BatchNorm1d, BatchNorm2d, Ema, Pooled, StatisticsTracker, TorchRanks
from bnexp.collectives import Collectives
from bnexp.nn import normalize_across, restore_batchnorm
from bnexp.ranks import Alone
from bnexp.statistics.across import AcrossRanks

CPU = torch.device("cpu")
SPLITS = [(4, 4), (1, 6, 3), (5, 0), (0, 3, 1, 2)]


def _input(samples, dtype, offset=0.0):
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 5, 3, 4, dtype=torch.float64, generator=generator)
    grad = torch.randn(samples, 5, 3, 4, dtype=torch.float64, generator=generator)
    return (x * torch.arange(1, 6).view(-1, 1, 1) + offset).to(dtype), grad.to(dtype)


def _layer(dtype, affine=True):
    layer = BatchNorm2d(5, affine=affine, momentum=0.3).to(dtype)
    if affine:
        nn.init.uniform_(layer.weight, generator=torch.Generator().manual_seed(1))
        nn.init.uniform_(layer.bias, generator=torch.Generator().manual_seed(2))
    return layer


def _part(split, rank):
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def _step(layer, x, grad):
    """Output, gradient of the input, gradients of the parameters, running buffers."""
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(grad)
    own = [p.grad for p in layer.parameters()]
    return output.detach(), x.grad, own, [layer.running_mean.clone(), layer.running_var.clone()]


# dtype, affine, offset of all values, tolerance, channels_last
CASES = [
    (torch.float64, True, 0.0, 1e-13, False),
    (torch.float64, False, 3.0, 1e-13, True),
    (torch.float32, True, 0.0, 3e-6, True),
]


def _rank_steps(rank, split):
    gather = Collectives(TorchRanks(), CPU).gather
    found = []
    for dtype, affine, offset, _, channels_last in CASES:
        layer = normalize_across(_layer(dtype, affine), AcrossRanks(gather))
        x, grad = (t[_part(split, rank)] for t in _input(sum(split), dtype, offset))
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        found.append(_step(layer, x, grad))
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_compute_what_one_process_does(split):
    every = values(run_ranks(_rank_steps, len(split), split))
    for (dtype, affine, offset, tolerance, _), ranks in zip(
        CASES, zip(*every, strict=True), strict=True
    ):
        plain = restore_batchnorm(_layer(dtype, affine))
        assert type(plain) is nn.BatchNorm2d
        output, grad, parameters, buffers = _step(plain, *_input(sum(split), dtype, offset))
        close = {"rtol": tolerance, "atol": tolerance * (1 + offset) ** 2}
        torch.testing.assert_close(torch.cat([r[0] for r in ranks]), output, **close)
        torch.testing.assert_close(torch.cat([r[1] for r in ranks]), grad, **close)
        for i, expected in enumerate(parameters):
            found = sum(r[2][i] for r in ranks)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=30 * tolerance)
        for rank in ranks:
            torch.testing.assert_close(rank[3], buffers, **close)
            assert all(torch.equal(a, b) for a, b in zip(rank[3], ranks[0][3], strict=True))


class _Share(torch.autograd.Function):
    """This rank's samples; backward joins the gradients of all ranks'."""

    @staticmethod
    def forward(ctx, x, split, ranks):
        ctx.split, ctx.ranks = split, ranks
        return x[_part(split, ranks.rank)].clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat(ctx.ranks.gather(grad, "gradients")), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, split, ranks):
        ctx.part = _part(split, ranks.rank)
        return torch.cat(ranks.gather(x, "outputs"))

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.part].clone(), None, None


class _Same(torch.autograd.Function):
    """A parameter that all ranks have; backward adds up their gradients."""

    @staticmethod
    def forward(ctx, parameter, ranks):
        ctx.ranks = ranks
        return parameter.clone()

    @staticmethod
    def backward(ctx, grad):
        return sum(ctx.ranks.gather(grad, "gradients")), None


def _gradcheck(rank, split):
    ranks = TorchRanks()
    across = AcrossRanks(Collectives(ranks, CPU).gather)

    def joined(x, weight, bias):
        affine = _Same.apply(weight, ranks), _Same.apply(bias, ranks), 1e-5
        return _Join.apply(across(_Share.apply(x, split, ranks), affine)[0], split, ranks)

    torch.manual_seed(0)
    shapes = [(sum(split), 2, 2), (2,), (2,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    return gradcheck(joined, inputs)


@pytest.mark.parametrize("split", [(2, 2), (3, 0, 1)])
def test_gradients_by_finite_differences(split):
    assert values(run_ranks(_gradcheck, len(split), split)) == [True] * len(split)


def _single_value(rank):
    across = AcrossRanks(Collectives(TorchRanks(), CPU).gather)
    layer = normalize_across(BatchNorm1d(3), across)
    layer(torch.randn(rank, 3))


def test_a_single_value_on_all_ranks_together_has_no_variance():
    for outcome in run_ranks(_single_value, 2):
        assert isinstance(outcome.error, ValueError)
        assert "more than 1 value per channel" in str(outcome.error)


def _tracked(rank, split):
    across = AcrossRanks(Collectives(TorchRanks(), CPU).gather)
    model = normalize_across(nn.Sequential(_layer(torch.float64)), across)
    rules = {"ema": Ema(0.7), "pooled": Pooled()}
    with StatisticsTracker(model, rules, ranks=Alone()) as tracker:
        for _ in range(3):
            model(_input(sum(split), torch.float64)[0][_part(split, rank)])
            tracker.update()
        return tracker.statistics()


def test_every_rank_tracks_the_whole_mini_batch():
    split = (3, 0, 4)
    ranks = values(run_ranks(_tracked, 3, split))
    model = nn.Sequential(_layer(torch.float64))
    with StatisticsTracker(model, {"ema": Ema(0.7), "pooled": Pooled()}) as tracker:
        for _ in range(3):
            model(_input(sum(split), torch.float64)[0])
            tracker.update()
        alone = tracker.statistics()
    for name, expected in alone.items():
        for found in ranks:
            torch.testing.assert_close(found[name].mean, expected.mean, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(found[name].var, expected.var, rtol=1e-13, atol=1e-13)
            assert found[name].count == expected.count


def test_copies_and_conversion():
    layer = normalize_across(nn.Sequential(BatchNorm2d(5)), AcrossRanks(lambda t: t[None]))[0]
    assert copy.deepcopy(layer).across is layer.across
    x = torch.randn(4, 5, 2, 2)
    plain = nn.BatchNorm2d(5)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert torch.equal(layer.eval()(x), layer.eval()(x))
    restored = restore_batchnorm(nn.Sequential(layer))[0]
    assert "across" not in vars(restored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations(dtype):
    layer, plain = BatchNorm2d(5), nn.BatchNorm2d(5)
    normalize_across(nn.Sequential(layer), AcrossRanks(lambda t: t[None]))
    x, grad = _input(6, dtype)
    found, expected = _step(layer, x, grad), _step(plain, x, grad)
    assert found[0].dtype == expected[0].dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
