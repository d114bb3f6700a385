"""`exact` is one float64 training-mode pass with the whole population as a single batch."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from references import assert_same, single_batch, snapshot, worst_error
from torch import nn

import bnexp
from bnexp.errors import UserError
from bnexp.nn.find import batchnorm_layers
from bnexp.nn.unseen import UnseenStatistics
from bnexp.statistics import recompute_statistics


def torchvision_model(name: str, size: int = 64, **options):
    return lambda: (
        getattr(torchvision.models, name)(weights=None, num_classes=4, **options),
        torch.randn(24, 3, size, size),
    )


class Branches(nn.Module):
    """Groups, skips, concatenation, dropout, tuples and dicts between modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout2d(0.5))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8))
        self.right = nn.Sequential(nn.Conv2d(8, 4, 1), bnexp.BatchNorm2d(4, affine=False))
        self.flat = nn.BatchNorm1d(12, eps=1e-2)

    def split(self, x):
        return {"left": (self.left(x), x), "right": self.right(x)}

    def forward(self, x):
        found = self.split(self.stem(x).relu_())
        left, skip = found["left"]
        out = torch.cat([left + skip, found["right"]], 1)
        return {"out": nn.functional.dropout(self.flat(out.flatten(2)), training=self.training)}


class Mixed(nn.Module):
    """BN1d, 2d and 3d, and attention beside them."""

    def __init__(self):
        super().__init__()
        self.three = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), 2
        )
        self.one = nn.BatchNorm1d(8)
        self.last = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))

    def forward(self, x):
        x = self.two(self.three(x).mean(2)).flatten(2).transpose(1, 2)
        x = self.encoder(x + self.attention(x, x, x, need_weights=False)[0])
        return self.last(self.one(x.transpose(1, 2)).mean(2))


