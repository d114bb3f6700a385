"""bnexp's own networks for images, with its batch normalization layers or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.nn.batchnorm import BatchNorm1d, BatchNorm2d

Norm = Literal["batch", "none"]


class Mlp(nn.Module):
    """The MNIST network of Ioffe & Szegedy 2015, section 4.1.

    Three hidden layers of 100 sigmoid units, batch normalization before the nonlinearity. The
    paper's weights are "small random Gaussian values"; here their deviation is 0.1.
    """

    def __init__(self, inputs: int, num_classes: int, norm: Norm, eps: float):
        super().__init__()
        bias = norm == "none"
        self.fc1 = nn.Linear(inputs, 100, bias=bias)
        self.bn1 = _norm(BatchNorm1d, 100, norm, eps)
        self.fc2 = nn.Linear(100, 100, bias=bias)
        self.bn2 = _norm(BatchNorm1d, 100, norm, eps)
        self.fc3 = nn.Linear(100, 100, bias=bias)
        self.bn3 = _norm(BatchNorm1d, 100, norm, eps)
        self.fc4 = nn.Linear(100, num_classes)
        for layer in (self.fc1, self.fc2, self.fc3, self.fc4):
            nn.init.normal_(layer.weight, std=0.1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = torch.sigmoid(self.bn1(self.fc1(x)))
        x = torch.sigmoid(self.bn2(self.fc2(x)))
        x = torch.sigmoid(self.bn3(self.fc3(x)))
        return self.fc4(x)


class SmallCnn(nn.Module):
    """Two 3x3 convolutions (32 and 64 channels), each with BN, ReLU and 2x2 pooling, then 128
    hidden units with BN and ReLU. PyTorch's default initialization.

    ReLU comes after pooling, where it has a quarter of the work: both orders give the same values
    and gradients, since the largest of four rectified values is the largest value, rectified."""

    def __init__(
        self,
        channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        norm: Norm,
        eps: float,
    ):
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1, bias=bias)
        self.bn1 = _norm(BatchNorm2d, 32, norm, eps)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=bias)
        self.bn2 = _norm(BatchNorm2d, 64, norm, eps)
        self.fc1 = nn.Linear(64 * (image_size[0] // 4) * (image_size[1] // 4), 128, bias=bias)
        self.bn3 = _norm(BatchNorm1d, 128, norm, eps)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.bn1(self.conv1(x)), 2), inplace=True)
        x = F.relu(F.max_pool2d(self.bn2(self.conv2(x)), 2), inplace=True)
        x = F.relu(self.bn3(self.fc1(x.flatten(1))), inplace=True)
        return self.fc2(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al. 2016): where
    the block halves the image, every second pixel, with zeros for the additional channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, eps: float):
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = _norm(BatchNorm2d, outputs, norm, eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.bn2 = _norm(BatchNorm2d, outputs, norm, eps)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.new_channels:
            x = x[:, :, :: self.stride, :: self.stride]
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(x + y, inplace=True)


class ResNet20(nn.Module):
    """The 20-layer CIFAR network of He et al. 2016, section 4.2: 16, 32 and 64 channels, three
    blocks each, initialized as in He et al. 2015. 0.27 million parameters; any image size."""

    def __init__(self, channels: int, num_classes: int, norm: Norm, eps: float):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=norm == "none")
        self.bn1 = _norm(BatchNorm2d, 16, norm, eps)
        self.layer1 = self._blocks(16, 16, norm, eps)
        self.layer2 = self._blocks(16, 32, norm, eps)
        self.layer3 = self._blocks(32, 64, norm, eps)
        self.fc = nn.Linear(64, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @staticmethod
    def _blocks(inputs: int, outputs: int, norm: Norm, eps: float) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(inputs, outputs, outputs // inputs, norm, eps),
            BasicBlock(outputs, outputs, 1, norm, eps),
            BasicBlock(outputs, outputs, 1, norm, eps),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _norm(
    kind: type[BatchNorm1d | BatchNorm2d], channels: int, norm: Norm, eps: float
) -> nn.Module:
    return kind(channels, eps=eps) if norm == "batch" else nn.Identity()


def _small_cnn(
    channels: int, image_size: tuple[int, int], num_classes: int, norm: Norm, eps: float
) -> nn.Module:
    if min(image_size) < 4:
        raise UserError(
            "small-cnn needs images of at least 4x4 pixels, not "
            f"{image_size[1]}x{image_size[0]}; set data.image_size"
        )
    return SmallCnn(channels, image_size, num_classes, norm, eps)


MODELS: dict[str, Callable[[int, tuple[int, int], int, Norm, float], nn.Module]] = {
    "mlp": lambda channels, size, classes, norm, eps: Mlp(
        channels * size[0] * size[1], classes, norm, eps
    ),
    "small-cnn": _small_cnn,
    "resnet20": lambda channels, size, classes, norm, eps: ResNet20(channels, classes, norm, eps),
}
"""Builders of bnexp's own networks, called with channels, image size, classes, norm and eps."""
