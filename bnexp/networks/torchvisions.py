"""torchvision's classifiers, made to fit the images and given bnexp's layers."""

from __future__ import annotations

import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.nn.batchnorm import BatchNorm1d, BatchNorm2d
from bnexp.nn.convert import convert_batchnorm

DEFAULT_EPS = 1e-5
"""What torch.nn's BN layers have unless told otherwise."""


def torchvision_names() -> dict[str, str]:
    """The name in a config -> the name in torchvision, of every classifier."""
    from torchvision import models

    return {f"torchvision/{name}": name for name in models.list_models(module=models)}


def build_torchvision(
    name: str, channels: int, image_size: tuple[int, int], num_classes: int, eps: float
) -> nn.Module:
    """torchvision's network for these images, its BN layers bnexp's.

    They keep the eps they have in torchvision unless another than PyTorch's default is asked for.
    """
    from torchvision import models

    arguments: dict[str, object] = {}
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
            f"torchvision/{name} can't take images of {image_size[1]}x{image_size[0]} pixels "
            f"({reason}); set data.image_size to a size it can, such as 224"
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
