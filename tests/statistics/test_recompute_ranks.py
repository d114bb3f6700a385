"""Recomputing over several ranks: one population, however it is spread, and one end for all."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
import warnings

import pytest
import torch
from references import assert_same, single_batch, snapshot, worst_error
from several import interrupt_me, kill_me, run_ranks, values
from test_recompute_exact import TOLERANCE, build, pooled_calls
from test_recompute_faults import Fault, batches, network
from test_recompute_independence import AttributeHandedOn, data
from torch import nn

from bnexp.errors import Interrupted, NotFinite, RunFailed, UserError
from bnexp.ranks import TorchRanks
from bnexp.statistics import METHODS, Statistics, recompute_statistics
from bnexp.statistics import exact as exact_module
from bnexp.statistics.spill import OffloadStore

pytestmark = pytest.mark.slow

# Seconds within which a failure reaches all ranks; generous, as the machine may be busy.
SOON = 60.0


def bits(statistics):
    """Statistics as plain data, to be compared and sent home."""
    return [
        (name, statistics.mean[name].tolist(), statistics.var[name].tolist(), count)
        for name, count in statistics.count.items()
    ]


def split(batches: list, size: int, how: str) -> list[list]:
    """The batches of each rank."""
    if how == "turns":
        return [batches[rank::size] for rank in range(size)]
    if how == "unequal":  # one batch, the rest, and then nothing
        return [batches[:1], batches[1:], *[[] for _ in range(size - 2)]]
    if how == "the last alone":
        return [*[[] for _ in range(size - 1)], batches]
    if how == "one each":
        return [[torch.cat(batches[rank::size])] for rank in range(size)]
    raise ValueError(how)


def quietly(model, mine, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recompute_statistics(model, mine, **options)


def recomputed(rank, size, cases):
    """For each case the statistics in bits, the model and the batches being as before."""
    found = []
    for name, how, options in cases:
        model, x = build(name)
        parts = [x[:1], x[1:8], x[8:11], *x[11:].split(5)]
        mine = split(parts, size, how)[rank]
        if options.pop("iterator", False):
            mine = iter(mine)
        before = snapshot(model)
        found.append(bits(quietly(model, mine, ranks=TorchRanks(), **options)))
        assert_same(before, snapshot(model))
    return found


CASES = [
    (name, how, {"iterator": how == "turns"})
    for name in ("branches", "mixed", "shared", "subclasses", "encoder with BN")
    for how in ("turns", "unequal", "the last alone", "one each")
]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_exact_is_one_float64_pass_however_the_samples_are_spread(size):
    outcomes = values(run_ranks(recomputed, size, size, CASES))
    assert all(found == outcomes[0] for found in outcomes)
    for (name, how, _), found in zip(CASES, outcomes[0], strict=True):
        model, x = build(name)
        truth = single_batch(model, lambda m, x=x: m(x.double()))
        check(found, truth, 1e-6, (name, how))


def check(found, truth, tolerance, what):
    tensors = {
        name: (torch.tensor(m).double(), torch.tensor(v).double()) for name, m, v, _ in found
    }
    statistics = Statistics(
        {n: m for n, (m, _) in tensors.items()},
        {n: v for n, (_, v) in tensors.items()},
        {name: count for name, _, _, count in found},
    )
    assert set(statistics.names) == truth.keys()
    for layer, calls in truth.items():
        mean, var, count = pooled_calls(calls)
        assert statistics.count[layer] == count
        assert worst_error(statistics, mean, var, layer) < tolerance, (what, layer)


def test_exact_of_deep_networks():
    cases = [("resnet18", "turns", {}), ("shufflenet", "unequal", {"memory": "4MiB"})]
    outcomes = values(run_ranks(recomputed, 2, 2, cases, deadline=120.0))
    assert outcomes[0] == outcomes[1]
    for (name, how, _), found in zip(cases, outcomes[0], strict=True):
        model, x = build(name)
        truth = single_batch(model, lambda m, x=x: m(x.double()))
        check(found, truth, TOLERANCE[name], (name, how))


METHOD_CASES = [
    (name, how, {"method": method, **options})
    for name in ("branches", "shared")
    for how in ("turns", "unequal", "the last alone")
    for method, options in [
        *[(method, {}) for method in METHODS],
        ("exact", {"memory": "150KiB"}),
        ("exact", {"stop_after": "left.1" if name == "branches" else "bn"}),
        ("pooled", {"stop_after": "left.1" if name == "branches" else "bn"}),
        *([("exact", {"calls": "joint"})] if name == "shared" else []),
    ]
]


def one_process(cases):
    """What one process finds in all batches, in the order in which the ranks have them."""
    found = []
    for name, how, options in cases:
        model, x = build(name)
        parts = [x[:1], x[1:8], x[8:11], *x[11:].split(5)]
        everything = [batch for mine in split(parts, 3, how) for batch in mine]
        found.append(bits(quietly(model, everything, **options)))
    return found


def test_all_methods_and_options_are_those_of_one_process():
    outcomes = values(run_ranks(recomputed, 3, 3, METHOD_CASES))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    for case, found, expected in zip(
        METHOD_CASES, outcomes[0], one_process(METHOD_CASES), strict=True
    ):
        assert [(n, c) for n, _, _, c in found] == [(n, c) for n, _, _, c in expected], case
        for (name, mean, var, _), (_, other_mean, other_var, _) in zip(
            found, expected, strict=True
        ):
            torch.testing.assert_close(
                (torch.tensor(mean).double(), torch.tensor(var).double()),
                (torch.tensor(other_mean).double(), torch.tensor(other_var).double()),
                rtol=2e-6,
                atol=2e-6,
                msg=lambda text, c=case, n=name: f"{c} {n}: {text}",
            )


def influencing(rank, size, how):
    """Passes that influence one another on the ranks that have several of them."""
    mine = split(data(6), size, how)[rank]
    model = AttributeHandedOn()
    with pytest.warns(UserWarning, match="6 passes over the batches"):
        found = recompute_statistics(model, mine, ranks=TorchRanks())
    return bits(found)


@pytest.mark.parametrize("how", ["turns", "unequal", "the last alone"])
def test_all_ranks_go_layer_by_layer_where_one_must(how):
    torch.manual_seed(0)
    outcomes = values(run_ranks(seeded, 3, influencing, 3, how))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    torch.manual_seed(0)
    model = AttributeHandedOn()
    x = torch.cat(data(6))
    check(outcomes[0], single_batch(model, lambda m: m(x.double())), 1e-6, how)


def seeded(rank, function, *arguments):
    torch.manual_seed(0)
    return function(rank, *arguments)


def counted(rank):
    """Which batches a rank runs, and how often."""
    ran = []
    model = network()
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    mine = batches(4)[:1] if rank == 0 else []
    quietly(model, mine, ranks=TorchRanks())
    single = len(ran)
    ran.clear()
    quietly(model, mine if rank == 0 else batches(4)[1:3], ranks=TorchRanks())
    return single, len(ran)


def test_a_single_batch_is_one_of_the_union():
    # One pass where it is all there is; else a probe and one each in the sweep, and two scouts
    # among several, which then pass again.
    assert values(run_ranks(counted, 2)) == [(1, 2), (0, 7)]


# -- memory ----------------------------------------------------------------------------------


def estimated(rank, memory):
    said = []

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("bnexp.statistics")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    mine = [batches(12)[:3], batches(12)[3:], []][rank]
    quietly(network(), mine, ranks=TorchRanks(), memory=memory)
    return said


def test_the_estimate_is_of_the_union():
    first, second, none = values(run_ranks(estimated, 3, "200KiB"))
    assert first == second and len(first) == 1 and none == []
    assert first[0].startswith("exact: 12 batches, ")
    assert "bound of 200 KiB" in first[0]


# -- faults ----------------------------------------------------------------------------------


def broken_after(count, error):
    yield from batches(count) if count else ()
    raise error


def with_nan(count):
    for number, batch in enumerate(batches(count)):
        yield batch * float("nan") if number == count - 1 else batch


def interrupting(count):
    yield from batches(count)
    interrupt_me()
    time.sleep(1)


class FullDisk(OffloadStore):
    def write(self, storage):
        self.error = OSError(errno.ENOSPC, "No space left on device")
        raise self.error


def faulty(rank, case, method, memory):
    """Rank 1 has the fault; each has its model as before and leaves no file."""
    model = network(*([Fault(ZeroDivisionError, 3)] if case == "model" and rank == 1 else []))
    if case == "model" and rank != 1:
        model = network(Fault(ZeroDivisionError, 10**9))
    before = snapshot(model)
    mine = batches(6)
    if rank == 1:
        if case == "loader":
            mine = broken_after(4, OSError(errno.EIO, "Input/output error", "images"))
        elif case == "first batch":
            mine = broken_after(0, ValueError("no such folder"))
        elif case == "nan":
            mine = with_nan(5)
        elif case == "interrupt":
            mine = interrupting(3)
        elif case == "disk":
            exact_module.OffloadStore = FullDisk
        elif case == "one value":
            mine = [torch.ones(1, 2, 7, 7)]
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        start = time.monotonic()
        try:
            quietly(model, mine, method=method, memory=memory, ranks=TorchRanks())
        finally:
            tempfile.tempdir = None
            assert_same(before, snapshot(model))
            assert not os.listdir(folder)
            assert time.monotonic() - start < SOON
    return "no error"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case, kind, text",
    [
        ("loader", RunFailed, "rank 1: the disk failed (images)"),
        ("first batch", RunFailed, "rank 1: ValueError: no such folder"),
        ("nan", NotFinite, "rank 1: NaN or infinity in the input of BN layer '1', batch number 4"),
        ("model", RunFailed, "rank 1: ZeroDivisionError: provoked"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(case, kind, text, method):
    for outcome in run_ranks(faulty, 3, case, method, None, deadline=2 * SOON):
        assert type(outcome.error) is kind, outcome.trace
        assert str(outcome.error).startswith(text)


def test_a_disk_that_is_full_on_one_rank():
    for outcome in run_ranks(faulty, 2, "disk", "exact", "150KiB", deadline=2 * SOON):
        assert type(outcome.error) is UserError, outcome.trace
        assert str(outcome.error).startswith("rank 1: the disk under ")


def test_a_mini_batch_of_one_value_on_one_rank():
    for outcome in run_ranks(faulty, 2, "one value", "pooled", None, deadline=2 * SOON):
        assert type(outcome.error) is UserError, outcome.trace
        assert str(outcome.error).startswith("rank 1: BN layer '7': batch number 0")


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_on_one_rank(method):
    found = run_ranks(faulty, 3, "interrupt", method, None, deadline=2 * SOON)
    assert type(found[1].error) is KeyboardInterrupt, found[1].trace
    for outcome in (found[0], found[2]):
        assert type(outcome.error) is Interrupted, outcome.trace
        assert str(outcome.error) == "rank 1: interrupted"


def killed(rank, method):
    def dying():
        yield from batches(3)
        kill_me()

    model = network()
    before = snapshot(model)
    try:
        quietly(model, dying() if rank == 1 else batches(3), method=method, ranks=TorchRanks())
    finally:
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_a_killed_rank(method):
    found = run_ranks(killed, 3, method, deadline=SOON)
    for outcome in (found[0], found[2]):
        assert type(outcome.error) is RunFailed, outcome.trace
        assert "another rank was killed" in str(outcome.error)


def nothing_at_all(rank, method):
    quietly(network(), [], method=method, ranks=TorchRanks())


def other_arguments(rank, method):
    quietly(network(), batches(2), method=method if rank else "exact", ranks=TorchRanks())


def other_weights(rank, method):
    model = network()
    if rank == 2:
        model[3].bias.data[0] += 1e-6
    quietly(model, batches(2), method=method, ranks=TorchRanks())


def other_buffers(rank, method):
    model = network()
    model[3].register_buffer("scale", torch.tensor(2.0 if rank == 1 else 1.0))
    quietly(model, batches(2), method=method, ranks=TorchRanks())


def other_eps(rank, method):
    model = network()
    model[4].eps = 0.1 if rank == 2 else 1e-5
    quietly(model, batches(2), method=method, ranks=TorchRanks())


def other_layers(rank, method):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            for number, layer in enumerate(self.inner):
                if rank != 1 or number != 4:
                    x = layer(x)
            return x

    torch.manual_seed(0)
    quietly(Skipping(), batches(2), method="exact", ranks=TorchRanks())


@pytest.mark.parametrize(
    "function, text",
    [
        (nothing_at_all, "there are no batches to recompute from: is the iterator used up?"),
        (
            other_arguments,
            "the arguments of recompute_statistics: rank 0 has {'calls': 'each', 'method': 'exact'",
        ),
        (other_weights, "the ranks' models differ: parameter '3.bias' of rank 2 is not that"),
        (other_buffers, "the ranks' models differ: buffer '3.scale' of rank 1 is not that"),
        (other_eps, "the ranks' models differ: the eps of BN layer '4' of rank 2 is not that"),
        (
            other_layers,
            "rank 1 goes on to BN layer 'inner.7' where rank 0 goes on to BN layer 'inner.4': "
            "the model's path depends on its data",
        ),
    ],
)
def test_what_all_ranks_refuse_alike(function, text):
    for outcome in run_ranks(function, 3, "pooled", deadline=SOON):
        assert type(outcome.error) is UserError, outcome.trace
        assert str(outcome.error).startswith(text), outcome.error


def ddp(rank):
    model = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(UserError, match=r"DistributedDataParallel.*\.module"):
        recompute_statistics(model, batches(2), ranks=TorchRanks())
    return bits(quietly(model.module, batches(2), ranks=TorchRanks()))


def test_a_model_inside_ddp():
    first, second = values(run_ranks(ddp, 2))
    assert first == second


def slow_rank(rank):
    """Rank 1 fails while the others have a long stretch of work before them."""

    def long():
        for batch in batches(60) * 20:
            time.sleep(0.1)
            yield batch

    start = time.monotonic()
    with pytest.raises(RunFailed, match="rank 1: ValueError: early"):
        recompute_statistics(
            network(),
            broken_after(2, ValueError("early")) if rank == 1 else long(),
            method="pooled",
            ranks=TorchRanks(),
        )
    return time.monotonic() - start


def test_a_failure_is_noticed_in_the_midst_of_the_work():
    assert max(values(run_ranks(slow_rank, 3))) < SOON  # of the 120 s that the work would take
