"""`exact` where forward passes share things: right, or refused, and all is as it was afterwards.

The passes of `exact` wait for one another in the middle. Each network here does something there that
other passes could meet; the reference is one float64 pass over all samples.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import sys
import warnings

import numpy as np
import pytest
import torch
from references import assert_same, single_batch, snapshot, worst_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from bnexp.errors import UserError
from bnexp.nn.inference import ModelState
from bnexp.statistics import recompute_statistics
from bnexp.statistics.layer_by_layer import by_layer, layer_by_layer
from bnexp.statistics.progress import Report
from bnexp.statistics.recompute import prepared_task


def block(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
    )


class Net(nn.Module):
    """Two blocks and a layer; subclasses run the second block in some circumstance."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = block(2), block(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(self.around(torch.relu(self.first(x))))

    def around(self, x):
        return self.second(x)


def settings() -> tuple:
    """Process-wide settings that passes may change."""
    return (
        torch.get_default_dtype(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_dispatch_stack(),
        np.geterr(),
        sys.stdout,
        id(warnings.filters),
        warnings.showwarning,
        [
            len(hooks)
            for name, hooks in vars(nn.modules.module).items()
            if "_forward" in name and isinstance(hooks, dict)
        ],
    )


def data(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4 + i % 2, 2, 6, 6, generator=generator) * (1 + i) for i in range(count)]


def check(model, batches, forward=None, interleaved=None, kind=list, **options):
    """One sweep if `interleaved`, layer by layer if not; right; nothing changed."""
    run = forward or (lambda m, x: m(x))
    truth = single_batch(model, lambda m: run(m, torch.cat(batches).double()))
    before, world = snapshot(model), settings()
    originals, parameters = [b.clone() for b in batches], list(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world_inside = settings()
        found = recompute_statistics(model, kind(batches), forward=forward, **options)
        assert settings() == world_inside
    assert settings() == world
    assert_same(before, snapshot(model))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(map(torch.equal, batches, originals))
    said = [str(w.message) for w in caught]
    assert any("one after the other" in text for text in said) != interleaved, said
    assert set(found.names) == truth.keys()
    for name, ((mean, var, count),) in truth.items():
        assert found.count[name] == count
        assert worst_error(found, mean, var, name) < 2e-6, name
    return said


# -- what a pass takes along: one sweep all the same ------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def setting(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


VARIABLE = contextvars.ContextVar("variable", default=0)


@contextlib.contextmanager
def variable():
    assert VARIABLE.get() == 0
    token = VARIABLE.set(1)
    yield
    assert VARIABLE.get() == 1
    VARIABLE.reset(token)


def pack_and_unpack(*_):
    return torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), lambda t: t[0])


SETTINGS = {
    "default dtype": lambda: default_dtype(torch.float64),
    "stdout": lambda: contextlib.redirect_stdout(io.StringIO()),
    "warnings": quiet,
    "attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "attention by preference": lambda: sdpa_kernel(
        [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True
    ),
    "cudnn": lambda: torch.backends.cudnn.flags(enabled=False, deterministic=True),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "precision": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 3),
    "numpy": lambda: np.errstate(all="raise"),
    "gradients": torch.enable_grad,
    "saved tensors": pack_and_unpack,
    "context variable": variable,
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_settings_around_a_part_and_around_the_pass(name, where):
    class Inside(Net):
        def around(self, x):
            with SETTINGS[name]():
                return self.second(x)

    def outside(model, x):
        with SETTINGS[name]():
            return model(x)

    torch.manual_seed(0)
    if where == "inside":
        check(Inside(), data(), interleaved=True)
    else:
        check(Net(), data(), outside, interleaved=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_after_an_exception_in_the_middle(name):
    class Failing(nn.Module):
        def forward(self, x):
            if len(x) == 5 and x.abs().max() > 3:
                raise KeyError("provoked")
            return x

    torch.manual_seed(0)
    model = Net()
    model.second.insert(2, Failing())

    def run(model, x):
        with SETTINGS[name]():
            return model(x)

    before, world = snapshot(model), settings()
    with pytest.raises(KeyError, match="provoked"):
        recompute_statistics(model, data(), forward=run)
    assert settings() == world
    assert_same(before, snapshot(model))


def test_checkpoints_with_gradients():
    class Checkpointed(Net):
        def around(self, x):
            with torch.enable_grad():
                return checkpoint(self.second, x, use_reentrant=False)

    torch.manual_seed(0)
    check(Checkpointed(), data(), interleaved=True)

    def run(model, x):
        with torch.enable_grad(), torch.autograd.graph.save_on_cpu():
            return model(x)

    check(Checkpointed(), data(), run, interleaved=True)


def test_parametrizations():
    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    class Cached(Net):
        def around(self, x):
            with parametrize.cached():
                return self.second(x)

    torch.manual_seed(0)
    model = Cached()
    parametrize.register_parametrization(model.second[3], "weight", Doubled())
    with torch.no_grad():
        check(model, data(), interleaved=True)
    assert not parametrize._cache and not parametrize._cache_enabled


# -- what passes leave where others meet it: one after the other ------------------------------


class InnerFunctionalCall(Net):
    def around(self, x):
        fast = {k: 2 * v.detach() for k, v in self.second.named_parameters()}
        return torch.func.functional_call(self.second, fast, (x,))


class AttributeForAWhile(Net):
    scale = 1.0

    def forward(self, x):
        self.scale = 3.0
        x = self.last(self.scale * self.around(torch.relu(self.first(x))))
        self.scale = 1.0
        return x


class AttributeHandedOn(Net):
    def forward(self, x):
        self.kept = x.repeat(1, 2, 1, 1)
        return self.last(self.around(torch.relu(self.first(x))) + self.kept)


class HookForAWhile(Net):
    def around(self, x):
        handle = self.second[0].register_forward_hook(lambda _, inputs, output: output * 2 + 1)
        try:
            return self.second(x)
        finally:
            handle.remove()


class HookOfAllForAWhile(Net):
    def around(self, x):
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: output * 2 if isinstance(module, nn.Conv2d) else output
        )
        try:
            return self.second(x)
        finally:
            handle.remove()


