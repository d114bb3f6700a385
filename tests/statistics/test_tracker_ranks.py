"""A tracker over several ranks is that of one process which has all of each mini-batch."""

from __future__ import annotations

import pytest
import torch
from several import run_ranks, values
from torch import nn

import bnexp
from bnexp.errors import RunFailed, UserError
from bnexp.nn.modes import set_normalization_batch
from bnexp.ranks import TorchRanks
from bnexp.statistics.banks import average_, merged_averages

pytestmark = pytest.mark.slow

LINEAR = {
    "plain": bnexp.Ema(0.9),
    "debiased": bnexp.Ema(0.7, debias=True),
    "average": bnexp.Cumulative(),
}
EVERY = {**LINEAR, "pooled": bnexp.Pooled(), "window": bnexp.Pooled(window=3)}
STEPS = 7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    ).append(nn.BatchNorm1d(5))


def ready(dtype=torch.float64):
    model = network().to(dtype)
    model.eval()(torch.zeros(1, 2, 6, 6, dtype=dtype))
    return model.train()


def mini_batch(step: int, samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x * (1 + step) + torch.linspace(0, 3, samples).view(-1, 1, 1, 1)


def plain(tracker):
    return {
        name: [(n, s.mean[n].tolist(), s.var[n].tolist(), s.count[n]) for n in s.names]
        for name, s in tracker.statistics().items()
    }


def shares(size: int, part: int, samples: int) -> list[slice]:
    """Whole sub-batches for each rank, the first ranks having more."""
    parts = samples // part
    ends = [part * ((parts * (rank + 1) + size - 1) // size) for rank in range(size)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def tracked(rank, size, rules, part, samples, steps=STEPS, read=()):
    """Statistics at the end; with ghost batches where a rank has several sub-batches."""
    model = ready()
    set_normalization_batch(model, part)
    mine = shares(size, part, samples)[rank]
    with bnexp.StatisticsTracker(model, rules, ranks=TorchRanks()) as tracker:
        for step in range(steps):
            model(mini_batch(step, samples)[mine])
            tracker.update()
            if step in read:
                tracker.statistics()
        found = plain(tracker)
        shown = [t.tolist() for name, t in model.state_dict().items() if "running" in name]
        state = tracker.state_dict()
    return found, shown, state


def of_one_process(rules, part, samples, steps=STEPS):
    model = ready()
    set_normalization_batch(model, part)
    with bnexp.StatisticsTracker(model, rules) as tracker:
        for step in range(steps):
            model(mini_batch(step, samples))
            tracker.update()
        return plain(tracker)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, layers in expected.items():
        for (layer, mean, var, count), (_, m, v, c) in zip(layers, found[name], strict=True):
            assert c == count
            for ours, theirs in ((m, mean), (v, var)):
                assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12), (name, layer)


@pytest.mark.parametrize("read", [(), (0, 3, 4)], ids=["at the end", "in between"])
@pytest.mark.parametrize("rules", [LINEAR, EVERY], ids=["linear", "all"])
@pytest.mark.parametrize("size, part, samples", [(2, 4, 8), (3, 4, 12), (3, 3, 15)])
def test_a_tracker_over_ranks_is_that_of_one_process(size, part, samples, rules, read):
    outcomes = values(run_ranks(tracked, size, size, rules, part, samples, STEPS, read))
    expected = of_one_process(rules, part, samples)
    for found, shown, _ in outcomes:
        assert found == outcomes[0][0] and shown == outcomes[0][1]
    assert_close(outcomes[0][0], expected)
    # The buffers show the first estimator.
    first = [part for _, mean, var, _ in outcomes[0][0]["plain"] for part in (mean, var)]
    assert outcomes[0][1] == first


def resumed(rank, size, rules, state):
    """Goes on from the state of two ranks, on `size` of them."""
    model = ready()
    set_normalization_batch(model, 4)
    mine = shares(size, 4, 16)[rank]
    with bnexp.StatisticsTracker(model, rules, ranks=TorchRanks()) as tracker:
        tracker.load_state_dict(state)
        for step in range(3, STEPS):
            model(mini_batch(step, 16)[mine])
            tracker.update()
        return plain(tracker)


@pytest.mark.parametrize("rules", [LINEAR, EVERY], ids=["linear", "all"])
def test_another_number_of_ranks_goes_on(rules):
    (_, _, state), (_, _, other) = values(run_ranks(tracked, 2, 2, rules, 4, 16, 3))
    for name, value in state.items():
        same = torch.equal if isinstance(value, torch.Tensor) else dict.__eq__
        assert same(value, other[name]), name
    expected = of_one_process(rules, 4, 16)
    found = values(run_ranks(resumed, 4, 4, rules, state))
    assert all(one == found[0] for one in found)
    assert_close(found[0], expected)


def counting(rank, rules):
    """How many messages a step takes."""
    model = ready()
    ranks = TorchRanks()
    exchanged, exchange = [], ranks._line.exchange
    ranks._line.exchange = lambda *a: exchanged.append(1) or exchange(*a)
    with bnexp.StatisticsTracker(model, rules, ranks=ranks) as tracker:
        before = len(exchanged)
        for step in range(5):
            model(mini_batch(step, 4))
            tracker.update()
            model.state_dict()
            model.eval()(mini_batch(step, 4))
            model.train()
        return len(exchanged) - before


def test_linear_estimators_need_no_message_per_step():
    assert values(run_ranks(counting, 2, LINEAR)) == [0, 0]
    assert values(run_ranks(counting, 2, EVERY)) == [5, 5]


def unequal(rank, rules):
    """Rank 1 has no samples in every second step, and layer 5 runs on rank 0 alone in the last."""
    model = ready()
    ranks = TorchRanks()
    with bnexp.StatisticsTracker(model, rules, ranks=ranks) as tracker:
        for step in range(6):
            if rank == 0 or step % 2 == 0:
                x = mini_batch(step, 8)[4 * rank : 4 * rank + 4]
                (model[:2] if rank == 1 and step == 4 else model)(x)
            tracker.update()
        return plain(tracker)


def test_ranks_that_have_nothing_in_a_step():
    first, second = values(run_ranks(unequal, 2, EVERY))
    assert first == second
    model = ready()
    with bnexp.StatisticsTracker(model, EVERY) as tracker:
        for step in range(6):
            x = mini_batch(step, 8)
            set_normalization_batch(model, 4)
            if step % 2:
                model(x[:4])
            elif step < 4:
                model(x)
            else:  # the first layer has both halves, the last only one
                half = model[1](model[0](x))[:4]
                model[5](model[4](model[3](model[2](half))))
            tracker.update()
        assert_close(first, plain(tracker))


def across(rank):
    """Where all ranks have the whole mini-batch, merging changes nothing."""
    model = ready()
    with bnexp.StatisticsTracker(model, LINEAR, ranks=TorchRanks()) as tracker:
        for step in range(5):
            model(mini_batch(step, 8))
            tracker.update()
        return plain(tracker)


def test_ranks_that_are_alike_stay_so_to_the_bit():
    model = ready()
    with bnexp.StatisticsTracker(model, LINEAR) as tracker:
        for step in range(5):
            model(mini_batch(step, 8))
            tracker.update()
        alone = plain(tracker)
    assert values(run_ranks(across, 3)) == [alone] * 3


def failing(rank):
    ranks = TorchRanks()
    model = ready()
    with ranks.together("training"), bnexp.StatisticsTracker(model, EVERY, ranks=ranks) as tracker:
        for step in range(5):
            model(mini_batch(step, 8))
            if rank == 1 and step == 2:
                raise ZeroDivisionError("in the loss")
            tracker.update()


def other_rules(rank):
    bnexp.StatisticsTracker(ready(), LINEAR if rank else EVERY, ranks=TorchRanks())


def other_widths(rank):
    """As many channels in all."""
    widths = (4, 6) if rank else (6, 4)
    model = nn.Sequential(*(nn.BatchNorm2d(width) for width in widths))
    bnexp.StatisticsTracker(model, LINEAR, ranks=TorchRanks())


def one_layer_more(rank):
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(1 + rank)))
    bnexp.StatisticsTracker(model, LINEAR, ranks=TorchRanks())


