"""Test images that are worse than those of training, by torchvision's transforms.

The severities are those of ImageNet-C (noise, JPEG) and CIFAR-10-C (contrast) of Hendrycks &
Dietterich 2019; blur and brightness have their own, for small images. docs/data.md has a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bnexp.data.sampling import generator

Name = Literal["gaussian-noise", "gaussian-blur", "brightness", "contrast", "jpeg"]

SEVERITIES: dict[Name, tuple[float, ...]] = {
    "gaussian-noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "gaussian-blur": (0.5, 0.75, 1.0, 1.5, 2.0),
    "brightness": (0.8, 0.6, 0.45, 0.3, 0.15),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "jpeg": (25, 18, 15, 10, 7),
}
"""By severity: the noise's standard deviation (white is 1), the blur's in pixels, the factors of
brightness and contrast, the quality of JPEG."""


@dataclass(frozen=True)
class Corruption:
    name: Name
    severity: int
    """1 to 5."""

    def apply(self, images: Tensor, numbers: Sequence[int]) -> Tensor:
        """`images`: uint8 (N, H, W, C) on the CPU, C 1 or 3; returns others like them.

        What becomes of an image depends on itself and its number alone. No global random
        generator is drawn from.
        """
        if not len(images):
            return images
        amount = SEVERITIES[self.name][self.severity - 1]
        planes = images.permute(0, 3, 1, 2).contiguous()
        return _TRANSFORMS[self.name](planes, amount, numbers).permute(0, 2, 3, 1).contiguous()


def _noise(images: Tensor, sigma: float, numbers: Sequence[int]) -> Tensor:
    """torchvision's gaussian_noise of float images; it would draw from the global generator."""
    noisy = torch.empty_like(images)
    for image, number, out in zip(images, numbers, noisy, strict=True):
        seed = int(generator(0, "corruption", number).integers(2**63))
        noise = torch.randn(
            image.shape, generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        out.copy_(((image / 255 + noise * sigma).clamp(0, 1) * 255).round())
    return noisy


def _blur(images: Tensor, sigma: float, numbers: Sequence[int]) -> Tensor:
    from torchvision.transforms.v2 import functional

    # Three deviations each way, and no more than the image has to be reflected.
    kernel = [2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in images.shape[-2:]]
    return functional.gaussian_blur(images, kernel[::-1], [sigma, sigma])


def _brightness(images: Tensor, factor: float, numbers: Sequence[int]) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.adjust_brightness(images, factor)


def _contrast(images: Tensor, factor: float, numbers: Sequence[int]) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.adjust_contrast(images, factor)


def _jpeg(images: Tensor, quality: float, numbers: Sequence[int]) -> Tensor:
    from torchvision.transforms.v2 import functional

    return torch.stack([functional.jpeg(image, int(quality)) for image in images])


_TRANSFORMS: dict[Name, Callable[[Tensor, float, Sequence[int]], Tensor]] = {
    "gaussian-noise": _noise,
    "gaussian-blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
