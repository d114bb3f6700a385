"""Layers: batch normalization that can be tracked, frozen and split into ghost batches; and batch
renormalization and normalization by moving averages."""

from __future__ import annotations

from bnexp.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnexp.nn.convert import convert_batchnorm, restore_batchnorm
from bnexp.nn.modes import (
    freeze_batchnorm,
    normalize_across,
    set_normalization_batch,
    unfreeze_batchnorm,
)
from bnexp.nn.renormalization import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    MovingAverageNorm1d,
    MovingAverageNorm2d,
    MovingAverageNorm3d,
    RenormLimits,
    use_batch_renorm,
    use_moving_averages,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "MovingAverageNorm1d",
    "MovingAverageNorm2d",
    "MovingAverageNorm3d",
    "RenormLimits",
    "convert_batchnorm",
    "freeze_batchnorm",
    "normalize_across",
    "restore_batchnorm",
    "set_normalization_batch",
    "unfreeze_batchnorm",
    "use_batch_renorm",
    "use_moving_averages",
]
