"""Layers: batch normalization that can be tracked, frozen and split into ghost batches."""

from __future__ import annotations

from bnexp.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnexp.nn.convert import convert_batchnorm, restore_batchnorm
from bnexp.nn.modes import (
    freeze_batchnorm,
    normalize_across,
    set_normalization_batch,
    unfreeze_batchnorm,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "convert_batchnorm",
    "freeze_batchnorm",
    "normalize_across",
    "restore_batchnorm",
    "set_normalization_batch",
    "unfreeze_batchnorm",
]
