"""What is logged at every step, kept on the device until it is flushed."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from bnexp.errors import Diverged
from bnexp.records.csv_log import RowLog
from bnexp.training.processes import ALONE, Processes
from bnexp.training.stateful import Stateful


class EmaAccuracy(Stateful):
    """`ema = d * ema + (1 - d) * batch_accuracy`, debiased by `1 - d^t` (Kingma & Ba 2015, sec. 3).

    It stands in for the accuracy over the whole training set.
    """

    saved: ClassVar = {"biased": float, "count": int}

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.biased = 0.0
        self.count = 0

    def update(self, accuracy: float) -> float:
        self.biased = self.decay * self.biased + (1 - self.decay) * accuracy
        self.count += 1
        return self.value

    @property
    def value(self) -> float:
        if not self.count:
            return 0.0
        return self.biased / (1 - self.decay**self.count)


class StepLog:
    """Losses and accuracies of the steps, in a ring on the device; rows of steps.csv on the host.

    What the ranks record are their parts; the rows have the sums, alike on all of them.

    `record` launches two copies on the device and waits for nothing; there is room for `capacity`
    steps between flushes. `flush` moves what has gathered to the host, writes the rows and updates
    the EMA accuracy.
    """

    def __init__(
        self,
        csv: RowLog,
        ema: EmaAccuracy,
        batch_size: int,
        steps_per_epoch: int,
        capacity: int,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.csv = csv
        self.ema = ema
        self.last: tuple | None = None
        self._batch_size = batch_size
        self._steps_per_epoch = steps_per_epoch
        self._processes = processes
        self._losses = torch.zeros(capacity, device=device)
        self._correct = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._pending: list[tuple[int, float]] = []

    def record(self, step: int, lr: float, loss: torch.Tensor, correct: torch.Tensor) -> None:
        """Take the loss and the number of right answers (0-dim tensors) of update `step`; of
        several ranks, each its own samples' part of both."""
        slot = len(self._pending)
        self._losses[slot].copy_(loss)
        self._correct[slot].copy_(correct)
        self._pending.append((step, lr))

    def flush(self) -> list[tuple]:
        """Write the gathered rows and return them. Diverged if a loss is not finite."""
        count = len(self._pending)
        if not count:
            return []
        where = f"the log of step {self._pending[-1][0]}"
        losses = self._processes.total(self._losses[:count], where).tolist()
        correct = self._processes.total(self._correct[:count], where).tolist()
        rows = []
        for (step, lr), loss, right in zip(self._pending, losses, correct, strict=True):
            accuracy = right / self._batch_size
            ema = self.ema.update(accuracy)
            rows.append((step, (step - 1) // self._steps_per_epoch, lr, loss, accuracy, ema))
        self._pending.clear()
        self.last = rows[-1]
        self.csv.append(rows)
        for step, _, lr, loss, *_ in rows:
            if not math.isfinite(loss):
                raise Diverged(
                    f"diverged: the loss became {loss} at step {step} with learning rate {lr:.3g}; "
                    "lower training.optimizer.lr, lengthen training.schedule.warmup_steps, or use "
                    "more precision"
                )
        return rows
