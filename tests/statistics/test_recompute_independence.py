"""`exact` where forward passes share things: right, or refused, and all is as it was afterwards.

The passes of `exact` wait for one another in the middle. Each network here does something there
that other passes could meet; the reference is one float64 pass over all samples.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import io
import sys
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import assert_same, single_batch, snapshot, worst_error
from test_recompute_exact import build
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from bnexp.errors import UserError
from bnexp.statistics import recompute_statistics
from bnexp.statistics.layer_by_layer import by_layer, layer_by_layer
from bnexp.statistics.progress import Report
from bnexp.statistics.recompute import METHODS, prepared_task


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
        torch.get_default_device(),
        torch._C._len_torch_function_stack(),
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


@contextlib.contextmanager
def default_device(device):
    before = torch._GLOBAL_DEVICE_CONTEXT.__dict__.get("device_context")
    torch.set_default_device(device)
    try:
        yield
        assert torch.empty(1).device.type == device
    finally:
        torch.set_default_device(before and before.device)


@contextlib.contextmanager
def default_and_other_device():
    with default_device("cpu"):
        with torch.device("meta"):
            yield
            assert torch.empty(1).is_meta
        assert not torch.empty(1).is_meta


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
    "device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "devices": default_and_other_device,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_without_a_block(name):
    class Inside(Net):
        def around(self, x):
            manager = SETTINGS[name]()
            manager.__enter__()
            x = self.second(x)
            manager.__exit__(None, None, None)
            return x

    torch.manual_seed(0)
    check(Inside(), data(), interleaved=True)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_settings_in_a_block(name, where):
    class Inside(Net):
        def around(self, x):
            with SETTINGS[name]():
                return self.second(x)

    def outside(model, x):
        with SETTINGS[name]():
            return model(x)

    torch.manual_seed(0)
    if where == "inside":
        check(Inside(), data(), interleaved=False)
    else:
        check(Net(), data(), outside, interleaved=False)


@pytest.mark.parametrize("given", [None, "meta"])
def test_a_default_device_that_is_left_behind(given):
    class Leaving(Net):
        def around(self, x):
            torch.set_default_device(torch.device("meta"))
            return self.second(x)

    torch.manual_seed(0)
    model, batches = Leaving(), data()
    torch.set_default_device(given)
    try:
        world = settings()
        for method in METHODS:
            recompute_statistics(model, batches, method)
            assert settings() == world
        check(model, batches, interleaved=True)
    finally:
        torch.set_default_device(None)


class KnownManagers(Net):
    """Blocks whose effects are known, and a try block that is left again."""

    @torch.no_grad()
    def around(self, x):
        try:
            dtype = self.no_such_attribute
        except AttributeError:
            dtype = torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=False), torch.enable_grad():
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                (x,) = [block(x) for block in [self.second]]
            with sdpa_kernel(SDPBackend.MATH):
                return F.relu(x) if len(x) == 0 else x


def test_blocks_of_known_managers():
    torch.manual_seed(0)
    check(KnownManagers(), data(), interleaved=True)


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


class WeightsInPlaceWithoutBlock(Net):
    def around(self, x):
        self.second[0].weight.data.mul_(2)
        x = self.second(x)
        self.second[0].weight.data.div_(2)
        return x


class OtherDataForAWhile(Net):
    def around(self, x):
        weight = self.second[0].weight
        before, weight.data = weight.data, 2 * weight.data
        x = self.second(x)
        weight.data = before
        return x


class FunctionForAWhile(Net):
    def around(self, x):
        before, F.relu = F.relu, F.silu
        x = self.second(x)
        F.relu = before
        return x + F.relu(x)


class HandedOnByTheClass(Net):
    kept = None

    def forward(self, x):
        type(self).kept = x.repeat(1, 2, 1, 1)
        x = self.last(self.around(torch.relu(self.first(x))) + type(self).kept)
        type(self).kept = None
        return x


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
    stack: ClassVar[list] = []


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
    WeightsInPlaceWithoutBlock,
    OtherDataForAWhile,
    FunctionForAWhile,
    HandedOnByTheClass,
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
    with pytest.warns(
        UserWarning, match="may influence one another .'scale' of the model.* 6 passes"
    ):
        found = recompute_statistics(model, batches)
    assert "scale" not in vars(model)
    with pytest.raises(UserError, match=r"'scale' of the model.*: pass a list of batches"):
        recompute_statistics(model, iter(batches))
    assert "scale" not in vars(model)
    assert_meets(model, found, batches)


def assert_meets(model, found, batches):
    """With the statistics found, batch by batch, the last layer meets those that it has."""
    parts = []
    recorded = model.last.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0]))
    with torch.no_grad(), found.applied_to(model.eval()):
        for x in batches:
            model(x)
    recorded.remove()
    met = torch.cat(parts).double()
    assert torch.allclose(found.mean["last"], met.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(found.var["last"], met.var((0, 2, 3), correction=0), rtol=1e-5)


class FlagElsewhere(Net):
    """Hands on a truth, which half of the others share."""

    def forward(self, x):
        Elsewhere.kept = bool(x.mean() > 0)
        x = torch.relu(self.first(x))
        return self.last(self.around(x * 2 if Elsewhere.kept else x))


@pytest.mark.parametrize("count", [4, 5, 6, 9])
def test_what_only_some_batches_meet(count):
    """The second and the last hand on the same."""
    torch.manual_seed(0)
    signs = [1, -1, 1, 1, -1, 1, 1, 1]
    batches = [x + 2 * sign for x, sign in zip(data(count), [*signs[: count - 1], -1], strict=True)]
    model = FlagElsewhere()
    with pytest.warns(UserWarning, match="one after the other"):
        found = recompute_statistics(model, batches)
    assert_meets(model, found, batches)
    with pytest.raises(UserError, match="seen at BN layer"):
        recompute_statistics(model, iter(batches))


@pytest.mark.parametrize("kind", ["in place", "exchanged"])
def test_weights_are_as_before_where_only_some_batch_changes_them(kind):
    class Some(Net):
        def around(self, x):
            weight = self.second[0].weight
            before, hit = weight.data, len(x) == 7
            if hit and kind == "in place":
                weight.mul_(3)
            elif hit:
                weight.data = 3 * before
            x = self.second(x)
            if hit and kind == "in place":
                weight.div_(3)
            elif hit:
                weight.data = before
            return x

    torch.manual_seed(0)
    model, batches = Some(), [torch.randn(n, 2, 6, 6) for n in (5, 5, 5, 7, 5)]
    before = snapshot(model)
    with pytest.raises(UserError, match=r"values of 'weight'.*: pass a list of batches"):
        recompute_statistics(model, iter(batches))
    assert_same(snapshot(model), before)
    with pytest.warns(UserWarning, match="values of 'weight' of Conv2d 'second.0'"):
        recompute_statistics(model, batches)
    assert_same(snapshot(model), before)
    recompute_statistics(model, batches[3:4], stop_after="second.1")
    assert_same(snapshot(model), before)


def test_buffers_and_parameters_of_other_kinds():
    torch.manual_seed(0)
    model = Net()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("broken", torch.tensor([float("nan")]))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    model.register_parameter("thin", nn.Parameter(torch.eye(3).to_sparse()))
    found = recompute_statistics(model, data(4))
    assert_meets(model, found, data(4))


@pytest.mark.parametrize("method", ["exact", "pooled", "batch-mean"])
def test_layers_that_are_no_part_of_the_model_are_not_changed(method):
    class Listed(Net):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))]

        def forward(self, x):
            return super().forward(self.hidden[0](x))

    torch.manual_seed(0)
    model = Listed()
    (hidden,) = model.hidden
    before = snapshot(hidden)
    with pytest.raises(UserError, match=r"no part of the model .*nn.ModuleList"):
        recompute_statistics(model, data(), method)
    assert_same(snapshot(hidden), before)
    hidden.eval()
    recompute_statistics(model, data(), method)
    hidden.train()
    assert_same(snapshot(hidden), before)


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


@pytest.mark.parametrize("name", ["branches", "mixed", "shared", "subclasses", "encoder with BN"])
def test_one_sweep_and_layer_by_layer_give_the_same_bits(name):
    model, x = build(name)
    batches = [x[:1], x[1:8], x[8:11], *x[11:].split(5)]
    found = recompute_statistics(model, batches)
    with prepared_task(model, batches, None, None, None, None, "each", Report()) as task:
        task.run.try_out(batches[0].clone())
        slow = by_layer(layer_by_layer(task, batches))
    assert set(slow) == set(found.names)
    for layer, population in slow.items():
        assert torch.equal(population.mean, found.mean[layer])
        assert torch.equal(population.var, found.var[layer])
        assert population.count == found.count[layer]


def test_layer_by_layer_stops_after_a_layer():
    torch.manual_seed(0)
    expected = recompute_statistics(AttributeHandedOn().eval(), data(1), stop_after="second.1")
    ran = []
    model = AttributeHandedOn()
    model.last.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.warns(UserWarning, match="one after the other"):
        found = recompute_statistics(model, data(), stop_after="second.1")
    assert not ran
    assert found.names == expected.names == ("first.1", "first.4", "second.1")


def test_progress_layer_by_layer():
    told = []
    with pytest.warns(UserWarning, match="6 passes over the batches"):
        recompute_statistics(
            AttributeHandedOn(), data(3), progress=lambda done, total: told.append((done, total))
        )
    assert told == [(n, 18) for n in range(1, 19)]


def test_a_path_that_depends_on_the_data_is_refused_layer_by_layer_too():
    class Path(AttributeHandedOn):
        def around(self, x):
            return self.second(x) if x.max() < 5 else self.first(x[:, :2])

    batches = [x.clamp(-1, 1) for x in data()]
    batches[3][0] = 1e4
    with (
        pytest.warns(UserWarning, match="one after the other"),
        pytest.raises(UserError, match=r"batch number 3 .*the model's path depends on its data"),
    ):
        recompute_statistics(Path(), batches)


# -- layers called several times ---------------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)
        )
        self.end = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.end(self.tower(x) - self.tower(x + 3))


def vectors(count=6):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(11 - i, 4, generator=generator) for i in range(count)]


def met_by_inference(model, found, batches) -> dict[str, torch.Tensor]:
    """The float64 inputs, over all calls, of each layer of the model with these statistics."""
    model, inputs = copy.deepcopy(model).double().eval(), {}
    for name in found.names:
        layer = model.get_submodule(name)
        layer.running_mean, layer.running_var = found.mean[name], found.var[name]
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        for x in batches:
            model(x.double())
    return {
        name: torch.cat([x.movedim(1, -1).flatten(0, -2) for x in xs])
        for name, xs in inputs.items()
    }


def test_calls_as_one_in_a_siamese_network():
    """Against float64 arithmetic by hand: both towers' inputs meet in each shared layer."""
    torch.manual_seed(0)
    model, batches = Siamese(), vectors()
    found = recompute_statistics(model, batches, calls="joint")
    first, bn1, relu, second, bn2 = copy.deepcopy(model.tower).double()
    x = torch.cat(batches).double()
    with torch.no_grad():
        h = first(torch.cat([x, x + 3]))
        mean1, var1 = h.mean(0), h.var(0, correction=0)
        h = second(relu(F.batch_norm(h, mean1, var1, bn1.weight, bn1.bias, eps=bn1.eps)))
        mean2, var2 = h.mean(0), h.var(0, correction=0)
        h = F.batch_norm(h, mean2, var2, bn2.weight, bn2.bias, eps=bn2.eps)
        d = h[: len(x)] - h[len(x) :]
    expected = {
        "tower.1": (mean1, var1, 2 * len(x)),
        "tower.4": (mean2, var2, 2 * len(x)),
        "end": (d.mean(0), d.var(0, correction=0), len(x)),
    }
    for name, (mean, var, count) in expected.items():
        assert found.count[name] == count
        assert worst_error(found, mean.numpy(), var.numpy(), name) < 2e-6, name