class OtherModuleForAWhile(Net):
    def around(self, x):
        before, self.second[2] = self.second[2], nn.Tanh()
        try:
            return self.second(x)
        finally:
            self.second[2] = before


class WeightsInPlace(Net):
    def around(self, x):
        self.second[0].weight.mul_(2)
        try:
            return self.second(x)
        finally:
            self.second[0].weight.div_(2)


class WeightsInPlaceUnseen(Net):
    def around(self, x):
        self.second[0].weight.data.mul_(2)
        try:
            return self.second(x)
        finally:
            self.second[0].weight.data.div_(2)


class ListOfSkips(Net):
    def __init__(self):
        super().__init__()
        self.skips = []

    def forward(self, x):
        self.skips.append(x.repeat(1, 2, 1, 1))
        return self.last(self.around(torch.relu(self.first(x))) + self.skips.pop())


class Elsewhere:
    """Something that no module holds."""

    kept = None
    stack: list = []  # noqa: RUF012


class HandedOnElsewhere(Net):
    """As forward hooks of U-Nets do."""

    def __init__(self):
        super().__init__()
        self.store = Elsewhere()

    def forward(self, x):
        self.store.kept = x.repeat(1, 2, 1, 1)
        return self.last(self.around(torch.relu(self.first(x))) + self.store.kept)


class StackElsewhere(Net):
    def forward(self, x):
        Elsewhere.stack.append(x.repeat(1, 2, 1, 1))
        return self.last(self.around(torch.relu(self.first(x))) + Elsewhere.stack.pop())


class SetElsewhere(Net):
    def around(self, x):
        before, Elsewhere.kept = Elsewhere.kept, 3.0
        try:
            x = self.second(x * (Elsewhere.kept or 1.0))
            return x * Elsewhere.kept
        finally:
            Elsewhere.kept = before

    def forward(self, x):
        return self.last(self.around(torch.relu(self.first(x * (Elsewhere.kept or 1.0)))))


INFLUENCES = [
    InnerFunctionalCall,
    AttributeForAWhile,
    AttributeHandedOn,
    HookForAWhile,
    HookOfAllForAWhile,
    OtherModuleForAWhile,
    WeightsInPlace,
    WeightsInPlaceUnseen,
    ListOfSkips,
    HandedOnElsewhere,
    StackElsewhere,
    SetElsewhere,
]


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("make", INFLUENCES)
def test_passes_that_influence_one_another(make, count):
    torch.manual_seed(0)
    check(make(), data(count), interleaved=False)


@pytest.mark.parametrize("make", INFLUENCES)
def test_a_single_batch_has_no_other(make):
    torch.manual_seed(0)
    check(make(), data(1), interleaved=True)