@pytest.mark.parametrize("function, layer", [(other_widths, "0"), (one_layer_more, "1")])
def test_ranks_with_other_layers_are_refused(function, layer):
    for outcome in run_ranks(function, 2, deadline=30):
        assert type(outcome.error) is UserError, outcome.trace
        text = f"the ranks' models differ: BN layer '{layer}' of rank 1 is not that of rank 0"
        assert str(outcome.error).startswith(text)


def test_faults():
    for outcome in run_ranks(failing, 2):
        assert type(outcome.error) is RunFailed
        assert str(outcome.error) == "rank 1: ZeroDivisionError: in the loss"
    for outcome in run_ranks(other_rules, 2):
        assert type(outcome.error) is UserError
        assert "the estimators of a StatisticsTracker: rank 0 has" in str(outcome.error)


@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.0, 1.0, 1.0)])
def test_merged_averages_against_the_average_of_the_streams(shares):
    torch.manual_seed(0)
    decay = torch.tensor([0.9, 0.5, 1.0]).double().view(-1, 1, 1)
    streams = torch.randn(3, 20, 2, 4, dtype=torch.float64)
    weights = torch.tensor(shares).double()
    start, mass = torch.randn(3, 2, 4).double(), torch.tensor([10.0, 0, 0]).double()
    mass = mass.view(-1, 1, 1).repeat(1, 1, 4)

    def run(batches):
        values, weight_sum = start.clone(), mass.clone()
        for batch in batches:
            average_(values, weight_sum, decay, batch)
        return values, weight_sum

    each = [run(stream) for stream in streams]
    found = merged_averages(
        [v for v, _ in each], [w for _, w in each], [w.expand(4) for w in weights]
    )
    together = (streams * weights.view(3, 1, 1, 1)).sum(0) / weights.sum()
    torch.testing.assert_close(found, run(together), rtol=1e-12, atol=1e-12)
