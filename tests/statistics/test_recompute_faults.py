"""Whatever goes wrong: one clear line, the model untouched, nothing left behind."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
import threading

import greenlet
import pytest
import torch
from references import assert_same, snapshot
from torch import nn

from bnexp.errors import UserError
from bnexp.statistics import METHODS, estimate_memory, recompute_statistics
from bnexp.statistics.spill import OffloadStore, memory_bound


class Fault(nn.Module):
    """Raises from its n-th call on. (It counts in no attribute, or `exact` would not sweep.)"""

    def __init__(self, error: type[BaseException], at: int):
        super().__init__()
        self.error, self.at, self.calls = error, at, itertools.count(1)

    def forward(self, x):
        if next(self.calls) >= self.at:
            raise self.error("provoked")
        return x


def network(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *extra,
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4),
    )


def batches(count: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count * 5, 2, 12, 12, generator=generator).split(5))


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """Checks greenlets, threads, temporary files and open files."""
    made = []

    class Recorded(greenlet.greenlet):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("bnexp.statistics.lockstep.greenlet", Recorded)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert all(g.dead for g in made)
    assert threading.active_count() == threads
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("memory", [None, "200KiB"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 8])
def test_an_exception_in_a_layer(error, at, method, memory):
    model = network(Fault(error, at))
    before = snapshot(model)
    with pytest.raises(error, match="provoked"):
        recompute_statistics(model, batches(), method, memory=memory)
    assert_same(before, snapshot(model))
    model[3].at = 10**9
    recompute_statistics(model, batches(), method)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_in_the_iterator(error, method):
    def broken():
        yield from batches(6)
        raise error("provoked")

    model = network()
    before = snapshot(model)
    with pytest.raises(error, match="provoked"):
        recompute_statistics(model, broken(), method)
    assert_same(before, snapshot(model))


@pytest.mark.usefixtures("nothing_left")
def test_a_model_that_catches_everything_does_not_keep_a_pass_alive():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fault = nn.BatchNorm1d(2), nn.BatchNorm1d(2), Fault(OSError, 20)

        def forward(self, x):
            for _ in range(3):
                try:
                    x = self.a(x)
                except BaseException:
                    x = x + 1
            return self.b(self.fault(x))

    with pytest.raises(OSError, match="provoked"):
        recompute_statistics(Stubborn(), torch.randn(60, 2).split(3), "exact")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 4, 11])
def test_nan_in_the_data_is_named(method, value, where):
    data = batches()
    data[where][2, 1, 5, 5] = value
    model = network()
    before = snapshot(model)
    with pytest.raises(UserError, match=f"'1', batch number {where} "):
        recompute_statistics(model, data, method)
    assert_same(before, snapshot(model))


def test_nan_that_arises_in_the_model_is_named():
    model = network()
    model[3].weight.data[2] = float("inf")
    with pytest.raises(UserError, match="'4', batch number 0 "):
        recompute_statistics(model, batches(), "exact")


@pytest.mark.parametrize("method", METHODS)
def test_no_batches(method):
    for empty in ([], iter(())):
        with pytest.raises(UserError, match="no batches"):
            recompute_statistics(network(), empty, method)


def test_wrong_arguments():
    with pytest.raises(UserError, match="'precise' is unknown: choose batch-mean, pooled, exact"):
        recompute_statistics(network(), batches(), "precise")
    with pytest.raises(UserError, match="no BN layer"):
        recompute_statistics(nn.Linear(2, 2), batches())
    with pytest.raises(UserError, match="not a dict: pass forward="):
        recompute_statistics(network(), [{"x": 1}])
    with pytest.raises(UserError, match="TorchScript"):
        recompute_statistics(torch.jit.trace(network().eval(), batches()[0]), batches())
    with pytest.raises(UserError, match="reaches no BN layer"):
        recompute_statistics(network(), batches(), forward=lambda model, batch: None)


@pytest.mark.parametrize("method", ["batch-mean", "pooled"])
def test_one_value_per_channel_in_a_batch(method):
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(UserError, match=r"'0': batch number 1 .* has 1 value per channel"):
        recompute_statistics(model, [torch.randn(4, 3), torch.randn(1, 3)], method)


def test_one_value_per_channel_is_fine_in_exact_but_not_in_all():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(4, 3, dtype=torch.float64)
    found = recompute_statistics(model, x.split(1), "exact")
    assert torch.allclose(found.var["0"], x.var(0, correction=0))
    with pytest.raises(UserError, match="at least two"):
        recompute_statistics(model, [x[:1]], "exact")


def test_an_empty_batch_counts_nothing_in_exact_and_is_refused_elsewhere():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(4, 3, dtype=torch.float64)
    found = recompute_statistics(model, [x[:2], x[:0], x[2:]], "exact")
    assert torch.allclose(found.var["0"], x.var(0, correction=0))
    with pytest.raises(UserError, match=r"batch number 1 .* no values per channel"):
        recompute_statistics(model, [x[:2], x[:0], x[2:]], "pooled")


# -- memory -----------------------------------------------------------------------------------


class Skips(nn.Module):
    """Holds early activations to the end; passes use a table that some other pass made, and which
    no module holds."""

    class Cache:
        calls, table = 0, None

    def __init__(self):
        super().__init__()
        self.cache = self.Cache()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)) for _ in range(4)
        )

    def forward(self, x):
        if self.cache.calls % 3 == 0:
            self.cache.table = torch.linspace(0, 1, x.shape[-1]) * 2
        self.cache.calls += 1
        skip, views = x * 2, []
        for block in self.blocks:
            x = torch.relu(block(x)) + self.cache.table
            views.append(x[:, :1].transpose(2, 3))
        return {"out": (x + skip, torch.cat(views, 1))}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("make", [network, Skips])
@pytest.mark.parametrize("kind", [list, iter])
def test_what_waits_elsewhere_gives_the_same_bits(make, kind, monkeypatch):
    written = []
    put = OffloadStore.write
    monkeypatch.setattr(
        OffloadStore, "write", lambda self, s: written.append(s.nbytes()) or put(self, s)
    )
    data = list(torch.randn(60, 2, 24, 24).split([7] * 8 + [4]))
    torch.manual_seed(0)
    expected = recompute_statistics(make(), data, "exact")
    assert not written
    torch.manual_seed(0)
    found = recompute_statistics(make(), kind(data), "exact", memory="600KiB")
    assert sum(written) > 5e5
    for name in expected.names:
        assert torch.equal(found.mean[name], expected.mean[name])
        assert torch.equal(found.var[name], expected.var[name])


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_the_bound_is_kept():
    """Tensors alive at once, seen from outside: by the storages the garbage collector finds."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    model = Skips()
    data = list(torch.randn(200, 2, 32, 32).split(5))
    alive, peak = weakref.WeakSet(), 0

    class Watch(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls):  # else torch imports its compiler, which leaves a folder
            return False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                alive.add(out.untyped_storage())
                peak = max(peak, sum(s.nbytes() for s in alive))
            return out

    bound = 2 * 2**20
    own = sum(t.numel() * 4 for t in data)
    with Watch():
        recompute_statistics(model, data, "exact", memory=bound)
    assert peak < own + bound * 1.2
    everything = estimate_memory(model, data).total
    assert everything > 3 * bound


