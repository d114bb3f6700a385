"""A network for images, by its name."""

from __future__ import annotations

import difflib
from typing import Literal

from torch import nn

from bnexp.errors import UserError
from bnexp.networks.own import MODELS
from bnexp.networks.torchvisions import DEFAULT_EPS, build_torchvision, torchvision_names
from bnexp.nn.renormalization import PAPER, RenormLimits, use_batch_renorm, use_moving_averages

Norm = Literal["batch", "batch-renorm", "moving-average", "none"]


def build_model(
    name: str,
    *,
    channels: int,
    image_size: tuple[int, int],
    num_classes: int,
    norm: Norm = "batch",
    eps: float = DEFAULT_EPS,
    renorm: RenormLimits = PAPER,
) -> nn.Module:
    """The network called `name`, freshly initialized with torch's global random generator.

    It maps float (batch, channels, *image_size) to logits (batch, num_classes). Names are those
    in `MODELS`, and torchvision/<name> for each of torchvision's classifiers. `norm="none"` leaves
    batch normalization out and gives the layers before it a bias; "batch-renorm" (with the limits
    `renorm`) and "moving-average" have the initial weights of "batch". Raises UserError for an
    unknown name, for images that are too small for the network, and for `norm="none"` with a
    network of torchvision's.
    """
    model = _build(name, channels, image_size, num_classes, norm == "none", eps)
    if norm == "batch-renorm":
        return use_batch_renorm(model, renorm)
    return use_moving_averages(model) if norm == "moving-average" else model


def _build(
    name: str,
    channels: int,
    image_size: tuple[int, int],
    num_classes: int,
    without: bool,
    eps: float,
) -> nn.Module:
    if name.startswith("torchvision/") and name in (names := torchvision_names()):
        if without:
            raise UserError(
                f"model.norm: none is for {', '.join(MODELS)}; {name} comes with its own layers"
            )
        return build_torchvision(names[name], channels, image_size, num_classes, eps)
    if name not in MODELS:
        raise UserError(f"model.name: no model is called {name!r}; {_nearest(name)}")
    return MODELS[name](channels, image_size, num_classes, "none" if without else "batch", eps)


def _nearest(name: str) -> str:
    """Which names come closest to a wrong one, with or without its torchvision/."""
    bare = {full.removeprefix("torchvision/"): full for full in (*MODELS, *torchvision_names())}
    wanted = name.lower().replace("_", "-")
    spelled = {b.replace("_", "-"): b for b in bare}
    near = difflib.get_close_matches(wanted.removeprefix("torchvision/"), spelled, n=3)
    if near:
        return f"did you mean {' or '.join(bare[spelled[match]] for match in near)}?"
    return f"there are {', '.join(MODELS)} and torchvision/<name>"
