"""What the schema admits somewhere: a list of types, its unions and Literals opened."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel

Kinds = Sequence[Any]


def kinds_of(annotation: Any) -> Kinds:
    """The types an annotation admits; of a Literal, those of its values."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return kinds_of(parts[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for part in parts for kind in kinds_of(part)]
    if origin is Literal:
        return list(dict.fromkeys(type(part) for part in parts))
    return [annotation]


def below(kinds: Kinds, key: str) -> Kinds:
    """What is admitted under `key`; nothing where no section has it."""
    found = [
        model.model_fields[key].annotation
        for model in models_in(kinds, False)
        if key in model.model_fields
    ]
    found += [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict]
    return [kind for annotation in found for kind in kinds_of(annotation)]


def items_of(kinds: Kinds) -> Kinds:
    """What is admitted in a list or tuple."""
    lists = [kind for kind in kinds if typing.get_origin(kind) in (list, tuple)]
    return [kind for each in lists for part in typing.get_args(each) for kind in kinds_of(part)]


def models_in(kinds: Kinds, values: bool = True) -> list[type[BaseModel]]:
    """The sections admitted, also (with `values`) as the values of a mapping."""
    found = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        elif values and typing.get_origin(kind) is dict:
            found += models_in(kinds_of(typing.get_args(kind)[1]))
    return found


def admits_names(kinds: Kinds) -> bool:
    """Whether a mapping of names, which the user chooses, is admitted."""
    return any(typing.get_origin(kind) is dict for kind in kinds)


def takes_text(kinds: Kinds) -> bool:
    """Whether a text or a path is meant, and nothing that could be read as a number."""
    return any(kind in (str, Path) for kind in kinds) and not any(
        kind in (bool, int, float) for kind in kinds
    )
