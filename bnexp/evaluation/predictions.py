"""What a model predicts for every sample, under one or several kinds of statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.analysis.predictions import Predictions
from bnexp.errors import UserError
from bnexp.evaluation.subject import Batches
from bnexp.nn.folding import folded
from bnexp.nn.inference import inference
from bnexp.ranks import Alone, Ranks
from bnexp.statistics import Statistics, batch_statistics

Name = TypeVar("Name")
Batch = tuple[Tensor, Tensor]

# Batches are made once and shared by all kinds of statistics, in blocks of this many input bytes:
# large enough that exchanging the statistics between kinds costs nothing beside the passes.
BLOCK_BYTES = 256 * 2**20


def predict(model: nn.Module, batches: Batches) -> Predictions:
    """One pass over `batches` of (input, label) in inference mode, with the model's own statistics.

    Logits of any float type are turned into probabilities in float32. Nothing waits for the device
    until the end, when the results come over in one transfer. Every module's training flag is as it
    was afterwards, also after an exception. The inputs must be on the model's device.
    """
    with inference(model):
        return _predictions(_joined([_predict_batch(model, x, y) for x, y in batches]))


def predict_under(
    model: nn.Module,
    make_batches: Callable[[], Batches],
    kinds: Mapping[Name, Statistics | None],
    fold: bool = False,
    ranks: Ranks = Alone(),
) -> dict[Name, Predictions]:
    """Predictions for the same samples under each of several statistics, under the same names.

    None stands for batch statistics: every sample is normalized with its own mini-batch. There a
    short last mini-batch is filled up with the samples before it, so that every sample is
    normalized within a mini-batch of the same size (with one sample of its own it could not be at
    all). `make_batches` is called once; its batches are shared by all kinds. With `fold`, BN layers
    are folded into the convolutions before them where they can be (`bnexp.nn.folding`), which
    changes logits by rounding alone. The model's buffers, parameters and training flags are as they
    were afterwards, also after an exception.

    ranks: each predicts for its own batches, maybe none; all get all predictions, in rank order.
    """
    parts: dict[Name, list[Tensor]] = {name: [] for name in kinds}
    with ranks.together("predicting"), inference(model):
        for block in _blocks(make_batches()):
            for name, statistics in kinds.items():
                ranks.heed()
                if statistics is None:
                    with batch_statistics(model):
                        parts[name] += [_predict_filled(model, *item) for item in block]
                else:
                    with statistics.applied_to(model), folded(model) if fold else nullcontext():
                        parts[name] += [_predict_batch(model, x, y) for _, x, y in block]
        mine = {name: _joined(rows) for name, rows in parts.items()}
        brought = ranks.gather(mine, "the predictions")
        every = {name: torch.cat([rows[name] for rows in brought], dim=1) for name in kinds}
        if not all(rows.shape[1] for rows in every.values()):
            raise ranks.common(_no_samples())
    return {name: _predictions(rows) for name, rows in every.items()}


def _predict_batch(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.inference_mode():
        return classified(model(x), y)


def classified(logits: Tensor, labels: Tensor) -> Tensor:
    """(4, n) float32: predicted, label, loss, confidence. Classes below 2**24 are exact in it."""
    log_p = F.log_softmax(logits.float(), dim=1)
    loss = F.nll_loss(log_p, labels, reduction="none")
    confidence, predicted = log_p.max(dim=1)
    predicted = torch.where(confidence.isnan(), -1, predicted)
    return torch.stack([predicted.float(), labels.float(), loss, confidence.exp()])


def _predict_filled(model: nn.Module, filler: Batch | None, x: Tensor, y: Tensor) -> Tensor:
    if filler is None:
        return _predict_batch(model, x, y)
    x, y, n = torch.cat([filler[0], x]), torch.cat([filler[1], y]), len(y)
    return _predict_batch(model, x, y)[:, -n:]


def _blocks(
    batches: Batches,
) -> Iterator[list[tuple[Batch | None, Tensor, Tensor]]]:
    """Lists of (filler, x, y): what a batch smaller than the one before it lacks, else None."""
    block: list[tuple[Batch | None, Tensor, Tensor]] = []
    held, before = 0, None
    for x, y in batches:
        filler: Batch | None = None
        if before is not None and (missing := len(before[1]) - len(y)) > 0:
            filler = before[0][-missing:], before[1][-missing:]
        block.append((filler, x, y))
        if filler is None:
            before = (x, y)
        held += x.nbytes
        if held >= BLOCK_BYTES:
            yield block
            block, held = [], 0
    if block:
        yield block


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1).cpu() if parts else torch.zeros(4, 0, device="cpu")


def _predictions(rows: Tensor) -> Predictions:
    if not rows.shape[1]:
        raise _no_samples()
    predicted, labels, loss, confidence = rows.numpy()
    return Predictions(predicted.astype(np.int64), labels.astype(np.int64), loss, confidence)


def _no_samples() -> UserError:
    return UserError("there are no samples to evaluate on: the split is empty")
