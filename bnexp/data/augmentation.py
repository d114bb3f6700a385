"""Padded random crop and horizontal flip of whole batches, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Crop each image out of its zero-padded self, then mirror some of them.

    `images`: (B, H, W, C), contiguous. `draws`: int64 (B, 3) on the same device: first row and
    first column of the crop in the padded image, and whether to mirror. Returns a new tensor like
    `images`. What torchvision's RandomCrop(size, padding) and RandomHorizontalFlip do, in that
    order, with padding in black; without a loop over images and without waiting for the device.
    """
    if padding:
        images = _shift(images, draws[:, 0], draws[:, 1], padding)
    return _flip(images, draws[:, 2])


def _shift(images: Tensor, rows: Tensor, columns: Tensor, padding: int) -> Tensor:
    """The crops, copied row by row: a row of a crop is `width` neighbours in padded memory."""
    batch, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    row_stride = (width + 2 * padding) * channels
    image_stride = (height + 2 * padding) * row_stride
    first = torch.arange(batch, device=images.device) * image_stride
    first = first + rows * row_stride + columns * channels
    starts = first.view(-1, 1) + torch.arange(height, device=images.device) * row_stride
    windows = padded.as_strided((padded.numel() - width * channels + 1, width * channels), (1, 1))
    return windows.index_select(0, starts.view(-1)).view(batch, height, width, channels)


def _flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Whole images picked from the batch or its mirror image (torch.where takes three times as
    long on bytes)."""
    batch = len(images)
    both = torch.cat((images, images.flip(2))).view(2 * batch, -1)
    picked = torch.arange(batch, device=images.device) + batch * mirrored
    return both.index_select(0, picked).view(images.shape)
