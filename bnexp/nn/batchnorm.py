"""Batch normalization layers: `torch.nn`'s own computation, with three things that can be set.

Untouched, a layer does exactly what its parent class does. Beyond that, in training mode only:

* a `StatisticsTracker` gives the layer a `MomentsSlot`; the native kernel then leaves the batch
  mean and the unbiased batch variance there, at no cost, in place of updating running buffers;
* `normalization_batch` makes it normalize over consecutive sub-batches (ghost batches);
* `across` makes it normalize over a mini-batch of which other processes have the other samples;
* `frozen` makes it normalize with its running buffers, as in inference, and update nothing.

The last three are set on whole models by `bnexp.nn.modes`. `bnexp.nn.renormalization` has layers
that normalize otherwise. `followed_class` does all this for
subclasses of `torch.nn`'s layers, of which only what `F.batch_norm` computes is then another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnexp.errors import UserError
from bnexp.nn.calls import AnsweredCalls, BatchNormCall
from bnexp.torch_internals import BatchNormBase, in_backward, in_transform

# weight, bias and eps
Affine = tuple[Tensor | None, Tensor | None, float]

# input -> its normalized self, and of the mini-batch that it is a part of the mean, the unbiased
# variance and the number of values per channel
Across = Callable[[Tensor, Affine], tuple[Tensor, Tensor, Tensor, int]]


class MomentsSlot:
    """Where one layer leaves the moments of its mini-batches for a tracker.

    `mean`, `var`: (C,) in the dtype of the running buffers; the mean and the unbiased variance of
    the last mini-batch. `values`: how many values per channel it had. `parts`: of how many
    sub-batches these are the averages. `filled`: there are moments the tracker has not taken yet.
    `busy`: `feed` must be called before the layer may write here again. `moved`: the layer's
    buffers may be other tensors now. `unused`: for now the layer averages into its buffers by
    itself, as its parent class does.
    """

    __slots__ = ("busy", "feed", "filled", "mean", "moved", "parts", "unused", "values", "var")

    def __init__(
        self, feed: Callable[[], None], mean: Tensor, var: Tensor, unused: bool = False
    ) -> None:
        self.feed = feed
        self.mean = mean
        self.var = var
        self.values = 0
        self.parts = 1
        self.filled = False
        self.busy = False
        self.moved = False
        self.unused = unused


class TrackedBatchNorm(BatchNormBase):
    # Class attributes, so that a torch.nn layer becomes one of ours by its `__class__` alone.
    normalization_batch: int | None = None
    across: Across | None = None
    frozen: bool = False
    slot: MomentsSlot | None = None
    # Whether training reads the running buffers; see `bnexp.nn.renormalization`.
    reads_averages: bool = False

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):  # a leaf of traced graphs, as torch.nn's layers are
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        if self.slot is None and not self.is_set:
            return super().forward(input)
        if self._does_as_its_parent():
            return super().forward(input)
        self._check_input_dim(input)
        averages = self.track_running_stats and self.running_mean is not None
        return self._train(input, averages, (self.weight, self.bias, self.eps))

    @property
    def is_set(self) -> bool:
        """Whether it normalizes in training as its parent class does not."""
        own = self.frozen or self.reads_averages
        return own or self.normalization_batch is not None or self.across is not None

    def _does_as_its_parent(self) -> bool:
        slot = self.slot
        if self.training:
            return (slot is None or slot.unused) and not self.is_set
        if slot is not None and slot.busy:
            slot.feed()
        return True

    def _train(self, input: Tensor, averages: bool, affine: Affine) -> Tensor:
        """Normalize in training mode, as it was set. `averages`: statistics are kept."""
        if self.frozen:
            mean, var = self.running_mean, self.running_var
            weight, bias, eps = affine
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
        if not averages:
            return self._normalize(input, None, None, affine)[0]
        slot = self.slot
        if slot is None or slot.unused:
            return self._normalize_and_average(input, affine)
        if in_backward():
            return self._normalize(input, slot.mean.clone(), slot.var.clone(), affine)[0]
        if slot.busy:
            slot.feed()
            slot = self.slot or slot  # a new one, if the layer has moved
        try:
            output, values = self._normalize(input, slot.mean, slot.var, affine)
        except RuntimeError as error:
            if not in_transform(input):
                raise
            raise UserError(
                "a layer that a StatisticsTracker follows is called inside torch.vmap or another "
                "transform of torch.func, where one input stands for many: close() it first"
            ) from error
        if values:  # torch computes no moments of an empty batch
            slot.values = values
            size = self.normalization_batch
            slot.parts = 1 if size is None else -(-input.shape[0] // size)
            slot.filled = slot.busy = True
        return output

    def _normalize(
        self, input: Tensor, mean: Tensor | None, var: Tensor | None, affine: Affine
    ) -> tuple[Tensor, int]:
        """Normalize with batch statistics; leave (the average over sub-batches of) the batch mean
        and the unbiased batch variance in `mean` and `var`, (C,) each, unless they are None. With
        the number of values per channel in the mini-batch."""
        if self.across is not None:
            output, *found, values = self.across(input, affine)
            with torch.no_grad():
                for buffer, value in zip((mean, var), found, strict=True):
                    if buffer is not None:
                        buffer.copy_(value)
            return output, values
        weight, bias, eps = affine
        parts = self._parts(input)
        values = input.numel() // self.num_features
        if len(parts) == 1:
            return F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps), values
        # momentum 1, 1/2, 1/3, ... is the running average
        outputs = [
            F.batch_norm(part, mean, var, weight, bias, True, 1.0 / i, eps)
            for i, part in enumerate(parts, start=1)
        ]
        return torch.cat(outputs), values

    def _parts(self, input: Tensor) -> tuple[Tensor, ...]:
        """What is normalized by itself: the whole input, or its ghost batches."""
        size = self.normalization_batch
        if size is None or input.shape[0] <= size:
            return (input,)
        parts = input.split(size)
        if parts[-1].numel() == self.num_features:
            raise UserError(
                f"normalization batches of {size} leave one value per channel in the last part of "
                f"a batch of {input.shape[0]}: a variance needs two; choose sizes where no part "
                "has a single sample"
            )
        return parts

    def _normalize_and_average(self, input: Tensor, affine: Affine) -> Tensor:
        """Without a tracker: one update of the running buffers per mini-batch."""
        buffers = self.running_mean, self.running_var
        mean, var = (None if buffer is None else torch.zeros_like(buffer) for buffer in buffers)
        output, _ = self._normalize(input, mean, var, affine)
        with torch.no_grad():
            counter, momentum = self.num_batches_tracked, self.momentum
            if counter is not None:
                counter.add_(1)
            for buffer, value in zip(buffers, (mean, var), strict=True):
                if buffer is None or value is None:
                    continue
                if momentum is not None:
                    buffer.lerp_(value, momentum)
                elif counter is not None:
                    buffer.lerp_(value, counter.to(value.dtype).reciprocal())
        return output

    def flush(self) -> None:
        """Let the tracker, if any, take in the last mini-batch, so that buffers are up to date."""
        if self.slot is not None and self.slot.busy:
            self.slot.feed()

    def reset_running_stats(self) -> None:
        self.flush()
        super().reset_running_stats()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "momentum" and self.slot is not None:
            self._set_aside(value is None)
        super().__setattr__(name, value)
        if name in self._buffers and self.slot is not None:
            self.slot.busy = self.slot.moved = True

    def _set_aside(self, aside: bool) -> None:
        """Momentum None asks for the plain average of what comes now (`update_bn` does, and puts
        back what was there): meanwhile the layer averages by itself, into its buffers."""
        if aside and self.momentum is None:
            raise UserError(
                "momentum=None is set anew for a layer that has it already, while a "
                "StatisticsTracker follows it: close() the tracker before update_bn and the like"
            )
        self.flush()
        if self.slot is not None:
            self.slot.unused = aside

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

    def __prepare_scriptable__(self) -> TrackedBatchNorm:
        """`torch.jit.script` turns the layer back into its parent class, which it can compile."""
        plain = plain_class(self)
        if plain is None or self.slot is not None or self.is_set:
            raise UserError(
                f"TorchScript cannot compile a {type(self).__name__} that is tracked, frozen, "
                "renormalized, has ghost batches, spans processes or is a subclass of bnexp's "
                "layers: close() the "
                "StatisticsTracker, or call bnexp.nn.restore_batchnorm(model) first"
            )
        turn_into(self, plain)
        return self

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
    plain_class = nn.BatchNorm1d


class BatchNorm2d(TrackedBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(parent="BatchNorm2d", shape="(N, C, H, W)")
    plain_class = nn.BatchNorm2d


class BatchNorm3d(TrackedBatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(parent="BatchNorm3d", shape="(N, C, D, H, W)")
    plain_class = nn.BatchNorm3d


class FollowedBatchNorm(TrackedBatchNorm):
    """In front of a subclass of `torch.nn`'s layers, whose own `forward` stays what it is: only
    its calls of `F.batch_norm` are answered, in training mode and where something is set."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super(TrackedBatchNorm, self).forward
        if self._does_as_its_parent():
            return own(*args, **kwargs)
        self.flush()
        counter = self.num_batches_tracked
        # Whether a mini-batch counts is not the subclass's to say: it counts in a tensor of no use.
        lent = None if counter is None else torch.zeros((), dtype=torch.int64, device="cpu")

        def answer(call: BatchNormCall) -> Tensor:
            if not call.training:
                return F.batch_norm(*call)
            with self._counting_in(counter):
                averages = call.running_mean is not None
                return self._train(call.input, averages, (call.weight, call.bias, call.eps))

        with self._counting_in(lent), AnsweredCalls(type(self).__name__, self, answer) as calls:
            result = own(*args, **kwargs)
        calls.check()
        return result

    @contextlib.contextmanager
    def _counting_in(self, counter: Tensor | None) -> Iterator[None]:
        before = self._buffers["num_batches_tracked"]
        self._buffers["num_batches_tracked"] = counter
        try:
            yield
        finally:
            self._buffers["num_batches_tracked"] = before


