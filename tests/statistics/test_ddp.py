"""torch's DistributedDataParallel with plain BN layers, and what bnexp makes of its ranks."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
from references import single_batch, worst_error
from several import run_ranks, values
from torch import nn

import bnexp
from bnexp.ranks import TorchRanks
from bnexp.statistics import recompute_statistics, running_statistics

pytestmark = pytest.mark.slow

RANKS, STEPS, SMALL = 4, 30, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


def images():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(480, 1, 8, 8, generator=generator)
    return (
        x * torch.linspace(0.5, 2, 480)[torch.randperm(480, generator=generator), None, None, None]
    )


def parts(rank):
    return images()[rank::RANKS]


def trained(rank):
    """Plain layers under DDP with small mini-batches, then statistics over all ranks' samples."""
    model = nn.parallel.DistributedDataParallel(network())
    ranks = TorchRanks()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    own = parts(rank)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = own[torch.arange(step * SMALL, (step + 1) * SMALL) % len(own)]
        model(x).square().mean().backward()
        optimizer.step()
    shown = running_statistics(model.module)
    found = recompute_statistics(model.module, list(own.split(50)), ranks=ranks)
    return copy.deepcopy(model.module), shown, found


def test_rank_0s_buffers_are_off_and_the_ranks_recompute_the_truth():
    outcomes = values(run_ranks(trained, RANKS))
    model, _, found = outcomes[0]
    truth = single_batch(model, lambda m: m(images().double()))
    for _, _, other in outcomes:
        for name in found.names:
            assert torch.equal(other.mean[name], found.mean[name])
            assert torch.equal(other.var[name], found.var[name])
    shown = [statistics for _, statistics, _ in outcomes]
    assert any(not torch.equal(shown[0].mean[n], s.mean[n]) for s in shown[1:] for n in s.names)
    for name, calls in truth.items():
        ((mean, var, _),) = calls
        assert worst_error(found, mean, var, name) < 1e-5
        assert worst_error(_double(shown[0]), mean, var, name) > 0.05


def _double(statistics):
    return bnexp.Statistics(
        {n: m.double() for n, m in statistics.mean.items()},
        {n: v.double() for n, v in statistics.var.items()},
        statistics.count,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a CUDA device")
def test_one_rank_with_nccl(tmp_path):
    torch.distributed.init_process_group(
        "nccl",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
    )
    try:
        ranks = TorchRanks()
        model = network().cuda()
        batches = [x.cuda() for x in images().split(50)]
        for method in ("batch-mean", "pooled", "exact"):
            alone = recompute_statistics(model, batches, method)
            found = recompute_statistics(model, batches, method, ranks=ranks)
            for name in alone.names:
                assert torch.equal(found.mean[name], alone.mean[name])
                assert torch.equal(found.var[name], alone.var[name])
        rules = {"ema": bnexp.Ema(0.9), "pooled": bnexp.Pooled()}
        with bnexp.StatisticsTracker(model.train(), rules, ranks=ranks) as tracker:
            model(batches[0])
            tracker.update()
            assert tracker.statistics()["ema"].count["1"] == 1
    finally:
        torch.distributed.destroy_process_group()
