"""Batch normalization layers: `torch.nn`'s own computation, with three things that can be set.

Untouched, a layer does exactly what its parent class does. Beyond that, in training mode only:

* a `StatisticsTracker` gives the layer a `MomentsSlot`; the native kernel then leaves the batch
  mean and the unbiased batch variance there, at no cost, in place of updating running buffers;
* `normalization_batch` makes it normalize over consecutive sub-batches (ghost batches);
* `frozen` makes it normalize with its running buffers, as in inference, and update nothing.

The last two are set on whole models by `bnexp.nn.modes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnexp.errors import UserError
from bnexp.torch_internals import BatchNormBase, in_backward


class MomentsSlot:
    """Where one layer leaves the moments of its mini-batches for a tracker.

    `mean`, `var`: (C,) in the dtype of the running buffers; the mean and the unbiased variance of
    the last mini-batch. `values`: how many values per channel it had. `filled`: there are
    moments the tracker has not taken yet. `busy`: `feed` must be called before the layer may
    write here again. `moved`: the layer's buffers may be other tensors now.
    """

    __slots__ = ("busy", "feed", "filled", "mean", "moved", "values", "var")

    def __init__(self, feed: Callable[[], None], mean: Tensor, var: Tensor) -> None:
        self.feed = feed
        self.mean = mean
        self.var = var
        self.values = 0
        self.filled = False
        self.busy = False
        self.moved = False


class TrackedBatchNorm(BatchNormBase):
    # Class attributes, so that a torch.nn layer becomes one of ours by its `__class__` alone.
    normalization_batch: int | None = None
    frozen: bool = False
    slot: MomentsSlot | None = None

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):  # a leaf of traced graphs, as torch.nn's layers are
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        slot = self.slot
        if slot is None and self.normalization_batch is None and not self.frozen:
            return super().forward(input)
        if not self.training:
            if slot is not None and slot.busy:
                slot.feed()
            return super().forward(input)

        self._check_input_dim(input)
        if self.frozen:
            return F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                False,
                0.0,
                self.eps,
            )
        if not self.track_running_stats or self.running_mean is None:
            return self._normalize(input, None, None)
        if slot is None:
            return self._normalize_and_average(input)
        if in_backward():
            return self._normalize(input, slot.mean.clone(), slot.var.clone())
        if slot.busy:
            slot.feed()
            slot = self.slot  # a new one, if the layer has moved
        output = self._normalize(input, slot.mean, slot.var)
        values = input.numel() // self.num_features
        if values:  # torch computes no moments of an empty batch
            slot.values = values
            slot.filled = slot.busy = True
        return output

    def _normalize(self, input: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        """Normalize with batch statistics; leave (the average over sub-batches of) the batch mean
        and the unbiased batch variance in `mean` and `var`, (C,) each, unless they are None."""
        size = self.normalization_batch
        if size is None or input.shape[0] <= size:
            return F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        parts = input.split(size)
        if parts[-1].numel() == self.num_features:
            raise UserError(
                f"normalization batches of {size} leave one value per channel in the last part of "
                f"a batch of {input.shape[0]}: a variance needs two; choose sizes where no part "
                "has a single sample"
            )
        # momentum 1, 1/2, 1/3, ... is the running average
        return torch.cat(
            [
                F.batch_norm(part, mean, var, self.weight, self.bias, True, 1.0 / i, self.eps)
                for i, part in enumerate(parts, start=1)
            ]
        )

    def _normalize_and_average(self, input: Tensor) -> Tensor:
        """Ghost batches without a tracker: one update of the running buffers per mini-batch."""
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        output = self._normalize(input, mean, var)
        with torch.no_grad():
            new_weight: float | Tensor = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:
                    new_weight = self.num_batches_tracked.to(mean.dtype).reciprocal()
            if new_weight is not None:
                self.running_mean.lerp_(mean, new_weight)
                self.running_var.lerp_(var, new_weight)
        return output

    def flush(self) -> None:
        """Let the tracker, if any, take in the last mini-batch, so that buffers are up to date."""
        if self.slot is not None and self.slot.busy:
            self.slot.feed()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._buffers and self.slot is not None:
            self.slot.busy = self.slot.moved = True

    def _apply(self, fn: Any, recurse: bool = True) -> TrackedBatchNorm:
        super()._apply(fn, recurse)
        if self.slot is not None:
            self.slot.busy = self.slot.moved = True  # maybe to another device or dtype
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.slot is not None:
            self.slot.busy = self.slot.moved = True  # with assign=True they are other tensors

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.flush()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they are not tracked, and their buffers are their own."""
        state = super().__getstate__()
        if self.slot is None:
            return state
        self.flush()
        state = {name: value for name, value in state.items() if name != "slot"}
        state["_buffers"] = {
            name: None if buffer is None else buffer.clone()
            for name, buffer in self._buffers.items()
        }
        return state

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.normalization_batch is not None:
            text += f", normalization_batch={self.normalization_batch}"
        return text + ", frozen=True" if self.frozen else text


_DOC = """`torch.nn.{parent}`: the same constructor, parameters, buffers, `state_dict` and errors.

    Training outputs and gradients are bit-identical to the parent's, and so are the running
    buffers unless a `StatisticsTracker` or ghost batches take them over. `momentum` keeps
    PyTorch's meaning: 1 - decay. Input and output: {shape}.
    """


class BatchNorm1d(TrackedBatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(parent="BatchNorm1d", shape="(N, C) or (N, C, L)")


class BatchNorm2d(TrackedBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(parent="BatchNorm2d", shape="(N, C, H, W)")


class BatchNorm3d(TrackedBatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(parent="BatchNorm3d", shape="(N, C, D, H, W)")


class LazyBatchNorm1d(nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d` that turns into bnexp's `BatchNorm1d`."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d` that turns into bnexp's `BatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d` that turns into bnexp's `BatchNorm3d`."""

    cls_to_become = BatchNorm3d
