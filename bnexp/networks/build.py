"""Networks for images, by name, with bnexp's batch normalization layers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.nn.batchnorm import BatchNorm1d, BatchNorm2d
from bnexp.nn.convert import convert_batchnorm

Norm = Literal["batch", "none"]
DEFAULT_EPS = 1e-5


def build_model(
    name: str,
    *,
    channels: int,
    image_size: tuple[int, int],
    num_classes: int,
    norm: Norm = "batch",
    eps: float = DEFAULT_EPS,
) -> nn.Module:
    """The network called `name`, freshly initialized with torch's global random generator.

    It maps float (batch, channels, *image_size) to logits (batch, num_classes). Names are those
    in `MODELS`, and torchvision/<name> for each of torchvision's classifiers. `norm="none"` leaves
    batch normalization out and gives the layers before it a bias. Raises UserError for an unknown
    name, for images that are too small for the network, and for `norm="none"` with a network of
    torchvision's.
    """
    if name.startswith("torchvision/") and name in (names := _torchvision_names()):
        if norm == "none":
            raise UserError(
                f"model.norm: none is for {', '.join(MODELS)}; {name} comes with its own layers"
            )
        return _build_torchvision(names[name], channels, image_size, num_classes, eps)
    if name not in MODELS:
        raise UserError(f"model.name: no model is called {name!r}; {_nearest(name)}")
    return MODELS[name](channels, image_size, num_classes, norm, eps)


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


def _norm(kind: type[nn.Module], channels: int, norm: Norm, eps: float) -> nn.Module:
    return kind(channels, eps=eps) if norm == "batch" else nn.Identity()


def _small_cnn(
    channels: int, image_size: tuple[int, int], num_classes: int, norm: Norm, eps: float
) -> nn.Module:
    if min(image_size) < 4:
        raise UserError(
            f"small-cnn needs images of at least 4x4 pixels, not {_pixels(image_size)}; set "
            "data.image_size"
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


# --------------------------------------------------------------------------------- torchvision


def _torchvision_names() -> dict[str, str]:
    """The name in a config -> the name in torchvision, of every classifier."""
    from torchvision import models

    return {f"torchvision/{name}": name for name in models.list_models(module=models)}


def _nearest(name: str) -> str:
    """Which names come closest to a wrong one, with or without its torchvision/."""
    bare = {full.removeprefix("torchvision/"): full for full in (*MODELS, *_torchvision_names())}
    wanted = name.lower().replace("_", "-")
    spelled = {b.replace("_", "-"): b for b in bare}
    near = difflib.get_close_matches(wanted.removeprefix("torchvision/"), spelled, n=3)
    if near:
        return f"did you mean {' or '.join(bare[spelled[match]] for match in near)}?"
    return f"there are {', '.join(MODELS)} and torchvision/<name>"


def _build_torchvision(
    name: str, channels: int, image_size: tuple[int, int], num_classes: int, eps: float
) -> nn.Module:
    """torchvision's network for these images, its BN layers bnexp's.

    They keep the eps they have in torchvision unless another than PyTorch's default is asked for.
    """
    from torchvision import models

    arguments = {}
    if name in ("googlenet", "inception_v3"):
        arguments = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        arguments = {"image_size": image_size[0]}
    elif name.startswith("maxvit"):
        arguments = {"input_size": image_size}
    try:
        model = models.get_model(name, num_classes=num_classes, **arguments)
        _adapt_channels(model, channels)
        _try_out(model, channels, image_size)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"torchvision/{name} can't take images of {_pixels(image_size)} pixels ({reason}); "
            "set data.image_size to a size it can, such as 224"
        ) from None
    convert_batchnorm(model)
    if eps != DEFAULT_EPS:
        for layer in model.modules():
            if isinstance(layer, BatchNorm1d | BatchNorm2d):
                layer.eps = eps
    return model


def _adapt_channels(model: nn.Module, channels: int) -> None:
    """Let the first convolution take `channels` instead of 3: its filters' slices are reused."""
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    if first.in_channels != channels:
        slices = torch.arange(channels) % first.in_channels
        first.weight = nn.Parameter(first.weight.detach()[:, slices].clone())
        first.in_channels = channels


@torch.no_grad()
def _try_out(model: nn.Module, channels: int, image_size: tuple[int, int]) -> None:
    """One black image through the network, so that a size it can't take shows here and not deep
    in the first training step. Draws no random numbers."""
    model.eval()
    model(torch.zeros(1, channels, *image_size))
    model.train()


def _pixels(image_size: tuple[int, int]) -> str:
    return f"{image_size[1]}x{image_size[0]}"
