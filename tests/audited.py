"""A small trained network for audits, and data it was trained for."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import nn

BATCH = 64


class Net(nn.Module):
    """Two convolutions and a linear layer, each with BN."""

    def __init__(self, momentum: float | None = 0.1, eps: float = 1e-5):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps, momentum)
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(16, eps, momentum)
        self.fc1 = nn.Linear(16, 12, bias=False)
        self.bn3 = nn.BatchNorm1d(12, eps, momentum)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu().mean((2, 3))
        return self.fc2(self.bn3(self.fc1(x)).relu())


def samples(count: int, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a brighter stripe that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    x = torch.randn(count, 1, 10, 10, generator=generator)
    for label in range(4):
        x[y == label, 0, 2 * label : 2 * label + 3] += 1.0
    return scale * x, y


def batches(count: int, seed: int, size: int = BATCH, scale: float = 1.0) -> list:
    x, y = samples(count, seed, scale)
    return list(zip(x.split(size), y.split(size), strict=True))


POPULATION, TEST = batches(1024, 1), batches(1000, 2, 100)


def train(model: nn.Module, steps: int = 150, lr: float = 0.1, scale: float = 1.0) -> nn.Module:
    """SGD with a learning rate that ends at 0, so that averages catch up with the weights."""
    x, y = samples(1024, 1, scale)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        index = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


@cache
def _healthy(momentum: float | None) -> nn.Module:
    torch.manual_seed(0)
    return train(Net(momentum))


def healthy(momentum: float | None = 0.1) -> Net:
    return copy.deepcopy(_healthy(momentum))
