"""From a YAML file and overrides to a `Config`, or to one line that says what is wrong."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bnexp.config.explaining import explain
from bnexp.config.schema import Config
from bnexp.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML forbids and PyYAML lets pass."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1) or beside[:5]
        hint = f"; that folder has {', '.join(near)}" if near else ""
        raise UserError(f"no config at {path}{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, see configs/digits.yaml")
    return tree


def _override(tree: dict, assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"{assignment!r} is no override: write key=value, as in training.steps=500")
    *parents, last = _split(tree, key)
    node = tree
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            at = ".".join(parents[: depth + 1])
            raise UserError(f"override {assignment!r}: {at} is {child!r}, not a section")
        node = child
    if key in ("training.epochs", "training.steps"):
        node.pop("epochs", None)
        node.pop("steps", None)
    node[last] = _parse_yaml(text, f"override {assignment!r}") if text else None


def _split(tree: dict, key: str) -> list[str]:
    """The parts of a dotted key; names in `tree` that have dots themselves stay whole."""
    words, parts = key.split("."), []
    node: Any = tree
    while words:
        known = node if isinstance(node, dict) else {}
        lengths = range(len(words), 0, -1)
        length = next((n for n in lengths if ".".join(words[:n]) in known), 1)
        part, words = ".".join(words[:length]), words[length:]
        parts.append(part)
        node = known.get(part)
    return parts


def load_config(path: Path, overrides: list[str] = ()) -> Config:
    """The config in the YAML file at `path`, with dotted `key=value` overrides applied.

    Raises UserError (one line) for a missing or unreadable file, YAML that does not parse, an
    unknown key, a value of the wrong type or out of range, or sections that contradict each other.
    """
    tree = _read(path)
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
    tree.setdefault("name", words[:100] or "run")
    return resolve(tree, overrides, str(path))


def resolve(tree: dict, overrides: list[str], source: str) -> Config:
    """The `Config` of an already parsed mapping; `source` names it in errors."""
    for assignment in overrides:
        _override(tree, assignment)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        more = error.error_count() - 1
        tail = f" (and {more} more)" if more else ""
        raise UserError(f"{source}: {explain(first)}{tail}") from None
