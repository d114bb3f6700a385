"""An audit by several ranks is that of one process; averages of ranks that differ are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from audited import POPULATION, TEST, Net, batches, healthy, samples
from several import run_ranks, values
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bnexp.analysis.findings import Facts, LayerFacts, Values, find
from bnexp.auditing import audit
from bnexp.errors import RunFailed, UserError
from bnexp.ranks import TorchRanks

pytestmark = pytest.mark.slow


def plain(result):
    found = result.to_dict()
    del found["seconds"]
    return {"comparison": result.comparison.to_dict(), "verdict": result.verdict, **found}


def off(model):
    model.bn2.running_var.mul_(6)
    return model


def audited(rank, state, fault, options):
    model = Net()
    model.load_state_dict(state)
    model.eval()
    if fault:
        off(model)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    result = audit(model, POPULATION, TEST, ranks=TorchRanks(), **options)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    result.mend(model, force=True)
    return plain(result), model.bn2.running_var.tolist()


def close(a, b, path=""):
    """The same but for the rounding of sums in another order."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            close(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{path}/{number}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5), path
    else:
        assert a == b, path


@pytest.mark.parametrize("size, fault", [(2, True), (3, False)], ids=["off", "healthy"])
def test_the_one_answer(size, fault):
    model = healthy()
    options = {"batch": True, "methods": ("exact", "pooled")}
    outcomes = values(run_ranks(audited, size, model.state_dict(), fault, options, deadline=120))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    expected = plain(audit(off(model) if fault else model, POPULATION, TEST, **options))
    close(outcomes[0][0], expected)
    codes = [finding["code"] for finding in expected["findings"]]
    assert bool(codes) == fault


def shuffled(rank, state):
    """A DataLoader that shuffles by torch's own random numbers, of which each rank has others."""
    torch.manual_seed(rank)
    model = Net()
    model.load_state_dict(state)
    state = torch.get_rng_state()
    data = TensorDataset(*samples(512, 1))
    test = DataLoader(TensorDataset(*samples(300, 2)), 50)
    result = audit(model.eval(), DataLoader(data, 64, shuffle=True), test, ranks=TorchRanks())
    assert torch.equal(state, torch.get_rng_state())
    return plain(result)


def test_loaders_that_shuffle():
    first, second = values(run_ranks(shuffled, 2, healthy().state_dict()))
    assert first == second and first["population_samples"] == 512


def split_already(rank, what):
    def loader(seed):
        data = TensorDataset(*samples(400, seed))
        return DataLoader(data, 50, sampler=DistributedSampler(data))

    given = {"population": POPULATION, "test": TEST, what: loader(3)}
    audit(healthy(), given["population"], given["test"], ranks=TorchRanks())


@pytest.mark.parametrize("what", ["population", "test"])
def test_samples_that_are_split_already_are_refused(what):
    for outcome in run_ranks(split_already, 2, what):
        assert type(outcome.error) is UserError, outcome.trace
        assert f"rank 1 has other {what} batches than rank 0" in str(outcome.error)
        assert "DistributedSampler" in str(outcome.error)


def a_score_that_fails(rank):
    def score(output, batch):
        if rank == 1:
            raise KeyError("weight")
        return -output.square().sum(1)

    audit(healthy(), POPULATION, TEST, score=score, ranks=TorchRanks())


def test_what_fails_on_one_rank_fails_on_all():
    for outcome in run_ranks(a_score_that_fails, 2):
        assert type(outcome.error) is RunFailed
        assert str(outcome.error) == "rank 1: KeyError: 'weight'"


def without_bn(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 4))
    return audit(model, POPULATION, TEST, ranks=TorchRanks()).verdict


def test_a_model_without_bn():
    first, second = values(run_ranks(without_bn, 2))
    assert first == second


# -- averages of ranks that differ -----------------------------------------------------------


def averages_of_its_own(model, rank, steps=80, scale=1.0):
    """Goes on averaging over mini-batches of this rank's own, with weights as they are."""
    model.train()
    with torch.no_grad():
        for step in range(steps):
            for x, _ in batches(64, 1000 + 100 * rank + step, scale=scale):
                model(x)
    return model.eval()


def with_ranks_averages(rank, state, fault, odd):
    model = Net()
    model.load_state_dict(state)
    averages_of_its_own(model, rank, scale=1.3 if fault == "other data" and rank == odd else 1.0)
    if fault == "frozen" and rank == odd:
        model.load_state_dict(state)
        model.bn3.reset_running_stats()
    if fault == "nan" and rank == odd:
        model.bn1.running_mean[0] = float("nan")
    result = audit(model, POPULATION, TEST, ranks=TorchRanks())
    return [f.to_dict() for f in result.findings]


@pytest.mark.parametrize("size", [2, 4])
def test_silence_where_ranks_have_other_mini_batches_of_the_same_data(size):
    for found in values(run_ranks(with_ranks_averages, size, healthy().state_dict(), None, 1)):
        assert found == []


@pytest.mark.parametrize(
    "fault, size, odd",
    [("other data", 2, 1), ("other data", 3, 0), ("frozen", 3, 2), ("nan", 3, 1)],
)
def test_the_rank_whose_averages_are_off_is_named(fault, size, odd):
    state = healthy().state_dict()
    outcomes = values(run_ranks(with_ranks_averages, size, state, fault, odd))
    assert all(found == outcomes[0] for found in outcomes)
    found = next(f for f in outcomes[0] if f["code"] == "ranks-differ")
    assert f"1 rank ({odd}) are not those of the others" in found["evidence"]
    layer = {"frozen": "bn3", "nan": "bn1"}.get(fault)
    assert layer is None or found["layers"] == [layer]


def test_the_noise_between_ranks_is_that_of_two_averages():
    """False alarms in simulated averages of many ranks, with no fault in them."""
    generator = np.random.default_rng(0)
    channels, batch, momentum = 32, 64, 0.1
    population = Values(np.zeros(channels), np.ones(channels))
    spread = Values(np.ones(channels), 2 * np.ones(channels))  # a normal value per sample

    def average():
        means, variances = 0.0, 1.0
        for _ in range(100):
            x = generator.standard_normal((batch, channels))
            means = (1 - momentum) * means + momentum * x.mean(0)
            variances = (1 - momentum) * variances + momentum * x.var(0, ddof=1)
        return Values(means, variances)

    alarms = 0
    for _ in range(50):
        of_ranks = {"bn": [average() for _ in range(4)]}
        layer = LayerFacts("bn", 1e-5, momentum, 100, of_ranks["bn"][0], population, spread, 0)
        facts = Facts([layer], batch, 10_000, of_ranks=of_ranks)
        alarms += any(f.code == "ranks-differ" for f in find(facts))
    assert alarms == 0
