"""What the schema admits somewhere: a list of types, its unions and Literals opened."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
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
    found = [fields_of(m)[key] for m in models_in(kinds, False) if key in fields_of(m)]
    found += [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict]
    return [kind for annotation in found for kind in kinds_of(annotation)]


def items_of(kinds: Kinds) -> Kinds:
    """What is admitted in a list or tuple."""
    lists = [kind for kind in kinds if typing.get_origin(kind) in (list, tuple)]
    return [kind for each in lists for part in typing.get_args(each) for kind in kinds_of(part)]


@functools.cache
def fields_of(model: type) -> dict[str, Any]:
    """The annotation of each of its fields, by name."""
    if issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    hints = typing.get_type_hints(model, include_extras=True)
    return {field.name: hints[field.name] for field in fields(model)}  # type: ignore[arg-type]


def models_in(kinds: Kinds, values: bool = True) -> list[type]:
    """The sections admitted, also (with `values`) as the values of a mapping."""
    found = []
    for kind in kinds:
        if isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind)):
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
