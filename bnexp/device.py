"""The device a run uses, and what is said when its memory does not suffice."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bnexp.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. UserError if it isn't there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"{name!r} is no device; allowed: auto, cpu, cuda, cuda:1, mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {name}: no CUDA device is usable here; use cpu or auto")
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps: Metal is not usable here; use cpu or auto")
    return device


def describe_device(device: torch.device) -> str:
    """For people: "cpu (2 threads)", "cuda:0 (NVIDIA H100)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' * (threads > 1)})"
    return str(device)


def estimate_step_bytes(
    model: nn.Module, channels: int, image_size: tuple[int, int], batch_size: int
) -> int:
    """Bytes of one training step: weights, gradients, momentum, and what backward keeps.

    Counted on torch's meta device with two batch sizes, so nothing is allocated.
    """
    meta = copy.deepcopy(model).to("meta").train()
    weights = sum(p.numel() * p.element_size() for p in meta.parameters())

    def kept(size: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
            return tensor

        images = torch.empty(size, channels, *image_size, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = meta(images)
        del output
        return sum(storages.values())

    per_image = (kept(4) - kept(2)) / 2
    return int(3 * weights + per_image * batch_size)
