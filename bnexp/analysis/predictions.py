"""What a model predicted for every sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row per sample, in the order of the batches (numpy arrays on the host).

    predicted   int64 (N,)    most probable class; -1 where the logits are not finite numbers
    labels      int64 (N,)
    loss        float32 (N,)  cross-entropy in nats, without label smoothing
    confidence  float32 (N,)  probability of the predicted class
    """

    predicted: np.ndarray
    labels: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> np.ndarray:
        """bool (N,)"""
        return self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def mean_loss(self) -> float:
        return float(self.loss.mean(dtype=np.float64))
