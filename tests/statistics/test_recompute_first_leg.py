"""What `exact` spares: the largest activations, made again, and whole batches, samples instead."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import deque
from typing import ClassVar

import pytest
import torch
from references import assert_same, single_batch, snapshot, worst_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnexp.errors import UserError
from bnexp.statistics import estimate_memory, recompute_statistics
from bnexp.statistics import probe as probe_module
from bnexp.statistics.exact import _Sweep


class Stem(nn.Module):
    """By far the largest activation waits at the first BN layer, and is cheap to make."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.pool, self.convolution = nn.MaxPool2d(4), nn.Conv2d(12, 64, 3, padding=1)
        self.second = nn.BatchNorm2d(64)
        self.last = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))

    def before(self, x):
        return self.stem(x)

    def forward(self, x):
        x = self.pool(torch.relu(self.first(self.before(x))))
        x = torch.relu(self.second(self.convolution(x)))
        return self.last(x)


def data(count: int = 6, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 2, 32, 32, generator=generator) * (1 + i) for i in range(count)]


@pytest.fixture
def begun(monkeypatch):
    """Sweeps: whether the first leg is run again."""
    sweeps = []
    run = _Sweep.run

    def recorded(self, batches):
        sweeps.append(self._again)
        run(self, batches)

    monkeypatch.setattr(_Sweep, "run", recorded)
    return sweeps


def check(model, batches, kind=list, **options):
    truth = single_batch(model, lambda m: m(torch.cat(batches).double()))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = recompute_statistics(model, kind(batches), **options)
    assert_same(before, snapshot(model))
    for name, ((mean, var, count),) in truth.items():
        assert found.count[name] == count
        assert worst_error(found, mean, var, name) < 2e-6, name
    return found


@pytest.mark.parametrize("memory", [None, "1MiB"])
@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_first_leg_again_gives_the_same_bits(kind, memory, count, begun, monkeypatch):
    torch.manual_seed(0)
    model = Stem()
    found = check(model, data(count), kind, memory=memory)
    assert all(begun)
    monkeypatch.setattr(probe_module, "_LESS", 0.0)
    kept = recompute_statistics(model, data(count))
    assert not begun.pop()
    for name in kept.names:
        assert torch.equal(kept.mean[name], found.mean[name])
        assert torch.equal(kept.var[name], found.var[name])


def peak_of(model, batches) -> int:
    """The most bytes in tensors alive at once, beside the batches."""
    alive, peak = weakref.WeakSet(), 0

    class Watch(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls):  # else torch imports its compiler
            return False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                alive.add(out.untyped_storage())
                peak = max(peak, sum(storage.nbytes() for storage in alive))
            return out

    with Watch():
        recompute_statistics(model, batches)
    return peak


def test_memory_is_that_of_the_next_layer(begun, monkeypatch):
    torch.manual_seed(0)
    model, batches = Stem(), data(20)
    last, first = 2 * 8 * 64 * 8 * 8 * 4, 8 * 12 * 32 * 32 * 4
    estimate = estimate_memory(model, batches)
    assert (estimate.waiting, estimate.layer) == (last, "last.1")
    peak = peak_of(model, batches)
    assert begun == [True]
    assert peak < 1.1 * estimate.total + sum(b.nbytes for b in batches)
    monkeypatch.setattr(probe_module, "_LESS", 0.0)
    assert estimate_memory(model, batches).waiting == first
    assert peak < 0.75 * peak_of(model, batches)


def test_the_inputs_of_an_iterator_wait_instead():
    batches = data(4)
    estimate = estimate_memory(Stem(), iter(batches))
    held = 2 * 8 * 64 * 8 * 8 * 4 + batches[0].nbytes
    assert held >= estimate.waiting >= batches[0].nbytes
    buffer = torch.empty_like(batches[0])

    class Refilled:
        def __len__(self):
            return len(batches)

        def __iter__(self):
            for batch in batches:
                yield buffer.copy_(batch)

    torch.manual_seed(0)
    check(Stem(), batches, lambda _: Refilled())


def test_dropout_before_the_first_layer(begun):
    class Dropping(Stem):
        def before(self, x):
            return nn.functional.dropout2d(self.stem(x), 0.5, self.training)

    torch.manual_seed(0)
    check(Dropping(), data())
    assert begun and all(begun)


def test_random_numbers_before_the_first_layer(begun):
    """Drawn once for each batch, so that the second layer meets what the first has counted."""
    drawn = []

    class Noisy(Stem):
        def before(self, x):
            drawn.append(len(x))
            return self.stem(x) + 1e-7 * torch.rand(())

    torch.manual_seed(0)
    recompute_statistics(Noisy(), data())
    assert begun == [False]
    assert drawn.count(8) == 6