def test_the_estimate_is_what_waits():
    estimate = estimate_memory(network(), batches(), memory="1GiB")
    # BN input of the first layer: 5 × 8 × 10 × 10 floats; inputs belong to the caller's list.
    assert estimate.batches == 12
    first = 5 * 8 * 10 * 10 * 4
    assert first <= estimate.waiting <= 2.2 * first
    assert estimate.working >= estimate.waiting
    assert estimate.total == 12 * estimate.waiting + estimate.working
    assert estimate.elsewhere == 0
    streamed = estimate_memory(network(), iter(batches()))
    assert streamed.batches is None
    assert streamed.total is None
    assert streamed.waiting >= first + 5 * 2 * 12 * 12 * 4


def test_too_little_memory_and_disk_says_what_would_fit(monkeypatch):
    monkeypatch.setattr(OffloadStore, "disk_left", staticmethod(lambda: 100 * 2**10))
    with pytest.raises(UserError, match=r"about \d+ samples would fit.*TMPDIR") as caught:
        recompute_statistics(network(), batches(200), "exact", memory="300KiB")
    fit = int(str(caught.value).split("about ")[1].split()[0])
    assert 0 < fit < 1000
    recompute_statistics(network(), batches(fit // 5), "exact", memory="300KiB")
    with pytest.raises(UserError, match=r"one batch needs .* use smaller batches"):
        recompute_statistics(network(), batches(), "exact", memory="10KiB")


@pytest.mark.usefixtures("nothing_left")
def test_a_disk_that_fills_up_half_way(monkeypatch):
    put, model = OffloadStore._allocate, network()
    calls = []

    def full(self, size):
        calls.append(size)
        return put(self, size)

    class Full:
        def __init__(self, *args, **kwargs):
            self.left = 5

        def seek(self, offset):
            pass

        def write(self, data):
            self.left -= 1
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

        def close(self):
            pass

    monkeypatch.setattr(OffloadStore, "_allocate", full)
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    before = snapshot(model)
    with pytest.raises(UserError, match=r"full \(No space left on device\): about \d+ samples"):
        recompute_statistics(model, iter(batches()), "exact", memory="200KiB")
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 * 2**30), ("500MB", 500 * 10**6), ("1.5k", 1500), (4096, 4096), ("77", 77)],
)
def test_amounts_of_memory(text, size):
    assert memory_bound(text, torch.device("cpu")) == size


