"""Writes docs/config.md, the reference of all config keys, from the pydantic models:

python docs/config_reference.py
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, get_args, get_origin

import annotated_types
import pydantic.dataclasses
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bnexp.config import Config
from bnexp.config.annotations import kinds_of, models_in

HEAD = """\
# Config reference

Every key of a config, with its default. Made from the models in `bnexp/config/schema.py` by
`python docs/config_reference.py`; `bnexp config CONFIG` prints a config with all of them filled in,
and `bnexp config --schema` the JSON schema for your editor. `null` means: not set.
"""


def fields_of(model: type) -> dict[str, FieldInfo]:
    if issubclass(model, BaseModel):
        return model.model_fields
    fields = pydantic.dataclasses.dataclass(model, frozen=True).__pydantic_fields__
    for name, described in TypeAdapter(model).json_schema()["properties"].items():
        fields[name].description = described.get("description")
    return fields


def allowed(annotation, metadata=()) -> str:
    """What may be said, in words: `number from 0 to below 1`, `exact | pooled | batch-mean`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(parts[0], parts[1:])
    if origin is Literal:
        return " \\| ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, UnionType):
        return " or ".join(allowed(part) for part in parts if part is not type(None))
    if origin is list:
        return f"list of {allowed(parts[0])}"
    if origin is tuple:
        return f"list of {len(parts)}: {allowed(parts[0])}"
    words = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    text = words[annotation]
    limits = [item for field in metadata for item in getattr(field, "metadata", [field])]
    for limit in limits:
        if isinstance(limit, annotated_types.Ge):
            text += f" from {limit.ge:g}"
        elif isinstance(limit, annotated_types.Gt):
            text += f" above {limit.gt:g}"
        elif isinstance(limit, annotated_types.Le) and limit.le < 2**20:
            text += f" to {limit.le:g}"
        elif isinstance(limit, annotated_types.Lt) and limit.lt < 2**20:
            text += f" below {limit.lt:g}"
    return text


def default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined or field.kw_only:
        return "required"
    value = field.default
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def rows(model: type[BaseModel]) -> list[str]:
    return [
        f"| `{name}` | {allowed(field.annotation, field.metadata)} | {default(field)} | "
        f"{' '.join((field.description or '').split())} |"
        for name, field in fields_of(model).items()
        if not models_in(kinds_of(field.annotation))
    ]


def sections(model: type[BaseModel], path: str) -> list[str]:
    """A table of the model's own keys, then those of the sections in it."""
    lines = [f"\n## {path or 'top level'}\n"]
    if described := (model.__doc__ or "").strip().partition("\n")[0]:
        lines.append(described + "\n")
    if table := rows(model):
        lines += ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |", *table]
    for name, field in fields_of(model).items():
        inner = models_in(kinds_of(field.annotation))
        if not inner:
            continue
        below = f"{path}.{name}" if path else name
        if name == "estimators":
            below += ".<name>"
        for section in inner:
            tag = next(
                (
                    f" (`{key}: {get_args(fields_of(section)[key].annotation)[0]}`)"
                    for key in ("name", "rule")
                    if len(inner) > 1 and key in fields_of(section)
                ),
                "",
            )
            lines += sections(section, below + tag)
            if field.description and section is inner[0]:
                lines.insert(
                    lines.index(f"\n## {below}{tag}\n") + 1,
                    " ".join(field.description.split()) + "\n",
                )
    return lines


def reference() -> str:
    return HEAD + "\n".join(sections(Config, "")) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(reference())