def test_random_numbers_of_an_own_generator(begun):
    class Noisy(Stem):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def before(self, x):
            return self.stem(x * torch.rand((), generator=self.generator))

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="does not bring the same values to the first BN layer"):
        recompute_statistics(Noisy(), data())
    assert begun[0]
    with pytest.raises(UserError, match="pass a list of batches"):
        recompute_statistics(Noisy(), iter(data()))


def test_what_is_handed_on_before_the_first_layer_is_not_handed_on_twice(begun):
    class Elsewhere:
        skips: ClassVar[deque] = deque()

    class First(Stem):
        """First in, first out."""

        def before(self, x):
            Elsewhere.skips.append(nn.functional.avg_pool2d(x, 4))
            return super().before(x)

        def forward(self, x):
            x = super().forward(x)
            return x[:, :2] + Elsewhere.skips.popleft()

    torch.manual_seed(0)
    check(First(), data())
    assert begun == [False]
    assert not Elsewhere.skips


def test_settings_that_would_have_to_be_put_back(begun):
    class Entered(Stem):
        def forward(self, x):
            manager = torch.inference_mode()
            manager.__enter__()
            x = super().forward(x)
            manager.__exit__(None, None, None)
            return x

    torch.manual_seed(0)
    check(Entered(), data())
    assert begun == [False]


def test_an_attribute_that_a_later_pass_would_put_back_unseen():
    """Set by the second of the batches that wait in the first layer, met by those behind."""

    class Loud(Stem):
        scale = 1.0

        def before(self, x):
            if 1 < x.abs().max() / 4 < 1.5:
                self.scale = 3.0
            return self.stem(x) * self.scale

    torch.manual_seed(0)
    batches = [x / x.abs().max() for x in data(12)]
    batches[1] = batches[1] * 5
    model = Loud()
    with pytest.warns(UserWarning, match="'scale' of the model"):
        found = recompute_statistics(model, batches)
    assert "scale" not in vars(model)
    with torch.no_grad():
        met = torch.cat([model.stem(x) * (3 if i == 1 else 1) for i, x in enumerate(batches)])
    assert torch.allclose(found.mean["first"], met.double().mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_any_leg(at, error):
    calls = itertools.count(1)

    class Failing(Stem):
        def before(self, x):
            if len(x) == 8 and next(calls) >= at:
                raise error("provoked")
            return self.stem(x)

    torch.manual_seed(0)
    model = Failing()
    before = snapshot(model)
    with pytest.raises(error, match="provoked"):
        recompute_statistics(model, data(12))
    assert_same(before, snapshot(model))


# -- samples that pass among the batches -------------------------------------------------------


def test_samples_take_the_place_of_whole_batches():
    sizes = []

    class Counted(Stem):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    torch.manual_seed(0)
    check(Counted(), data(4))
    # single_batch's, then of four batches each once and their first legs
    whole = [size for size in sizes[1:] if size > 1]
    assert set(whole) == {8}
    assert len(whole) == 8
    assert sizes[1:].count(1) <= 8


def test_progress_counts_no_samples():
    told = []
    recompute_statistics(Stem(), data(5), progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 20) for n in range(1, 21)]


def test_a_model_that_takes_whole_batches_only():
    class Whole(Stem):
        def before(self, x):
            return self.stem(x.view(4, 4, 32, 32).view(8, 2, 32, 32))

    torch.manual_seed(0)
    model = Whole()
    reference = Stem()
    reference.load_state_dict(model.state_dict())
    expected = check(reference, data())
    found = recompute_statistics(model, data())
    assert all(torch.equal(found.var[name], expected.var[name]) for name in expected.names)


def test_a_way_that_depends_on_the_number_of_samples():
    class Sized(Stem):
        def forward(self, x):
            if len(x) == 1:
                x = self.first(self.stem(x))
                return self.last(self.convolution(self.pool(x)))
            return super().forward(x)

    torch.manual_seed(0)
    model = Sized()
    check(model, data())
    check(model, data(3), iter)


class Workspace(Stem):
    """Keeps a buffer for each size of input, where no module holds it."""

    class Kept:
        buffers: dict

    def forward(self, x):
        x = self.pool(torch.relu(self.first(self.before(x))))
        out = self.Kept.buffers.setdefault((len(x), x.dtype), torch.empty_like(x))
        x = torch.add(x, 1, out=out)
        y = torch.relu(self.second(self.convolution(x)))
        return self.last(y + x.repeat(1, 6, 1, 1)[:, :64])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_passes_of_one_size_that_share_something(count):
    torch.manual_seed(0)
    Workspace.Kept.buffers = {}
    model = Workspace()
    truth = single_batch(model, lambda m: m(torch.cat(data(count)).double()))
    with pytest.warns(UserWarning, match="may influence one another"):
        found = recompute_statistics(model, data(count))
    for name, ((mean, var, _),) in truth.items():
        assert worst_error(found, mean, var, name) < 2e-6, name
    with pytest.raises(UserError, match="pass a list of batches"):
        recompute_statistics(model, iter(data(count)))
