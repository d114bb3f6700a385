"""The attribution of a loss to layers' statistics, against autograd through plain arithmetic."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnexp.evaluation.attribution import _gradients, attribute
from bnexp.evaluation.scoring import Task
from bnexp.statistics import Statistics, running_statistics

TASK = Task(torch.device("cpu"))


class PlainBatchNorm(nn.Module):
    """Inference by differentiable arithmetic on `mean` and `log_var`, leaves of autograd."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn
        self.mean = bn.running_mean.clone().requires_grad_()
        self.log_var = (bn.running_var + bn.eps).log().requires_grad_()

    def forward(self, x):
        shape = (1, -1, *[1] * (x.dim() - 2))
        y = (x - self.mean.view(shape)) / (self.log_var.view(shape) / 2).exp()
        if self.bn.affine:
            y = y * self.bn.weight.view(shape) + self.bn.bias.view(shape)
        return y


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, eps=0.01), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3),
    ).double().eval()  # fmt: skip
    for layer in (model[4], model[8]):
        nn.init.uniform_(layer.weight, -1, 2)
        nn.init.normal_(layer.bias)
    model.train()
    model(torch.randn(32, 2, 8, 8).double() * 2 + 1)
    return model.eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(30, 2, 8, 8, generator=generator).double()
    y = torch.randint(3, (30,), generator=generator)
    return [(x[:20], y[:20]), (x[20:], y[20:])]


def test_gradients_are_those_of_autograd(model, batches):
    plain = copy.deepcopy(model)
    for name in ("1", "4", "8"):
        plain[int(name)] = PlainBatchNorm(plain[int(name)])
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    F.cross_entropy(plain(x).float(), y).backward()
    names = ("1", "4", "8")
    found = _gradients(model, batches, TASK.loss, running_statistics(model), names)
    for name in names:
        layer = plain[int(name)]
        for gradient, expected in zip(
            found.gradients, (layer.mean.grad, layer.log_var.grad), strict=True
        ):
            assert torch.allclose(gradient[name], expected, rtol=1e-5, atol=1e-8), name


def test_shares_add_up_to_the_difference(model, batches):
    for i in (2, 5, 9):
        model[i] = nn.Tanh()  # Simpson's rule is for smooth functions
    first = running_statistics(model)
    second = Statistics(
        {n: m + 0.2 * first.var[n].sqrt() for n, m in first.mean.items()},
        {n: 1.5 * v for n, v in first.var.items()},
        first.count,
    )
    found = attribute(model, lambda: batches, TASK.loss, first, second)
    losses = []
    for statistics in (first, second):
        with torch.no_grad(), statistics.applied_to(model):
            losses.append(sum(float(TASK.loss(model, b)[0]) for b in batches) / 30)
    assert found.difference == pytest.approx(losses[0] - losses[1], rel=1e-5)
    assert found.explained == pytest.approx(found.difference, rel=0.02)
    assert found.samples == 30
    assert [layer.name for layer in found.layers] == ["1", "4", "8"]
    assert sum(layer.loss for layer in found.worst(3)) == pytest.approx(found.explained)


def test_it_names_the_layer_and_channel_that_were_spoiled(model, batches):
    first = running_statistics(model)
    spoiled = {n: v.clone() for n, v in first.var.items()}
    spoiled["4"][2] *= 30
    other = Statistics(first.mean, spoiled, first.count)
    found = attribute(model, lambda: batches, TASK.loss, other, first)
    (worst,) = found.worst(1)
    assert worst.name == "4"
    assert worst.channels.abs().argmax() == 2
    assert worst.loss == pytest.approx(found.explained)


def test_the_model_is_as_before(model, batches):
    model.train()
    model[0].weight.requires_grad_(False)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    parameters = list(model.parameters())
    first = running_statistics(model)
    attribute(model, lambda: batches, TASK.loss, first, first)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert not model[0].weight.requires_grad and model[3].weight.requires_grad
    assert all(p.grad is None for p in parameters) and model.training
    assert model[1].weight is None


def test_scores_without_a_gradient_are_not_attributed(model, batches):
    task = Task(torch.device("cpu"), score=lambda output, batch: (output.argmax(1) == 0).float())
    first = running_statistics(model)
    assert attribute(model, lambda: batches, task.loss, first, first) is None
