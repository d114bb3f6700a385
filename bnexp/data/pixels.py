"""From uint8 pixels to normalized network input."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, mean and (biased) standard deviation of pixels scaled to 0..1.

    `images`: uint8 (N, H, W, C) on the CPU. Computed from exact integer histograms, so the result
    does not depend on the order of images or on the number of threads. A channel without any
    variation gets standard deviation 1, which leaves it at zero after normalization.
    """
    channels = images.shape[-1]
    histograms = np.zeros((channels, 256), dtype=np.int64)
    for chunk in images.split(4096):
        for channel in range(channels):
            values = chunk[..., channel].reshape(-1).numpy()
            histograms[channel] += np.bincount(values, minlength=256)
    means, stds = [], []
    levels = range(256)
    for histogram in histograms.tolist():
        count = sum(histogram)
        total = sum(n * v for n, v in zip(histogram, levels, strict=True))
        squares = sum(n * v * v for n, v in zip(histogram, levels, strict=True))
        scatter = count * squares - total * total
        means.append(total / (255 * count))
        stds.append(scatter**0.5 / (255 * count) if scatter else 1.0)
    return tuple(means), tuple(stds)


class Normalization:
    """Pixels to network input: (pixel / 255 - mean) / std, then resized if need be."""

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pixel_size: tuple[int, int],
        image_size: tuple[int, int],
        device: torch.device,
    ):
        per_image = pixel_size[0] * pixel_size[1]
        shift = torch.tensor([255 * m for m in mean], dtype=torch.float64, device="cpu")
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float64, device="cpu")
        # One value per byte of an image: broadcasting over three channels alone would not
        # vectorize, and is ten times slower.
        self._shift = shift.repeat(per_image).to(torch.float32).to(device)
        self._scale = scale.repeat(per_image).to(torch.float32).to(device)
        self._resize = None if pixel_size == image_size else image_size

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, C) to float32 (B, C, H, W) in channels_last; `images` is left alone.

        Resizing is bilinear with antialiasing. Doing it last changes nothing but rounding, since
        its weights sum to one.
        """
        batch, height, width, channels = images.shape
        x = images.reshape(batch, -1).to(torch.float32).sub_(self._shift).mul_(self._scale)
        x = x.view(batch, height, width, channels).permute(0, 3, 1, 2)
        if self._resize is not None:
            x = F.interpolate(
                x, self._resize, mode="bilinear", align_corners=False, antialias=True
            ).contiguous(memory_format=torch.channels_last)
        return x
