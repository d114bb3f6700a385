"""A Lightning callback: validate with recomputed statistics, beside the running averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.evaluation.scoring import FirstSamples, input_of, labels_of, to_device
from bnexp.nn.inference import inference
from bnexp.statistics import Statistics, recompute_statistics, running_statistics
from bnexp.statistics.progress import Progress
from bnexp.statistics.recompute import Method

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    raise UserError("bnexp.integrations.lightning needs Lightning: pip install lightning") from None


class RecomputeStatistics(Callback):
    """Recompute BN statistics over training batches, and say what that changes.

    After every validation (or every so many), the module is scored on the batches of the first
    validation loader twice: with its running averages, logged as `val_accuracy_running`, and with
    statistics recomputed from training batches, logged as `val_accuracy_recomputed`. Training goes
    on with the running averages as if nothing had been.

    With `keep`, the recomputed statistics are copied into the module when `fit` ends, so that they
    are what is tested and what a checkpoint saved then holds.

    Args:
        samples: training samples to recompute from, the first of the training data loader's.
        method: as in `recompute_statistics`.
        every: validations from one recomputation to the next.
        keep: leave the module with recomputed statistics at the end.
        forward: `forward(module, batch)` gives logits; None: the module is called with the
            batch's tensor.
        progress: as in `recompute_statistics`.

    For one process: under several, `recompute_statistics` raises UserError.
    """

    def __init__(
        self,
        samples: int = 10_000,
        method: Method = "exact",
        every: int = 1,
        keep: bool = True,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        progress: Progress = False,
    ) -> None:
        if every < 1 or samples < 2:
            raise UserError("every must be at least 1, and samples at least 2")
        self.samples = samples
        self.method: Method = method
        self.every = every
        self.keep = keep
        self.forward = forward
        self.progress = progress
        self._validations = 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        train, val = trainer.train_dataloader, trainer.val_dataloaders
        if trainer.sanity_checking or train is None or val is None:
            return
        self._validations += 1
        if self._validations % self.every:
            return
        recomputed = self._recompute(pl_module, train)
        for name, statistics in (
            ("running", running_statistics(pl_module)),
            ("recomputed", recomputed),
        ):
            accuracy = self._accuracy(
                pl_module, val[0] if isinstance(val, list) else val, statistics
            )
            pl_module.log(f"val_accuracy_{name}", accuracy, prog_bar=name == "recomputed")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.keep and trainer.train_dataloader is not None:
            self._recompute(pl_module, trainer.train_dataloader).copy_to(pl_module)

    def _output(self, module: nn.Module, batch: Any) -> Any:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        batch = to_device(batch, device)
        return self.forward(module, batch) if self.forward else module(input_of(batch))

    def _recompute(self, module: LightningModule, train: Iterable) -> Statistics:
        batches = FirstSamples(train, self.samples)
        return recompute_statistics(
            module, batches, self.method, forward=self._output, progress=self.progress
        )

    def _accuracy(self, module: LightningModule, val: Iterable, statistics: Statistics) -> float:
        right = total = 0
        with inference(module), statistics.applied_to(module):
            for batch in val:
                predicted = self._output(module, batch).argmax(1).cpu()
                labels = labels_of(batch).cpu()
                right += int((predicted == labels).sum())
                total += len(labels)
        if not total:
            raise UserError("there are no validation samples")
        return right / total
