"""Opening the user's model: torchvision's, timm's, or what their own code builds."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from bnexp.errors import UserError
from bnexp.importing import call, import_object, is_object_name


def open_model(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that `name` stands for, without pretrained weights, in evaluation mode.

    `torchvision/NAME`: any of torchvision's models; `timm/NAME`: any of timm's (which must be
    installed); `package.module:object`: an `nn.Module`, or a callable that returns one and is
    called with `arguments`. Nothing is downloaded. Raises UserError for a name that is none of
    these, and for arguments that don't fit.
    """
    arguments = dict(arguments or {})
    library, _, model_name = name.partition("/")
    if library == "torchvision" and model_name:
        model = _torchvision(model_name, arguments)
    elif library == "timm" and model_name:
        model = _timm(model_name, arguments)
    elif is_object_name(name):
        model = _own(name, arguments)
    else:
        raise UserError(
            f"{name!r} names no model: write torchvision/NAME, timm/NAME or package.module:callable"
        )
    return model.eval()


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in (known := models.list_models()):
        raise UserError(f"torchvision has no model {name!r}{_near(name, known)}")
    builder = models.get_model_builder(name)
    # Unless told otherwise, models for segmentation and detection download a backbone.
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments = {"weights_backbone": None, **arguments}
    return _build(f"torchvision/{name}", builder, {"weights": None, **arguments})


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(f"timm/{name} needs timm: pip install timm") from None
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise UserError(f"timm has no model {name!r}{_near(base, timm.list_models())}")
    return _build(f"timm/{name}", timm.create_model, {"model_name": name, **arguments})


def _own(name: str, arguments: dict[str, Any]) -> nn.Module:
    found = import_object(name)
    if isinstance(found, nn.Module):
        if arguments:
            raise UserError(f"{name} is a module already: model.arguments have nothing to go to")
        return found
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}: a model, or a callable, is needed")
    return _build(name, found, arguments)


def _build(name: str, builder: Callable, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model = call(name, builder, arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} can't be built with these model.arguments: {reason}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f": did you mean {' or '.join(near)}?" if near else ""