def test_functional_call_of_the_whole():
    torch.manual_seed(0)
    model = Net()
    weights = {k: 2 * v.detach() for k, v in model.named_parameters()}

    def run(model, x):
        own = {k: v.to(x.dtype) for k, v in weights.items()}
        return torch.func.functional_call(model, own, (x,))

    check(model, data(), run, interleaved=False)


def test_a_pass_within_a_bound_on_memory():
    torch.manual_seed(0)
    for make in (AttributeHandedOn, HandedOnElsewhere):
        check(make(), data(), interleaved=False, memory="60KiB")


class OnlyLarge(Net):
    """Sets an attribute where the input is large."""

    scale = 1.0

    def forward(self, x):
        before = self.scale
        if len(x) % 9 == 8 or x.abs().max() > 9:
            self.scale = 2.0
        x = self.last(self.around(torch.relu(self.first(x))) * self.scale)
        self.scale = before
        return x


def test_what_only_some_batch_sets():
    torch.manual_seed(0)
    batches = [torch.randn(4, 2, 6, 6).clamp(-8, 8) for _ in range(6)]
    model = OnlyLarge()
    batches[4][0, 0, 0, 0] = 10.0
    with pytest.warns(UserWarning, match="influence one another .'scale' of the model.* 6 passes"):
        found = recompute_statistics(model, batches)
    parts = []
    recorded = model.last.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0]))
    with torch.no_grad(), found.applied_to(model.eval()):
        for x in batches:
            model(x)
    recorded.remove()
    met = torch.cat(parts).double()
    assert torch.allclose(found.mean["last"], met.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(found.var["last"], met.var((0, 2, 3), correction=0), rtol=1e-5)
    assert "scale" not in vars(model)
    with pytest.raises(UserError, match="'scale' of the model.*: pass a list of batches"):
        recompute_statistics(model, iter(batches))
    assert "scale" not in vars(model)


def test_iterators_are_held_where_passes_influence_one_another():
    torch.manual_seed(0)
    check(AttributeHandedOn(), data(), interleaved=False, kind=iter)
    with pytest.raises(UserError, match="pass a list of batches"):
        recompute_statistics(HandedOnElsewhere(), iter(data()))


def test_a_cache_that_is_filled_once():
    class Caching(Net):
        def __init__(self):
            super().__init__()
            self.tables = {}

        def around(self, x):
            if x.shape[-1] not in self.tables:
                self.tables[x.shape[-1]] = torch.linspace(0, 1, x.shape[-1]).to(x.dtype)
            return self.second(x) + self.tables[x.shape[-1]]

    torch.manual_seed(0)
    model = Caching()
    check(model, data(), interleaved=True)
    assert not model.tables


def test_one_buffer_for_all_batches():
    """A loader may fill the same memory again."""
    batches, buffer = data(), torch.empty(5, 2, 6, 6)

    def refilled():
        for batch in batches:
            yield buffer[: len(batch)].copy_(batch)

    torch.manual_seed(0)

    class Skip(Net):
        def forward(self, x):
            return self.last(self.around(torch.relu(self.first(x))) + x.repeat(1, 2, 1, 1))

    check(Skip(), batches, interleaved=True, kind=lambda _: refilled())


@pytest.mark.parametrize("method", ["batch-mean", "pooled", "exact"])
def test_the_callers_batches_are_left_alone(method):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x.mul_(2)).add_(x)

    x = torch.randn(20, 3, dtype=torch.float64)
    batches = list(x.clone().split(5))
    found = recompute_statistics(InPlace(), batches, method)
    assert torch.equal(torch.cat(batches), x)
    assert torch.allclose(found.mean["bn"], x.mean(0) * 2)


def test_random_numbers_are_the_same_in_each_pass_over_the_batches():
    drawn = []

    class Noisy(AttributeHandedOn):
        def around(self, x):
            drawn.append(torch.randn(1))
            return self.second(x + drawn[-1])

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="6 passes over the batches"):
        recompute_statistics(Noisy(), data(4))
    over_the_batches = torch.cat(drawn)[-24:].view(6, 4)
    assert (over_the_batches == over_the_batches[0]).all()
    assert over_the_batches[0].unique().numel() == 4


# -- the two ways ----------------------------------------------------------------------------


def slowly(model, batches, forward=None):
    with prepared_task(model, batches, None, None, forward, None, "each", Report()) as task:
        return by_layer(layer_by_layer(task, batches, ModelState(model)))
