"""`batch-mean` and `pooled` against the literal definitions, torch's and fvcore's versions."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from references import assert_same, snapshot, take_moments
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnexp
from bnexp.errors import UserError
from bnexp.statistics import METHODS, batch_statistics, recompute_statistics


def network(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3),
        bnexp.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    ).to(dtype)


def inputs(dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 2, 8, 8, generator=generator, dtype=dtype)
    return x + torch.linspace(-2, 2, 50, dtype=dtype)[:, None, None, None]


def activations(model: nn.Module, batches: list) -> dict[str, list[np.ndarray]]:
    """What reaches each BN layer, batch by batch, (values, channels), normalized in numpy."""
    found = {}
    model = copy.deepcopy(model).eval()
    for batch in batches:
        x = batch
        for name, layer in model.named_children():
            if not hasattr(layer, "running_mean"):
                x = layer(x).detach()
                continue
            rows = np.moveaxis(x.numpy(), 1, -1)
            flat = rows.reshape(-1, rows.shape[-1])
            found.setdefault(name, []).append(flat)
            normalized = (rows - flat.mean(0)) / np.sqrt(flat.var(0) + layer.eps)
            normalized = normalized * layer.weight.detach().numpy() + layer.bias.detach().numpy()
            x = torch.from_numpy(np.moveaxis(normalized, -1, 1).copy())
    return found


def test_batch_mean_is_algorithm_2():
    """Ioffe & Szegedy 2015, Algorithm 2, lines 10-11, over training mini-batches of size m."""
    model, batches = network(), list(inputs().split(10))
    found = recompute_statistics(model, batches, "batch-mean")
    for name, parts in activations(model, batches).items():
        mu = [sum(part) / len(part) for part in parts]
        sigma2 = [sum((part - mean) ** 2) / len(part) for part, mean in zip(parts, mu, strict=True)]
        m = len(parts[0])
        expectation = sum(mu) / len(batches)
        variance = m / (m - 1) * sum(sigma2) / len(batches)
        assert np.allclose(found.mean[name].numpy(), expectation, rtol=1e-10, atol=1e-12)
        assert np.allclose(found.var[name].numpy(), variance, rtol=1e-10)
        assert found.count[name] == m * len(batches)


def test_batch_mean_is_torchs_update_bn():
    model, batches = network(), list(inputs().split([10, 10, 30]))
    model[3].p = 0.0
    found = recompute_statistics(model, batches, "batch-mean")
    torch.optim.swa_utils.update_bn(batches, model)
    for name in found.names:
        layer = model.get_submodule(name)
        assert torch.allclose(found.mean[name], layer.running_mean, rtol=1e-10)
        assert torch.allclose(found.var[name], layer.running_var, rtol=1e-10)


@pytest.mark.parametrize("sizes", [[10] * 5, [2, 7, 1 + 10, 30]])
def test_pooled_is_numpy_over_the_concatenated_activations(sizes):
    model, batches = network(), list(inputs().split(sizes))
    found = recompute_statistics(model, batches, "pooled")
    for name, parts in activations(model, batches).items():
        values = np.concatenate(parts)
        assert np.allclose(found.mean[name].numpy(), values.mean(0), rtol=1e-10, atol=1e-12)
        assert np.allclose(found.var[name].numpy(), values.var(0), rtol=1e-10)
        assert found.count[name] == len(values)


def test_pooled_is_fvcores_where_fvcore_is_right():
    model, batches = network(), list(inputs().split(10))
    model[3].p = 0.0
    found = recompute_statistics(model, batches, "pooled")
    update_bn_stats(model.train(), batches, num_iters=len(batches))
    for name in found.names:
        layer = model.get_submodule(name)
        assert torch.allclose(found.mean[name], layer.running_mean, rtol=1e-12, atol=1e-13)
        assert torch.allclose(found.var[name], layer.running_var, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.booleans())
def test_any_split_gives_the_same_pooled_moments_at_the_first_layer(sizes, single):
    torch.manual_seed(0)
    dtype = torch.float32 if single else torch.float64
    x = torch.randn(sum(sizes), 2, 8, 8, dtype=dtype) * 0.1 + 100
    model = network(dtype)
    found = recompute_statistics(model, x.split(sizes), "pooled")
    with torch.no_grad():
        mean, var, count = take_moments(model[0].double()(x.double()))
    tolerance = 1e-4 if single else 1e-11
    assert np.abs((found.mean["1"].numpy() - mean) / np.sqrt(var)).max() < tolerance
    assert np.allclose(found.var["1"].numpy(), var, rtol=tolerance)
    assert found.count["1"] == count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_world_are_as_before(method, training):
    model = network().train(training)
    model[5].training = not training
    model[1].running_var.fill_(0.3)
    model.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    state = random.getstate()

    def batches():
        for batch in inputs().split(10):
            torch.rand(3), np.random.rand(3), random.random()
            yield batch

    found = recompute_statistics(model, batches(), method)
    assert_same(before, snapshot(model))
    assert random.getstate() == state
    assert found.names == ("1", "5", "9")
    assert not any(t.requires_grad for t in (*found.mean.values(), *found.var.values()))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_all_kinds(method):
    model, x = network(torch.float32), inputs(torch.float32)
    labels = torch.arange(50)
    expected = recompute_statistics(model, list(x.split(10)), method)
    pixels = (x * 20 + 128).clamp(0, 255).to(torch.uint8)
    others = {
        "tuples": ([(a, b) for a, b in zip(x.split(10), labels.split(10), strict=True)], None),
        "generator": ((a for a in x.split(10)), None),
        "loader": (DataLoader(TensorDataset(x, labels), 10), None),
        "dicts": (({"image": a} for a in x.split(10)), lambda m, batch: m(batch["image"])),
    }
    for kind, (batches, forward) in others.items():
        found = recompute_statistics(model, batches, method, forward=forward)
        for name in expected.names:
            assert torch.equal(found.mean[name], expected.mean[name]), kind
            assert torch.equal(found.var[name], expected.var[name]), kind
    uint8 = recompute_statistics(
        model, pixels.split(10), method, forward=lambda m, batch: m((batch.float() - 128) / 20)
    )
    assert torch.allclose(uint8.mean["1"], expected.mean["1"], atol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_models_that_work_in_place_on_their_input(method):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x.mul_(2))

    x = torch.randn(20, 3, dtype=torch.float64)
    found = recompute_statistics(InPlace(), list(x.clone().split(5)), method)
    assert torch.allclose(found.mean["bn"], x.mean(0) * 2)


@pytest.mark.parametrize("method", METHODS)
def test_stop_after_runs_nothing_behind_that_layer(method):
    ran = []

    class Tail(nn.Module):
        def forward(self, x):
            ran.append(len(x))
            return x

    model = nn.Sequential(nn.BatchNorm1d(2), Tail(), nn.BatchNorm1d(2), Tail()).eval()
    batches = torch.randn(20, 2).split(4)
    expected = recompute_statistics(model, batches, method)
    ran.clear()
    found = recompute_statistics(model, batches, method, stop_after="0")
    assert not ran
    assert found.names == ("0",)
    assert torch.equal(found.mean["0"], expected.mean["0"])
    with pytest.raises(UserError, match="stop_after='1' is not a BN layer"):
        recompute_statistics(model, batches, method, stop_after="1")


@pytest.mark.parametrize("method", METHODS)
def test_progress(method):
    told = []
    recompute_statistics(
        network(),
        list(inputs().split(10)),
        method,
        progress=lambda done, total: told.append((done, total)),
    )
    total = 5 if method != "exact" else 20  # three layers and the way behind the last
    assert told == [(i, total) for i in range(1, total + 1)]

    told.clear()
    unreached = nn.ModuleList([network()[:2], nn.BatchNorm2d(1)])
    with pytest.warns(UserWarning, match="no batch reached BN layer 1"):
        recompute_statistics(
            unreached,
            list(inputs().split(10)),
            method,
            forward=lambda m, x: m[0](x),
            progress=lambda done, total: told.append((done, total)),
        )
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("method", METHODS)
def test_progress_bar_goes_to_stderr(method, capsys):
    recompute_statistics(network(), list(inputs().split(10)), method, progress=True)
    out, err = capsys.readouterr()
    assert not out
    if method == "exact":
        assert "5 batches, " in err
        assert "waiting at" in err


# -- batch_statistics -------------------------------------------------------------------------


def test_batch_statistics_is_training_mode_normalization_without_traces():
    model, x = network(torch.float32).eval(), inputs(torch.float32)
    reference = copy.deepcopy(model)
    for name in ("1", "5", "9"):
        reference.get_submodule(name).train()
    expected = reference(x)
    before = snapshot(model)
    with batch_statistics(model) as inside:
        assert inside is model
        assert torch.equal(model(x), expected)
        assert model(x).requires_grad
    assert_same(before, snapshot(model))


def test_batch_statistics_of_a_tracked_model_are_not_tracked():
    model = bnexp.convert_batchnorm(network(torch.float32)).train()
    tracker = bnexp.StatisticsTracker(model, {"all": bnexp.Cumulative()})
    model(inputs(torch.float32))
    tracker.update()
    before = tracker.statistics()["all"]
    with batch_statistics(model):
        model.eval()(inputs(torch.float32) + 5)
        model.train()(inputs(torch.float32) + 5)
    recompute_statistics(model, [inputs(torch.float32) + 5], "pooled")
    tracker.update()
    after = tracker.statistics()["all"]
    tracker.close()
    for name in before.names:
        assert torch.equal(before.mean[name], after.mean[name])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_batch_statistics_after_an_exception(error):
    model = network(torch.float32)
    before = snapshot(model)
    with pytest.raises(error), batch_statistics(model):
        model(inputs(torch.float32))
        raise error
    after = snapshot(model)
    after["rng"] = before["rng"]  # dropout was on, and drew
    assert_same(before, after)


def test_batch_statistics_of_one_value_per_channel():
    with (
        pytest.raises(UserError, match=r"'0': this mini-batch has 1 value"),
        batch_statistics(nn.Sequential(nn.BatchNorm1d(2))) as model,
    ):
        model(torch.ones(1, 2))


class _Recurrent(nn.Module):
    """Calls its BN layer once per step of its input: (batch, steps, 4)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        h = 0 * x[:, 0]
        for i in range(x.shape[1]):
            h = torch.tanh(self.bn(self.linear(h) + x[:, i]))
        return h


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_later_batches_call_more_often(method, order):
    torch.manual_seed(0)
    batches = [torch.randn(8, 2, 4), torch.randn(8, 3, 4)][::order]
    if method == "exact":
        with pytest.raises(UserError, match="the model's path depends on its data"):
            recompute_statistics(_Recurrent(), batches, method)
    else:
        assert recompute_statistics(_Recurrent(), batches, method).count == {"bn": 40}


@pytest.mark.parametrize("method", METHODS)
def test_layers_used_without_being_called_are_named_and_what_is_behind_them(method):
    """As blocks do that fold a BN layer into its convolution in inference."""

    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            if self.training:
                return self.bn(self.conv(x))
            scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
            weight = self.conv.weight * scale.view(-1, 1, 1, 1)
            return nn.functional.conv2d(x, weight, self.bn.bias - self.bn.running_mean * scale)

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), Folding(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning) as caught:
        found = recompute_statistics(model, inputs(torch.float32).split(10), method)
    assert found.names == ("0", "3")
    said = [str(warning.message) for warning in caught]
    assert any("'1.bn' are not called, but their buffers are read" in text for text in said)
    assert any("the BN layers behind ('3')" in text for text in said)
    assert not any("one after the other" in text for text in said)
