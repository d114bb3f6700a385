"""A run as TensorBoard events: scalars per step, histograms of drift per evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bnexp.errors import UserError
from bnexp.evaluation.evaluate import Evaluation
from bnexp.records import STEP_COLUMNS
from bnexp.statistics import Statistics


class Events:
    """Writes into `folder`. Events after `first_step`, of a run that was killed, are superseded."""

    def __init__(self, folder: Path, first_step: int) -> None:
        if folder.is_symlink():
            raise UserError(f"{folder} is a link: a run writes into its own folder alone")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logging.tensorboard needs the package tensorboard: "
                "pip install 'bnexp[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def steps(self, rows: Iterable[tuple]) -> None:
        """Rows of steps.csv, as `train/<column>`."""
        for step, *values in rows:
            for name, value in zip(STEP_COLUMNS[1:], values, strict=True):
                self._writer.add_scalar(f"train/{name}", value, step)

    def evaluation(self, rows: Sequence[tuple], evaluation: Evaluation, eps: float) -> None:
        """Rows of evals.csv, and how far each layer's channels are from the first statistics."""
        for step, split, kind, accuracy, loss, *_ in rows:
            self._writer.add_scalar(f"{split}/accuracy/{kind}", accuracy, step)
            self._writer.add_scalar(f"{split}/loss/{kind}", loss, step)
        (_, reference), *others = evaluation.statistics.items()
        for kind, statistics in others:
            if statistics is not None and reference is not None:
                self._histograms(str(kind), reference, statistics, eps, rows[0][0])

    def _histograms(
        self, kind: str, reference: Statistics, other: Statistics, eps: float, step: int
    ) -> None:
        for layer in reference.mean:
            mean, var = reference.mean[layer].double(), reference.var[layer].double() + eps
            other_mean = other.mean[layer].to(mean)
            other_var = other.var[layer].to(var) + eps
            drift = (mean - other_mean) / other_var.sqrt()
            self._writer.add_histogram(f"drift of means from {kind}/{layer}", drift, step)
            self._writer.add_histogram(
                f"drift of log variances from {kind}/{layer}", (var / other_var).log(), step
            )

    def close(self) -> None:
        self._writer.close()
