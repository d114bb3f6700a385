"""Folded models against float64 ones that were not folded, and what must not be folded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from bnexp.evaluation.predictions import predict, predict_under
from bnexp.networks import build_model
from bnexp.nn import BatchNorm2d, freeze_batchnorm
from bnexp.nn.find import batchnorm_layers
from bnexp.nn.folding import folded
from bnexp.statistics import Ema, StatisticsTracker, running_statistics

NETWORKS = {
    "small-cnn": (1, 28, 2),
    "resnet20": (3, 32, 19),
    "torchvision/resnet18": (3, 64, 20),
    "torchvision/mobilenet_v2": (3, 64, 52),
}


def trained_looking(model):
    """Weights and buffers of BN layers as training leaves them, not the initial ones."""
    torch.manual_seed(1)
    for layer in batchnorm_layers(model).values():
        channels = layer.num_features
        layer.running_mean.copy_(torch.randn(channels))
        layer.running_var.copy_(torch.rand(channels) + 0.3)
        with torch.no_grad():
            layer.weight.copy_(torch.rand(channels) + 0.5)
            layer.bias.copy_(torch.randn(channels))
    return model.eval()


class CountBatchNorm(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is F.batch_norm
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def calls_and_output(model, x):
    """How often the native BN kernel runs for `x`, and what comes out."""
    with CountBatchNorm() as count:
        output = model(x)
    return count.calls, output


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_as_near_to_float64_as_without_folding(name, channels_last):
    channels, size, foldable = NETWORKS[name]
    torch.manual_seed(0)
    model = build_model(name, channels=channels, image_size=(size, size), num_classes=10)
    model = trained_looking(model)
    x = torch.randn(8, channels, size, size)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    before, plain = calls_and_output(model, x)
    with folded(model):
        after, result = calls_and_output(model, x)
    assert before - after == foldable
    scale = exact.abs().max()
    plain_error, error = ((y.double() - exact).abs().max() / scale for y in (plain, result))
    assert error < max(3 * plain_error, 1e-5)
    assert not torch.equal(result, plain)  # folded in fact


def test_everything_is_the_very_same_afterwards_also_after_an_exception():
    model = trained_looking(
        build_model("resnet20", channels=3, image_size=(32, 32), num_classes=10)
    )
    model.conv1.bias = nn.Parameter(torch.randn(16))
    before = copy.deepcopy(model.state_dict())
    objects = list(model.parameters()) + list(model.buffers())
    keys = {name: set(vars(layer)) for name, layer in model.named_modules()}
    with pytest.raises(KeyboardInterrupt), folded(model):
        assert not torch.equal(model.conv1.weight, before["conv1.weight"])
        raise KeyboardInterrupt
    assert all(
        a is b for a, b in zip(objects, [*model.parameters(), *model.buffers()], strict=True)
    )
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.layer1[0].conv1.bias is None
    assert {name: set(vars(layer)) for name, layer in model.named_modules()} == keys


def test_a_failure_while_folding_leaves_the_model_alone():
    model = trained_looking(
        build_model("small-cnn", channels=1, image_size=(28, 28), num_classes=10)
    )
    x = torch.randn(2, 1, 28, 28)
    plain = model(x)
    whole, model.bn2.running_var = model.bn2.running_var, torch.ones(3)
    with pytest.raises(RuntimeError), folded(model):
        pass
    model.bn2.running_var = whole
    assert torch.equal(model(x), plain)


def test_each_kind_of_statistics_is_folded_with_its_own():
    model = trained_looking(
        build_model("small-cnn", channels=1, image_size=(28, 28), num_classes=10)
    )
    running = running_statistics(model)
    other = copy.deepcopy(running)
    for name in other.names:
        other.mean[name] += 0.5
        other.var[name] *= 2
    batches = [(torch.randn(50, 1, 28, 28), torch.randint(10, (50,))) for _ in range(2)]
    kinds = {"running": running, "other": other, "batch": None}
    plain = predict_under(model, lambda: batches, kinds)
    result = predict_under(model, lambda: batches, kinds, fold=True)
    for kind in kinds:
        assert result[kind].loss == pytest.approx(plain[kind].loss, rel=1e-4, abs=1e-5)
    assert abs(result["other"].loss.mean() - result["running"].loss.mean()) > 1e-2
    assert (result["batch"].loss == plain["batch"].loss).all()


def test_statistics_that_a_tracker_still_holds_are_taken_in_first():
    torch.manual_seed(0)
    model = build_model("small-cnn", channels=1, image_size=(28, 28), num_classes=10)
    x = torch.randn(16, 1, 28, 28) * 3 + 1
    with StatisticsTracker(model, {"running": Ema(0.5)}):
        model.train()(x)
        model.eval()
        with folded(model), torch.no_grad():
            result = model(x)
        with torch.no_grad():
            assert torch.allclose(result, model(x), rtol=1e-4, atol=1e-5)


def test_frozen_layers_are_folded_like_others():
    model = freeze_batchnorm(
        trained_looking(build_model("small-cnn", channels=1, image_size=(28, 28), num_classes=10))
    )
    x = torch.randn(4, 1, 28, 28)
    before, plain = calls_and_output(model, x)
    with folded(model):
        after, result = calls_and_output(model, x)
    assert before - after == 2
    assert torch.allclose(plain, result, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(3), BatchNorm2d(3)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def two_users(net, x):
    y = net.conv(x)
    return net.bn(y) + y


def conv_twice(net, x):
    return net.bn(net.conv(x)) + net.conv(x)


def bn_twice(net, x):
    return net.bn(net.conv(x)) + net.bn(net.conv2(x))


def weight_read_elsewhere(net, x):
    return net.bn(net.conv(x)) + net.conv.weight.sum()


def something_between(net, x):
    return net.bn(net.conv(x).relu())


def decided_by_values(net, x):
    return net.bn(net.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "forward",
    [
        two_users,
        conv_twice,
        bn_twice,
        weight_read_elsewhere,
        something_between,
        decided_by_values,
    ],
)
def test_not_folded_where_it_would_be_wrong(forward):
    model = trained_looking(Net(forward))
    x = torch.rand(2, 3, 4, 4)
    expected = model(x)
    weight = model.conv.weight
    with folded(model):
        assert model.conv.weight is weight
        assert torch.equal(model(x), expected)


def plain_pair(net, x):
    return net.bn2(net.conv2(net.bn(net.conv(x))))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda net: net.bn.train(),
        lambda net: net.conv.register_forward_hook(lambda *_: None),
        lambda net: setattr(net.bn, "running_mean", None) or setattr(net.bn, "running_var", None),
    ],
    ids=["training", "hook", "no running statistics"],
)
def test_a_layer_that_is_out_of_line_is_left_out_and_others_are_folded(spoil):
    model = trained_looking(Net(plain_pair))
    spoil(model)
    first, second = model.conv.weight, model.conv2.weight
    with folded(model):
        assert model.conv.weight is first
        assert model.conv2.weight is not second


def test_wrong_input_is_refused_as_by_the_layer_itself():
    model = trained_looking(Net(plain_pair))
    with folded(model), pytest.raises(ValueError, match="expected 4D input"):
        model(torch.rand(3, 4, 4))


@pytest.mark.slow
def test_a_compiled_model_is_left_as_it_is():
    model = trained_looking(Net(plain_pair))
    weight = model.conv.weight
    with folded(torch.compile(model)):
        assert model.conv.weight is weight


def test_predictions_under_folding_are_those_without():
    model = trained_looking(
        build_model("resnet20", channels=3, image_size=(32, 32), num_classes=10)
    )
    batches = [(torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))]
    plain = predict(model, batches)
    with folded(model):
        result = predict(model, batches)
    assert (plain.predicted == result.predicted).all()
    assert result.loss == pytest.approx(plain.loss, rel=1e-4, abs=1e-5)
