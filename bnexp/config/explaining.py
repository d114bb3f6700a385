"""One line for what pydantic finds wrong with a config."""

from __future__ import annotations

import difflib
import typing
from typing import Any, Literal

from pydantic_core import ErrorDetails

from bnexp.config.annotations import fields_of, kinds_of, models_in
from bnexp.config.schema import Config
from bnexp.errors import shown


def _keys_at(location: tuple, schema: type) -> list[str]:
    """The keys allowed in the section at `location`, a pydantic error location."""
    models: list[type] = [schema]
    for part in location:
        fields = [fields_of(m)[part] for m in models if part in fields_of(m)]
        if fields:
            models = [m for f in fields for m in models_in(kinds_of(f))]
            continue
        tagged = [m for m in models if part in _tags(m)]
        models = tagged or models
    return sorted({name for m in models for name in fields_of(m)})


def _tags(model: type) -> tuple:
    for field in ("name", "rule"):
        annotation = fields_of(model).get(field)
        if typing.get_origin(annotation) is Literal:
            return typing.get_args(annotation)
    return ()


def written_key(location: tuple, schema: type = Config) -> str:
    """The location as the user wrote it, without the tags pydantic inserts for unions."""
    parts: list[str] = []
    models: list[type] = [schema]
    for part in location:
        fields = [fields_of(m)[part] for m in models if part in fields_of(m)]
        if not fields and any(part in _tags(m) for m in models):
            models = [m for m in models if part in _tags(m)]
            continue
        word = str(part)
        parts.append(word if word.isprintable() and len(word) <= 100 else shown(word))
        if fields:
            models = [m for f in fields for m in models_in(kinds_of(f))]
    return ".".join(parts)


def explain(error: ErrorDetails, schema: type = Config) -> str:
    """One line for one pydantic error in what should be a `schema`."""
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    key = written_key(location, schema)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        if location[-1] == "momentum" and location[0] != "training":
            return _momentum_advice(key, error["input"])
        known = _keys_at(location[:-1], schema)
        near = difflib.get_close_matches(str(location[-1])[:100], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        if len(location) == 4 and location[1] in ("optimizer", "schedule"):
            whole = f"{location[0]}.{location[1]}"
            hint += f" (to change the kind, replace it: {whole}='{{name: {location[2]}, ...}}')"
        return f"unknown key {key}; {hint}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "union_tag_not_found":
        tag = context["discriminator"].strip("'")
        return f"{key}.{tag} is missing"
    if kind == "union_tag_invalid":
        tag = context["discriminator"].strip("'")
        return f"{key}.{tag} is {shown(context['tag'])}; allowed: {context['expected_tags']}"
    if kind in ("model_type", "model_attributes_type", "dataclass_type", "dict_type"):
        return f"{key or 'the config'} must be a section of keys, not {shown(error['input'])}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    said = f"{key} is {shown(error['input'])}; {message.removeprefix('input ')}"
    if kind == "int_parsing" and (number := _whole(error["input"])) is not None:
        said = f"{key} is {error['input']!r}; write {number}"
    return said


def _whole(text: str) -> int | None:
    """The whole number that a text such as 1e3 stands for."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() and abs(number) < 2**63 else None


def _momentum_advice(key: str, value: Any) -> str:
    advice = "bnexp says decay, the weight kept on the old value; PyTorch's momentum m is decay 1-m"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        advice += f", so for PyTorch's momentum {value:g} write decay: {round(1 - value, 12):g}"
    return f"{key}: statistics have no momentum here; {advice}"
