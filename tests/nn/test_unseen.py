"""Statistics used without a call of their layer are named, with what is behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnexp.errors import UserError
from bnexp.nn.find import batchnorm_layers
from bnexp.nn.intercept import normalized_by
from bnexp.nn.unseen import UnseenStatistics
from bnexp.statistics import recompute_statistics


class Folding(nn.Module):
    """As mmengine's `efficient_conv_bn_eval` and RepVGG do."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        if self.training:
            return self.bn(self.conv(x))
        scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bn.bias + (self.conv.bias - self.bn.running_mean) * scale)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("m", torch.zeros(3))
        self.register_buffer("v", torch.ones(3))

    def forward(self, x):
        return F.batch_norm(x, self.m, running_var=self.v, training=self.training)


class Scaled(nn.BatchNorm2d):
    """Reads its buffers itself, in its own call."""

    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean.float(), self.running_var.float(), self.weight, self.bias
        )


def watched(model, mode=False):
    def normalize(name, x, weight, bias, eps):
        return F.batch_norm(x, torch.zeros(3), torch.ones(3), weight, bias, False, 0.0, eps)

    model.train(mode)
    with normalized_by(batchnorm_layers(model), normalize), UnseenStatistics(model) as unseen:
        model(torch.randn(2, 3, 4, 4))
    return unseen


def test_a_block_that_folds_its_layer_in_inference():
    model = nn.Sequential(nn.BatchNorm2d(3), Folding(), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    unseen = watched(model)
    assert unseen.read == ["1.bn"] and unseen.own == [] and unseen.behind == ["2", "3"]
    warning = unseen.warning()
    assert "BN layers '1.bn' are not called" in warning
    assert "statistics of the BN layers behind ('2', '3') rest" in warning
    assert watched(model, mode=True).warning() is None


def test_a_module_with_a_call_of_its_own():
    unseen = watched(nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Own()), nn.BatchNorm2d(3)))
    assert unseen.own == ["1.0"] and unseen.read == [] and unseen.behind == ["2"]
    assert "modules '1.0' call batch_norm on buffers of their own" in unseen.warning()
    assert "of whatever is behind rest" in watched(nn.Sequential(Own())).warning()


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, Scaled, nn.InstanceNorm2d])
def test_layers_that_are_called_are_not_named(layer):
    model = nn.Sequential(layer(3), nn.BatchNorm2d(3))
    assert watched(model).warning() is None


def test_layers_that_nobody_reads_are_not_named():
    model = Folding()
    model.head = nn.BatchNorm2d(3)
    assert watched(model).read == ["bn"]


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Scaled])
def test_inputs_without_values_are_refused(kind):
    model = nn.Sequential(kind(3))

    def normalize(name, x, weight, bias, eps):
        return x

    with normalized_by(batchnorm_layers(model), normalize):
        with pytest.raises(UserError, match=r"'0' is called inside torch\.vmap"):
            torch.vmap(model)(torch.ones(2, 2, 3, 4, 4))
        with pytest.raises(UserError, match="'0' is on the meta device"):
            model.to("meta")(torch.ones(2, 3, 4, 4, device="meta"))


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_recomputing_names_them(method):
    model = nn.Sequential(Folding(), nn.BatchNorm2d(3), Own(), nn.BatchNorm2d(3))
    batches = [torch.randn(4, 3, 4, 4) for _ in range(3)]
    with pytest.warns(UserWarning) as caught:
        assert recompute_statistics(model, batches, method).names == ("1", "3")
    texts = [str(warning.message) for warning in caught]
    assert any("'0.bn' are not called" in t and "('1', '3') rest" in t for t in texts)
    assert any("modules '2' call batch_norm on buffers of their own" in t for t in texts)