class Shared(nn.Module):
    """One BN layer called three times, one module registered twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.again = self.bn
        self.end = nn.BatchNorm2d(3)

    def forward(self, x):
        for _ in range(2):
            x = torch.relu(self.bn(self.conv(x)))
        return self.end(self.again(x * 3 + 1))


class SubclassedForwards(nn.Module):
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return nn.functional.gelu(super().forward(x))

    class ChannelsLast(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    class Direct(nn.BatchNorm1d):
        def forward(self, x):
            return nn.functional.batch_norm(
                x - 3,
                self.running_mean,
                self.running_var,
                self.weight,
                bias=self.bias,
                training=self.training,
                eps=self.eps,
            ).tanh()

    def __init__(self):
        super().__init__()
        self.a, self.conv = self.Activated(3), nn.Conv2d(3, 6, 3)
        self.b, self.c = self.ChannelsLast(6), self.Direct(6)

    def forward(self, x):
        return self.c(self.b(self.conv(self.a(x)).flatten(2).transpose(1, 2)).mean(1))


def encoder_with_batchnorm():
    """An encoder whose LayerNorm gave way to BN: torch's fused path would not notice."""

    class Norm(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    layer.norm1, layer.norm2 = Norm(8), Norm(8)
    return nn.Sequential(nn.Linear(5, 8), layer), torch.randn(30, 6, 5)


def timm_model():
    timm = pytest.importorskip("timm")
    return timm.create_model("regnetz_005", num_classes=3), torch.randn(16, 3, 64, 64)


ARCHITECTURES = {
    "resnet18": torchvision_model("resnet18"),
    "mobilenet_v3_small": torchvision_model("mobilenet_v3_small"),
    "densenet121": torchvision_model("densenet121", 48),
    "googlenet": torchvision_model("googlenet", init_weights=False),
    "regnet_y_400mf": torchvision_model("regnet_y_400mf"),
    "shufflenet": torchvision_model("shufflenet_v2_x0_5"),
    "timm regnetz": timm_model,
    "branches": lambda: (Branches(), torch.randn(40, 3, 9, 9)),
    "mixed": lambda: (Mixed(), torch.randn(30, 1, 4, 6, 6)),
    "shared": lambda: (Shared(), torch.randn(30, 3, 5, 5) + 2),
    "subclasses": lambda: (SubclassedForwards(), torch.randn(30, 3, 6, 6) * 2),
    "encoder with BN": encoder_with_batchnorm,
}


# Rounding grows with depth where a layer has few values per channel; measured and doubled.
TOLERANCE = {
    "resnet18": 5e-6,
    "mobilenet_v3_small": 1e-4,
    "densenet121": 1e-4,
    "googlenet": 1e-4,
    "regnet_y_400mf": 1e-4,
    "shufflenet": 1e-4,
    "timm regnetz": 1e-4,
}


def build(name: str):
    torch.manual_seed(1)
    model, x = ARCHITECTURES[name]()
    for layer in batchnorm_layers(model).values():
        if layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
        layer.running_mean.normal_()
    model.train()
    next(model.children()).eval()
    return model, x


def pooled_calls(calls: list) -> tuple[np.ndarray, np.ndarray, int]:
    """Moments of several calls' values together (each with the same number of values)."""
    means, variances, counts = (np.array(c) for c in zip(*calls, strict=True))
    mean = means.mean(0)
    return mean, variances.mean(0) + ((means - mean) ** 2).mean(0), int(counts.sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_against_a_float64_pass_with_a_single_batch(name):
    model, x = build(name)
    truth = single_batch(model, lambda m: m(x.double()))
    batches = [x[:1], x[1:8], x[8:11], *x[11:].split(5)]
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = recompute_statistics(model, batches, "exact")
    assert_same(before, snapshot(model))
    assert set(found.names) == truth.keys()
    for layer, calls in truth.items():
        mean, var, count = pooled_calls(calls)
        assert found.count[layer] == count
        assert worst_error(found, mean, var, layer) < TOLERANCE.get(name, 1e-6), layer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mixed", "shared", "subclasses"])
def test_in_float64_it_is_the_definition_to_rounding(name):
    model, x = build(name)
    model, x = model.double(), x.double()
    truth = single_batch(model, lambda m: m(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = recompute_statistics(model, list(x.split(4)), "exact")
    for layer, calls in truth.items():
        mean, var, _ = pooled_calls(calls)
        assert worst_error(found, mean, var, layer) < 1e-9, layer


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(0, 1000))
def test_any_split_gives_the_same(sizes, seed):
    torch.manual_seed(seed)
    x = torch.randn(sum(sizes) + 1, 3, 9, 9, dtype=torch.float64)
    model = Branches().double()
    whole = recompute_statistics(model, [x], "exact")
    parts = recompute_statistics(model, x.split([*sizes, 1]), "exact")
    for name in whole.names:
        assert torch.allclose(parts.mean[name], whole.mean[name], rtol=1e-9, atol=1e-12)
        assert torch.allclose(parts.var[name], whole.var[name], rtol=1e-9, atol=1e-12)
        assert parts.count[name] == whole.count[name]


@pytest.mark.parametrize("offset", [1000.0, -3e4])
def test_inputs_far_from_zero(offset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    x = torch.randn(60, 2, 8, 8) * abs(offset) * 1e-4 + offset
    truth = single_batch(model, lambda m: m(x.double()))
    found = recompute_statistics(model, list(x.split(7)), "exact")
    for layer, ((mean, var, _),) in truth.items():
        assert worst_error(found, mean, var, layer) < 1e-5


def test_copied_into_the_model_inference_is_the_single_batch_pass():
    model, x = build("mixed")
    found = recompute_statistics(model, list(x.split(7)), "exact")
    reference = model.double().eval()
    for layer in batchnorm_layers(model).values():
        layer.train()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        expected = reference(x.double())
        with found.applied_to(model.eval()):
            got = model(x.double())
    torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(got, expected, atol=1e-4)


def test_auxiliary_heads_are_left_out_with_a_warning():
    model, x = build("googlenet")
    with pytest.warns(UserWarning, match="aux1.conv.bn, aux2.conv.bn"):
        found = recompute_statistics(model, [x], "exact")
    assert "aux1.conv.bn" not in found.names
    found.copy_to(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, x = build("branches")
    model, x = model.to(dtype), x.to(dtype)
    found = recompute_statistics(model, x.split(9), "exact")
    truth = single_batch(model, lambda m: m(x.double()))
    for name, calls in truth.items():
        mean, var, _ = pooled_calls(calls)
        assert worst_error(found, mean, var, name) < 2e-3, name
        assert found.mean[name].dtype == torch.float64


def function_modes() -> int:
    """Those of the model: bnexp has one of its own in the first pass."""
    modes = torch.overrides._get_current_function_mode_stack()
    return sum(not isinstance(mode, UnseenStatistics) for mode in modes)


class ThreadState(nn.Module):
    """Pauses at BN layers inside autocast, enable_grad, inference_mode and a function mode."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def context(self):
        return {
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "grad": torch.enable_grad,
            "inference": torch.inference_mode,
            "mode": lambda: torch.device("cpu"),
        }[self.kind]()

    def forward(self, x):
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert function_modes() == 0
        manager = self.context()  # not in a block, or they would run one after the other
        manager.__enter__()
        x = self.linear(self.a(x))
        inside = (
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            function_modes() == 1,
        )
        x = self.b(x.float())
        assert inside == tuple(self.kind == k for k in ("autocast", "grad", "inference", "mode"))
        assert inside == (
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            function_modes() == 1,
        )
        manager.__exit__(None, None, None)
        assert not torch.is_autocast_enabled("cpu")
        return x


@pytest.mark.parametrize("kind", ["autocast", "grad", "inference", "mode"])
@pytest.mark.parametrize("memory", [None, "30KiB"])
def test_contexts_of_one_pass_do_not_reach_another(kind, memory):
    torch.manual_seed(0)
    model = ThreadState(kind)
    x = torch.randn(400, 4)
    before = snapshot(model)
    found = recompute_statistics(model, iter(x.split(9)), "exact", memory=memory)
    assert_same(before, snapshot(model))
    model.kind = "mode" if kind != "autocast" else kind
    whole = recompute_statistics(model, [x], "exact")
    for name in whole.names:
        assert torch.allclose(found.mean[name], whole.mean[name], atol=1e-5)
        assert torch.allclose(found.var[name], whole.var[name], rtol=1e-4)


def test_under_the_callers_autocast():
    model, x = build("branches")
    with torch.autocast("cpu", torch.bfloat16):
        found = recompute_statistics(model, x.split(9), "exact")
        assert torch.is_autocast_enabled("cpu")
    truth = single_batch(model, lambda m: m(x.double()))
    for name, calls in truth.items():
        mean, var, _ = pooled_calls(calls)
        assert worst_error(found, mean, var, name) < 1e-2, name


def test_compiled_models_run_eagerly():
    model, x = build("branches")
    expected = recompute_statistics(model, x.split(9), "exact")
    compiled = torch.compile(model, backend="eager")
    compiled.eval()(x)
    found = recompute_statistics(compiled, x.split(9), "exact")
    for name in expected.names:
        assert torch.equal(found.mean[name], expected.mean[name])
    model.stem.compile(backend="eager")
    model(x)
    found = recompute_statistics(model, x.split(9), "exact")
    for name in expected.names:
        assert torch.equal(found.var[name], expected.var[name])


# -- what cannot be done is refused, never a hang --------------------------------------------


class Paths(nn.Module):
    def __init__(self, choose):
        super().__init__()
        self.choose = choose
        self.a, self.b, self.c = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        for name in self.choose(x):
            x = getattr(self, name)(x)
        return x


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("b", "batch number 2 .* BN layer 'b' where batch 0 goes on to BN layer 'c'"),
        ("", "batch number 2 .* the end"),
        ("cc", "the end|BN layer 'c'"),
    ],
)
def test_paths_that_depend_on_data(path, message):
    model = Paths(lambda x: "a" + (path if x.max() > 50 else "c"))
    x = torch.randn(12, 2)
    x[7] = 100
    with pytest.raises(UserError, match=message):
        recompute_statistics(model, x.split(3), "exact")
    assert "forward" not in vars(model.a)


@pytest.mark.parametrize("catching", [True, False])
def test_threads_inside_the_model(catching):
    import threading

    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x):
            def work():
                with contextlib.suppress(Exception) if catching else contextlib.nullcontext():
                    self.bn(x)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    model = Threaded()
    with pytest.raises(UserError, match="threads"):
        recompute_statistics(model, torch.randn(6, 2).split(3), "exact")
    assert "forward" not in vars(model.bn)


def test_a_subclass_that_normalizes_in_its_own_way():
    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return (x - self.running_mean) / self.running_var.sqrt()

    with pytest.raises(UserError, match=r"does not call torch.nn.functional.batch_norm"):
        recompute_statistics(nn.Sequential(Own(2)), [torch.randn(3, 2)], "exact")
