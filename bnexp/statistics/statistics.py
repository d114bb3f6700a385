"""`Statistics`: per BN layer a mean, a variance and a count, wherever they came from."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnexp.atomic import write_atomically
from bnexp.errors import NotFinite, UserError
from bnexp.nn.find import batchnorm_layers, flush
from bnexp.tensor_files import load_tensors
from bnexp.torch_internals import BatchNormBase

_BUFFERS = ("running_mean", "running_var")
_FORMAT = "bnexp.Statistics"
_VERSION = 1


@dataclass(eq=False)
class Statistics:
    """Means and variances of the inputs of BN layers, by the layers' qualified names.

    mean, var: name -> tensor of shape (channels,), floating, any device. `recompute_statistics`
        returns float64 on the CPU; running statistics keep the dtype and device of the buffers,
        so that copying them back is exact.
    count: name -> what they were taken over: values per channel for recomputed statistics,
        mini-batches for running averages (0 where the layer did not count).

    The three dicts have the same names, in module order. Not every layer of a model need be
    there: a layer that no batch reached has no population statistics.
    """

    mean: dict[str, Tensor] = field(default_factory=dict)
    var: dict[str, Tensor] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.mean.keys() == self.var.keys() == self.count.keys():
            raise UserError("Statistics: mean, var and count name different layers")
        for name, mean in self.mean.items():
            for tensor in (mean, self.var[name]):
                if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                    kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                    raise UserError(
                        f"Statistics of {name!r}: mean and var must be floating tensors, not {kind}"
                    )
            if mean.dim() != 1 or mean.shape != self.var[name].shape:
                raise UserError(
                    f"Statistics of {name!r}: mean {tuple(mean.shape)} and var "
                    f"{tuple(self.var[name].shape)} must both have shape (channels,)"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.mean)

    def __len__(self) -> int:
        return len(self.mean)

    def __repr__(self) -> str:
        channels = sum(mean.numel() for mean in self.mean.values())
        return f"Statistics({len(self)} layers, {channels} channels)"

    def _layers(self, model: nn.Module) -> dict[str, BatchNormBase]:
        """The layers of `model` that these statistics are for; UserError if any does not fit."""
        layers = batchnorm_layers(model)
        for name, mean in self.mean.items():
            if name not in layers:
                raise UserError(f"the model has no BN layer {name!r}: {_other_model(name, layers)}")
            if layers[name].num_features != mean.numel():
                raise UserError(
                    f"BN layer {name!r} has {layers[name].num_features} channels, its statistics "
                    f"have {mean.numel()}: these statistics are of another model"
                )
        flush(layers.values())
        return {name: layers[name] for name in self.mean}

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write into the buffers `running_mean` and `running_var` of the layers of `model`.

        Everything is checked before the first buffer changes. The buffers are written in place
        (rounded to their dtype), so views of them stay valid; `num_batches_tracked` and layers
        that these statistics do not name are left alone.

        Raises UserError if a name or a number of channels does not fit the model, if a finite
        value is beyond what the buffer's dtype can hold (65504 in float16), or if a layer keeps no
        running statistics (`track_running_stats=False`): such a layer always normalizes with its
        mini-batch, so nothing copied could take effect. `applied_to` does serve such layers.
        """
        buffers = {}
        for name, layer in self._layers(model).items():
            mean, var = layer.running_mean, layer.running_var
            if mean is None or var is None:
                raise UserError(
                    f"BN layer {name!r} keeps no running statistics (track_running_stats=False), "
                    "so they cannot be copied into it: use applied_to, or build it with them"
                )
            buffers[name] = mean, var
        _write(buffers, self)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the block `model` has these statistics; then bit for bit its own, come what may.

        As `copy_to`, but a layer with `track_running_stats=False` is lent buffers, so that in
        `eval()` mode it normalizes with these statistics.
        """
        layers = self._layers(model)
        placement = _placement(model)
        own = {name: (layer.running_mean, layer.running_var) for name, layer in layers.items()}
        lent = {
            name: (
                torch.empty_like(self.mean[name], **placement) if mean is None else mean,
                torch.empty_like(self.var[name], **placement) if var is None else var,
            )
            for name, (mean, var) in own.items()
        }
        saved = {
            name: tuple(None if t is None else t.detach().clone() for t in pair)
            for name, pair in own.items()
        }
        try:
            with torch.no_grad():
                _write(lent, self)
            for name, layer in layers.items():
                for key, missing, loan in zip(_BUFFERS, own[name], lent[name], strict=True):
                    if missing is None:
                        setattr(layer, key, loan)
            yield model
        finally:
            with torch.no_grad():
                for name, layer in layers.items():
                    for key, buffer, value in zip(_BUFFERS, own[name], saved[name], strict=True):
                        if buffer is not None and value is not None:
                            buffer.copy_(value)
                        setattr(layer, key, buffer)

    def save(self, path: str | os.PathLike) -> None:
        """Write to `path`, atomically: it holds the old file or the new one, never a part."""
        path = Path(path)
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "mean": {name: t.detach().cpu() for name, t in self.mean.items()},
            "var": {name: t.detach().cpu() for name, t in self.var.items()},
            "count": {name: int(n) for name, n in self.count.items()},
        }
        serialized = io.BytesIO()  # torch.save into a file hides the OSError of a full disk
        torch.save(content, serialized)
        write_atomically(path, serialized.getbuffer())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Statistics:
        """Read what `save` wrote, onto the CPU. No code from the file can run.

        Raises UserError if the file is missing, damaged, or is not a Statistics file.
        """
        try:
            content = load_tensors(Path(path))
        except UserError as error:
            raise UserError(f"statistics file {error}") from None
        except OSError as error:
            reason = error.strerror or "cannot be read"
            raise UserError(f"statistics file {path}: {reason}") from error
        except Exception as error:
            raise UserError(
                f"statistics file {path} is damaged, or was not written by Statistics.save"
            ) from error
        try:
            if content["format"] != _FORMAT or content["version"] != _VERSION:
                raise ValueError("format")
            mean, var, count = content["mean"], content["var"], content["count"]
            for tensor in (*mean.values(), *var.values()):
                if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                    raise TypeError("not a floating tensor")
            return cls(dict(mean), dict(var), {name: int(n) for name, n in count.items()})
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is not a statistics file of this version of bnexp") from error


def running_statistics(model: nn.Module) -> Statistics:
    """A copy of the running statistics that the BN layers of `model` hold.

    Works on `torch.nn` and bnexp layers; those without running statistics are left out.
    Tensors are clones with the dtype and device of the buffers; `count` is the layer's
    `num_batches_tracked`. Mutates nothing.
    """
    layers = batchnorm_layers(model)
    flush(layers.values())
    mean, var, count = {}, {}, {}
    for name, layer in layers.items():
        if layer.running_mean is not None and layer.running_var is not None:
            mean[name] = layer.running_mean.detach().clone()
            var[name] = layer.running_var.detach().clone()
            count[name] = layer.num_batches_tracked
            if var[name].dtype == torch.float16 and not var[name].isfinite().all():
                warnings.warn(
                    f"BN layer {name!r} has variances that are not finite in its float16 buffer, "
                    "which holds no more than 65504: keep BN layers in float32",
                    stacklevel=2,
                )
    return Statistics(mean, var, _as_numbers(count))


def _as_numbers(counts: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Each tensor's one number, 0 where there is none, with one transfer per device."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, count in counts.items():
        if count is not None:
            by_device.setdefault(count.device, {})[name] = count.reshape(())
    numbers = dict.fromkeys(counts, 0)
    for of_device in by_device.values():
        values = torch.stack(list(of_device.values())).tolist()
        numbers |= zip(of_device, map(int, values), strict=True)
    return numbers


def _write(buffers: Mapping[str, tuple[Tensor, Tensor]], statistics: Statistics) -> None:
    pairs = [
        pair
        for name, (mean, var) in buffers.items()
        for pair in (
            (f"mean of BN layer {name!r}", mean, statistics.mean[name]),
            (f"variance of BN layer {name!r}", var, statistics.var[name]),
        )
    ]
    for what, buffer, value in pairs:
        check_range(what, value, buffer.dtype)
    for _, buffer, value in pairs:
        buffer.copy_(value)


def check_range(what: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise UserError if a finite number in `value` would be infinite in `dtype`. Waits for the
    device where `dtype` has the smaller range."""
    largest = torch.finfo(dtype).max
    if torch.finfo(value.dtype).max <= largest:
        return
    beyond = value[value.isfinite() & ~value.to(dtype).isfinite()]
    if beyond.numel():
        kind = str(dtype).removeprefix("torch.")
        wider = ": keep BN layers in float32 (layer.float(); inputs may be of less)"
        raise NotFinite(
            f"the {what} is {beyond.abs().max().item():.4g}, beyond {largest:g}, the largest "
            f"number of its {kind} buffer{'' if dtype == torch.float32 else wider}"
        )


def _other_model(name: str, layers: Mapping[str, nn.Module]) -> str:
    """Why statistics of the layer `name` are not of a model with `layers`."""
    if f"module.{name}" in layers:
        return "it is wrapped (DataParallel, AveragedModel, ...): use the model inside, `.module`"
    if name.removeprefix("module.") in layers:
        return (
            "these statistics are of a wrapped model (DataParallel, AveragedModel, ...): take "
            "them from the model inside, `.module`"
        )
    return "these statistics are of another model"


def _placement(model: nn.Module) -> dict[str, Any]:
    """Device and dtype for buffers lent to a layer that has none: those of the model's weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {"dtype": torch.float32}
