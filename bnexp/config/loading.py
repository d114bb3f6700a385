"""From a YAML file and overrides to a `Config`, or to one line that says what is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bnexp.config.annotations import Kinds, admits_names, below, items_of, takes_text
from bnexp.config.explaining import explain, written_key
from bnexp.config.schema import Config
from bnexp.config.yaml_text import MAX_CHARACTERS, MAX_DEPTH, Scalar, parse_yaml, unshared
from bnexp.errors import UserError, shown

MAX_TEXT = 4096


Schema = TypeVar("Schema", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in the YAML file at `path`, with dotted `key=value` overrides applied.

    Raises UserError (one line) for a missing or unreadable file, YAML that does not parse, an
    unknown key, a value of the wrong type or out of range, or sections that contradict each other.
    """
    return load(path, overrides, Config)


def load(path: Path, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """As `load_config`, for any of the schemas; a `name` that is missing is the file's."""
    tree = read_tree(path)
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
    tree.setdefault("name", words[:100] or "run")
    return resolved(tree, overrides, _written(path), schema)


def resolve(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    """The `Config` of an already parsed mapping, which is left as it is; `source` names it in
    errors."""
    return resolved(tree, overrides, source, Config)


def resolved(
    tree: dict[str, Any], overrides: Sequence[str], source: str, schema: type[Schema]
) -> Schema:
    """As `resolve`, for any of the schemas."""
    tree = unshared(tree)
    for assignment in overrides:
        override(tree, assignment, schema)
    try:
        tree = _typed(tree, [schema], schema)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        more = error.error_count() - 1
        tail = f" (and {more} more)" if more else ""
        raise UserError(f"{source}: {explain(first, schema)}{tail}") from None


def _written(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() and len(text) <= 200 else shown(text)


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`, its values not yet typed (`Scalar`). UserError."""
    where = _written(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CHARACTERS + 1)
        if len(content) > MAX_CHARACTERS:
            raise UserError(f"{where}: more than {MAX_CHARACTERS:,} bytes are no config")
        text = content.decode()
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1) or beside[:5]
        hint = f"; that folder has {', '.join(near)}" if near else ""
        raise UserError(f"no config at {where}{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{where} is a folder; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no text in UTF-8: byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{where} can't be read: {error.strerror}") from None
    tree = parse_yaml(text, where)
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a config is a mapping of keys to values; see bnexp init digits")
    return tree


def override(tree: dict[str, Any], assignment: str, schema: type[BaseModel]) -> None:
    """Apply the dotted `key=value` to `tree`, in place. UserError where it can't be."""
    key, text = split_assignment(assignment)
    said = f"override {shown(assignment)}"
    node, last, kinds = _place(tree, key, schema, said)
    node[last] = _value(text, kinds, said)


def split_assignment(assignment: str) -> tuple[str, str]:
    """The key and the text of `key=value`. UserError where it isn't one."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(
            f"{shown(assignment)} is no override: write key=value, as in training.steps=500"
        )
    if len(key) > 1000:
        raise UserError(f"override {shown(assignment)}: no key is that long")
    return key, text


def assign(tree: dict[str, Any], key: str, value: Any, schema: type[BaseModel], said: str) -> None:
    """Put `value`, not yet typed, where the dotted `key` of a `schema` is, replacing what is there.
    UserError, which begins with `said`, where no key can be."""
    node, last, _ = _place(tree, key, schema, said)
    node[last] = value


def _place(
    tree: dict[str, Any], key: str, schema: type[BaseModel], said: str
) -> tuple[dict[str, Any], str, Kinds]:
    """The section of `tree` that the dotted `key` lies in, made where it isn't there, its last
    part, and what is admitted there. Epochs and steps replace each other."""
    *parents, last = parts = _split(tree, key, schema)
    if len(parts) > MAX_DEPTH:
        raise UserError(f"{said}: no key lies {len(parts)} sections deep")
    node: Any = tree
    kinds: Kinds = [schema]
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if child is None or (isinstance(child, Scalar) and child.value is None):
            child = node[parent] = {}
        if not isinstance(child, dict):
            value = child.text if isinstance(child, Scalar) else child
            at = ".".join(parents[: depth + 1])
            raise UserError(f"{said}: {at} is {shown(value)}, not a section")
        node, kinds = child, below(kinds, parent)
    if key in ("training.epochs", "training.steps"):
        node.pop("epochs", None)
        node.pop("steps", None)
    return node, last, below(kinds, last)


def _split(tree: dict[str, Any], key: str, schema: type[BaseModel]) -> list[str]:
    """The parts of a dotted key; a name that has dots itself, in `tree` or given anew where the
    schema has a mapping of names, stays whole."""
    parts: list[str] = []
    node: Any = tree
    kinds: Kinds = [schema]
    rest: str | None = key
    while rest is not None:
        names = node if isinstance(node, dict) else {}
        known = [name for name in names if f"{rest}.".startswith(f"{name}.")]
        if known:
            part = max(known, key=len)
        elif admits_names(kinds):
            name, _, last = rest.rpartition(".")
            part = name if name and below(below(kinds, name), last) else rest
        else:
            part = rest.partition(".")[0]
        parts.append(part)
        rest = None if part == rest else rest[len(part) + 1 :]
        node, kinds = names.get(part), below(kinds, part)
    return parts


def _value(text: str, kinds: Kinds, said: str) -> Any:
    """A text or a path is taken as typed unless it is quoted or null; all else is YAML."""
    if takes_text(kinds) and not text.startswith(("'", '"')):
        return Scalar(text, quoted=text not in ("", "null"))
    return parse_yaml(text, said)


def _typed(
    node: Any, kinds: Kinds, schema: type[BaseModel], location: tuple[str | int, ...] = ()
) -> Any:
    """The tree with each scalar read as what may stand there: a text as typed, or a value."""
    if isinstance(node, dict):
        return {
            k: _typed(inner, below(kinds, k), schema, (*location, k)) for k, inner in node.items()
        }
    if isinstance(node, list):
        items = items_of(kinds)
        return [_typed(inner, items, schema, (*location, i)) for i, inner in enumerate(node)]
    plain = node.text if isinstance(node, Scalar) else node
    value = node.value if isinstance(node, Scalar) else node
    if isinstance(plain, str) and takes_text(kinds) and not (value is None and NoneType in kinds):
        if len(plain) > MAX_TEXT:
            raise UserError(
                f"{written_key(location, schema)} has more than {MAX_TEXT:,} characters"
            )
        return plain
    if wrong := _misreading(value, kinds):
        raise UserError(f"{written_key(location, schema)} is {shown(plain)}; {wrong}")
    return value


def _misreading(value: Any, kinds: Kinds) -> str | None:
    """What is wrong with a value that pydantic would turn into a number nobody meant."""
    if isinstance(value, bool) and kinds and bool not in kinds and Any not in kinds:
        return "true, false and YAML's yes, no, on and off are not allowed here"
    if isinstance(value, float) and int in kinds and float not in kinds:
        return f"write {int(value)}" if value.is_integer() and abs(value) < 2**63 else None
    return None
