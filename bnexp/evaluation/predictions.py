"""What a model predicts for every sample, under one or several kinds of statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.analysis.comparison import paired_counts, paired_interval
from bnexp.errors import UserError
from bnexp.nn.folding import folded
from bnexp.statistics import Statistics, batch_statistics

Batch = tuple[Tensor, Tensor]
Batches = Iterable[Batch]

# Batches are made once and shared by all kinds of statistics, in blocks of this many input bytes:
# large enough that exchanging the statistics between kinds costs nothing beside the passes.
BLOCK_BYTES = 256 * 2**20


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


def predict(model: nn.Module, batches: Batches) -> Predictions:
    """One pass over `batches` of (input, label) in inference mode, with the model's own statistics.

    Logits of any float type are turned into probabilities in float32. Nothing waits for the device
    until the end, when the results come over in one transfer. Every module's training flag is as it
    was afterwards, also after an exception. The inputs must be on the model's device.
    """
    with _inference_mode(model):
        return _gather([_predict_batch(model, x, y) for x, y in batches])


def evaluate(
    model: nn.Module,
    make_batches: Callable[[], Batches],
    kinds: dict[str, Statistics | None],
    fold: bool = False,
) -> dict[str, Predictions]:
    """Predictions for the same samples under each kind of statistics, under the same names.

    None stands for batch statistics: every sample is normalized with its own mini-batch. There a
    short last mini-batch is filled up with the samples before it, so that every sample is
    normalized within a mini-batch of the same size (with one sample of its own it could not be at
    all). `make_batches` is called once; its batches are shared by all kinds. With `fold`, BN layers
    are folded into the convolutions before them where they can be (`bnexp.nn.folding`), which
    changes logits by rounding alone. The model's buffers, parameters and training flags are as they
    were afterwards, also after an exception.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in kinds}
    with _inference_mode(model):
        for block in _blocks(make_batches()):
            for name, statistics in kinds.items():
                if statistics is None:
                    with batch_statistics(model):
                        parts[name] += [_predict_filled(model, *item) for item in block]
                else:
                    with statistics.applied_to(model), folded(model) if fold else nullcontext():
                        parts[name] += [_predict_batch(model, x, y) for _, x, y in block]
    return {name: _gather(rows) for name, rows in parts.items()}


@dataclass(frozen=True)
class LayerCost:
    """What exchanging one layer's statistics alone does.

    `difference` is the accuracy with this layer's statistics exchanged less the accuracy of the
    baseline, `interval` its 95 % interval, `changed` the number of predictions that differ.
    """

    name: str
    difference: float
    interval: tuple[float, float]
    changed: int
    loss_difference: float | None


def layer_costs(
    model: nn.Module,
    make_batches: Callable[[], Batches],
    baseline: Statistics,
    other: Statistics,
) -> list[LayerCost]:
    """Swap one layer's statistics of `baseline` for `other`'s at a time: a pass per layer, and one.

    In the layers' order. The differences need not add up to that of exchanging all layers at once:
    each layer's statistics in `other` were made for inputs that the layers below had normalized
    with theirs. Limit `make_batches` to some thousand samples where passes are dear.
    """
    kinds: dict[str, Statistics | None] = {"": baseline}
    for name in baseline.mean:
        kinds[name] = replace(
            baseline,
            mean={**baseline.mean, name: other.mean[name]},
            var={**baseline.var, name: other.var[name]},
        )
    predictions = evaluate(model, make_batches, kinds)
    reference = predictions.pop("")
    costs = []
    for name, swapped in predictions.items():
        gained, lost = paired_counts(reference.correct, swapped.correct)
        loss_difference = swapped.mean_loss - reference.mean_loss
        costs.append(
            LayerCost(
                name=name,
                difference=(gained - lost) / len(reference),
                interval=paired_interval(gained, lost, len(reference)),
                changed=int((swapped.predicted != reference.predicted).sum()),
                loss_difference=loss_difference if np.isfinite(loss_difference) else None,
            )
        )
    return costs


@contextmanager
def _inference_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _predict_batch(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(4, n) float32: predicted, label, loss, confidence. Classes below 2**24 are exact in it."""
    with torch.inference_mode():
        log_p = F.log_softmax(model(x).float(), dim=1)
        loss = F.nll_loss(log_p, y, reduction="none")
        confidence, predicted = log_p.max(dim=1)
        predicted = torch.where(confidence.isnan(), -1, predicted)
        return torch.stack([predicted.float(), y.float(), loss, confidence.exp()])


def _predict_filled(model: nn.Module, filler: Batch | None, x: Tensor, y: Tensor) -> Tensor:
    if filler is None:
        return _predict_batch(model, x, y)
    x, y, n = torch.cat([filler[0], x]), torch.cat([filler[1], y]), len(y)
    return _predict_batch(model, x, y)[:, -n:]


def _blocks(
    batches: Batches,
) -> Iterator[list[tuple[Batch | None, Tensor, Tensor]]]:
    """Lists of (filler, x, y): what a batch smaller than the one before it lacks, else None."""
    block, held, before = [], 0, None
    for x, y in batches:
        missing = 0 if before is None else len(before[1]) - len(y)
        filler = (before[0][-missing:], before[1][-missing:]) if missing > 0 else None
        block.append((filler, x, y))
        if filler is None:
            before = (x, y)
        held += x.nbytes
        if held >= BLOCK_BYTES:
            yield block
            block, held = [], 0
    if block:
        yield block


def _gather(parts: list[Tensor]) -> Predictions:
    if not parts:
        raise UserError("there are no samples to evaluate on: the split is empty")
    predicted, labels, loss, confidence = torch.cat(parts, dim=1).cpu().numpy()
    return Predictions(predicted.astype(np.int64), labels.astype(np.int64), loss, confidence)