def turn_into(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Give the layer another class; it stays the same object with the same tensors."""
    layer.__class__ = cls


def followed_class(plain: type[BatchNormBase]) -> type[TrackedBatchNorm]:
    """The class made from `plain`, of the same name, whose layers can be tracked, frozen and so on.

    plain: a subclass of `torch.nn`'s layers.
    """
    if plain in _MADE:
        return _MADE[plain]
    members = {
        "plain_class": plain,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
        # A pickle can't name a class that was made here: it names the one it was made from.
        "__reduce_ex__": lambda layer, protocol: (_new, (plain,), layer.__getstate__()),
    }
    own_forward = plain.forward is not BatchNormBase.forward
    base = FollowedBatchNorm if own_forward else TrackedBatchNorm
    _MADE[plain] = type(plain.__name__, (base, plain), members)
    return _MADE[plain]


_MADE: dict[type[BatchNormBase], type[TrackedBatchNorm]] = {}


def _new(plain: type[BatchNormBase]) -> TrackedBatchNorm:
    made = followed_class(plain)
    return made.__new__(made)


def plain_class(layer: nn.Module) -> type[nn.Module] | None:
    """What `layer` was before its class became one of ours; None for what was not converted."""
    return vars(type(layer)).get("plain_class") if isinstance(layer, BatchNormBase) else None


class LazyBatchNorm1d(nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d` that turns into bnexp's `BatchNorm1d`."""

    cls_to_become = BatchNorm1d
    plain_class = nn.LazyBatchNorm1d


class LazyBatchNorm2d(nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d` that turns into bnexp's `BatchNorm2d`."""

    cls_to_become = BatchNorm2d
    plain_class = nn.LazyBatchNorm2d


class LazyBatchNorm3d(nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d` that turns into bnexp's `BatchNorm3d`."""

    cls_to_become = BatchNorm3d
    plain_class = nn.LazyBatchNorm3d