def test_shares_of_memory():
    cpu = torch.device("cpu")
    half, percent = memory_bound(0.5, cpu), memory_bound("25%", cpu)
    assert 0.7 < memory_bound(None, cpu) / half < 1.4
    assert 1.4 < half / percent < 2.8


@pytest.mark.parametrize("wrong", ["much", "-3", 0, -1, 1.5, 0.0, True, "150%", "2 apples", []])
def test_amounts_that_are_none(wrong):
    with pytest.raises(UserError, match="amount of memory"):
        recompute_statistics(network(), batches(), memory=wrong)


# -- what others hold -------------------------------------------------------------------------


def test_activations_kept_by_a_hook_are_whole_after_a_bounded_sweep():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    ).eval()
    data = list(torch.randn(40, 3, 20, 20).split(4))
    kept = []
    model[0].register_forward_hook(lambda layer, inputs, output: kept.append(output.detach()))
    recompute_statistics(model, data, "exact", memory=400_000)
    whole = [found for found in kept if len(found) == 4][-len(data) :]  # the others: of samples
    with torch.no_grad():
        for found, x in zip(whole, data, strict=True):
            assert torch.equal(found, nn.functional.conv2d(x, model[0].weight, model[0].bias))


@pytest.mark.parametrize("method", METHODS)
def test_buffers_that_a_forward_pass_changes_are_put_back(method):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            self.register_buffer("passes", torch.zeros(()), persistent=False)
            self.register_buffer("last", torch.zeros(3))

        def forward(self, x):
            self.passes += 1
            self.last = x[0]
            return self.bn(x)

    model = Counting()
    passes, last = model.passes, model.last
    recompute_statistics(model, torch.randn(10, 3).split(5), method)
    assert model.passes is passes and passes == 0
    assert model.last is last and not last.any()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_empty_batch_anywhere_counts_nothing(position):
    torch.manual_seed(0)
    model, full = nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(4, 3), torch.randn(4, 3)]
    batches = [*full[:position], torch.zeros(0, 3), *full[position:]]
    found = recompute_statistics(model, batches, "exact")
    expected = torch.cat(full).double()
    assert found.count == {"0": 8}
    assert torch.allclose(found.var["0"], expected.var(0, correction=0), rtol=1e-6)
