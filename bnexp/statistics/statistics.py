"""`Statistics`: per BN layer a mean, a variance and a count, wherever they came from."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.nn.find import batchnorm_layers, flush

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

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers of `model` that these statistics are for; UserError if any does not fit."""
        layers = batchnorm_layers(model)
        for name, mean in self.mean.items():
            if name not in layers:
                raise UserError(
                    f"the model has no BN layer {name!r}: these statistics are of another model"
                )
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

        Raises UserError if a name or a number of channels does not fit the model, or if a layer
        keeps no running statistics (`track_running_stats=False`): such a layer always
        normalizes with its mini-batch, so nothing copied could take effect. `applied_to` does
        serve such layers.
        """
        layers = self._layers(model)
        for name, layer in layers.items():
            if layer.running_mean is None or layer.running_var is None:
                raise UserError(
                    f"BN layer {name!r} keeps no running statistics (track_running_stats=False), "
                    "so they cannot be copied into it: use applied_to, or build it with them"
                )
        _write(layers, self)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the block `model` has these statistics; then bit for bit its own, come what may.

        As `copy_to`, but a layer with `track_running_stats=False` is lent buffers, so that in
        `eval()` mode it normalizes with these statistics.
        """
        layers = self._layers(model)
        placement = _placement(model)
        own = {n: (layer.running_mean, layer.running_var) for n, layer in layers.items()}
        with torch.no_grad():
            saved = {
                name: tuple(None if t is None else t.clone() for t in pair)
                for name, pair in own.items()
            }
        try:
            for name, layer in layers.items():
                if layer.running_mean is None:
                    layer.running_mean = torch.empty_like(self.mean[name], **placement)
                if layer.running_var is None:
                    layer.running_var = torch.empty_like(self.var[name], **placement)
            with torch.no_grad():
                _write(layers, self)
            yield model
        finally:
            with torch.no_grad():
                for name, layer in layers.items():
                    for attribute, buffer, value in zip(
                        ("running_mean", "running_var"), own[name], saved[name], strict=True
                    ):
                        if buffer is not None:
                            buffer.copy_(value)
                        setattr(layer, attribute, buffer)

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
            content = torch.load(path, map_location="cpu", weights_only=True)
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
    layers = {
        name: layer
        for name, layer in batchnorm_layers(model).items()
        if layer.running_mean is not None and layer.running_var is not None
    }
    flush(layers.values())
    return Statistics(
        {name: layer.running_mean.detach().clone() for name, layer in layers.items()},
        {name: layer.running_var.detach().clone() for name, layer in layers.items()},
        dict(zip(layers, _batches_tracked(layers.values()), strict=True)),
    )


def _batches_tracked(layers) -> list[int]:
    """`num_batches_tracked` of each layer, with one transfer per device."""
    counts = [layer.num_batches_tracked for layer in layers]
    by_device: dict[torch.device, list[int]] = {}
    for index, count in enumerate(counts):
        if isinstance(count, Tensor):
            by_device.setdefault(count.device, []).append(index)
    numbers = [0] * len(counts)
    for indices in by_device.values():
        values = torch.stack([counts[i].reshape(()) for i in indices]).tolist()
        for index, value in zip(indices, values, strict=True):
            numbers[index] = int(value)
    return numbers


def _write(layers: dict[str, nn.Module], statistics: Statistics) -> None:
    for name, layer in layers.items():
        layer.running_mean.copy_(statistics.mean[name])
        layer.running_var.copy_(statistics.var[name])


def _placement(model: nn.Module) -> dict[str, Any]:
    """Device and dtype for buffers lent to a layer that has none: those of the model's weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {"dtype": torch.float32}
