"""Weights to start a training from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.networks.weights import (
    Checkpoint,
    Match,
    load_weights,
    match,
    number_of_classes,
    read_checkpoint,
)


@dataclass(frozen=True)
class GivenWeights:
    """What was loaded: the file, or the name; what tells its tensors from others; and what there
    is to say about it, a line each."""

    source: str
    hash: str
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "hash": self.hash}


def load_given(source: str, name: str, model: nn.Module) -> GivenWeights:
    """Load weights and BN statistics into `model`, the network called `name`, in place.

    `source`: a file, as `networks.weights` reads it; or torchvision/NAME, its published weights of
    that name, downloaded if they aren't in torch's cache. Where only the classifier is for another
    number of classes, it keeps its initial values.

    Raises UserError where there are no such weights, or they are not the model's.
    """
    library, _, entry = source.partition("/")
    if library == "torchvision" and entry.isupper():
        checkpoint = _published(name, entry, source)
    else:
        checkpoint = read_checkpoint(Path(source))
    found = match(checkpoint, model)
    remarks = [f"starting from {source}{f', {found.key}' if found.key else ''}"]
    if classes := number_of_classes(found):
        fresh = tuple(found.misshapen)
        found = _without(found, fresh)
        remarks.append(f"{', '.join(fresh)} start afresh: the file's are for {classes} classes")
    if found.misshapen:
        shapes = [f"{n} {file}, not {own}" for n, (file, own) in found.misshapen.items()]
        more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
        raise UserError(
            f"model.weights {source} have other shapes than {name}: {'; '.join(shapes[:3])}{more}"
        )
    if found.missing_buffers:
        layers = ", ".join(found.missing_buffers[:3])
        remarks.append(f"no running averages in the file for {layers}: they start afresh")
    load_weights(checkpoint, model, found)
    return GivenWeights(source, _hash(model, found), tuple(remarks))


def _without(found: Match, fresh: tuple[str, ...]) -> Match:
    names = {name: theirs for name, theirs in found.names.items() if name not in fresh}
    return replace(found, names=names, misshapen={})


def _published(name: str, entry: str, source: str) -> Checkpoint:
    from torchvision import models

    try:
        weights = models.get_model_weights(name.removeprefix("torchvision/"))[entry]
    except (ValueError, KeyError):
        raise UserError(f"model.weights {source}: torchvision has none of {name}") from None
    try:
        state: Mapping[str, Any] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.weights {source} can't be downloaded ({reason}): name a file of them"
        ) from None
    return Checkpoint(Path(source), dict(state))


def _hash(model: nn.Module, found: Match) -> str:
    """Of the loaded tensors' names and values."""
    whole = hashlib.blake2b(digest_size=16)
    state = model.state_dict()
    for name in sorted(found.names):
        whole.update(name.encode())
        tensor = state[name].detach().cpu().contiguous()
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