def test_each_call_with_its_own_statistics_is_said_not_to_be_what_inference_meets():
    torch.manual_seed(0)
    model, batches = Siamese(), vectors()
    with pytest.warns(UserWarning, match=r"tower.1, tower.4\. .*calls='joint'"):
        each = recompute_statistics(model, batches)
    met = met_by_inference(model, each, batches)["tower.4"]
    assert (
        (each.var["tower.4"] - met.var(0, correction=0)) / met.var(0, correction=0)
    ).abs().max() > 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joint = recompute_statistics(model, batches, calls="joint")
        recompute_statistics(Net(), data())
    for name, met in met_by_inference(model, joint, batches).items():
        assert torch.allclose(joint.mean[name], met.mean(0), atol=1e-5), name
        assert torch.allclose(joint.var[name], met.var(0, correction=0), rtol=1e-5), name


class Recurrent(nn.Module):
    """One layer called once per step of the input, which may differ from batch to batch."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        h = 0 * x[:, 0]
        for i in range(x.shape[1]):
            h = torch.tanh(self.bn(self.linear(h) + x[:, i]))
        return h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calls_as_one_where_calls_depend_on_earlier_ones(dtype):
    torch.manual_seed(0)
    model = Recurrent().to(dtype)
    batches = [torch.randn(9, 3, 4, dtype=dtype), torch.randn(8, 2, 4, dtype=dtype) + 1]
    found = recompute_statistics(model, iter(batches), calls="joint")
    met = met_by_inference(model, found, batches)["bn"]
    assert found.count["bn"] == len(met) == 43
    assert torch.allclose(found.mean["bn"], met.mean(0), atol=1e-5)
    assert torch.allclose(found.var["bn"], met.var(0, correction=0), rtol=1e-5)


def test_calls_as_one_that_do_not_settle():
    class Unsettled(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(1)

        def forward(self, x):
            return self.bn(1e3 * self.bn(x).sin() ** 3)

    model = Unsettled()
    before = snapshot(model)
    with pytest.raises(UserError, match="do not settle"):
        recompute_statistics(model, [torch.linspace(0, 3, 30)[:, None]] * 2, calls="joint")
    assert_same(before, snapshot(model))


def test_calls_as_one_changes_nothing_where_each_layer_is_called_once():
    torch.manual_seed(0)
    model = Net()
    each, joint = (recompute_statistics(model, data(), calls=c) for c in ("each", "joint"))
    assert all(torch.equal(each.var[name], joint.var[name]) for name in each.names)


def test_wrong_calls():
    with pytest.raises(UserError, match="calls='all' is unknown: choose each, joint"):
        recompute_statistics(Net(), data(), calls="all")
    for options in ({"method": "pooled"}, {"stop_after": "last"}):
        with pytest.raises(UserError, match="calls='joint' is of method='exact'"):
            recompute_statistics(Net(), data(), calls="joint", **options)
