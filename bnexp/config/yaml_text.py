"""YAML without its surprises: a text becomes a tree of dict, list and `Scalar`.

A scalar stays the text that was typed until the schema has said whether a text or a number belongs
there. Numbers are YAML 1.2's: `010` is ten, and `1:30`, `0o10` and a date are texts. Merge keys are
as their specification has them (https://yaml.org/type/merge.html), aliases are copies, tags and
keys given twice are refused. Size and depth are bounded, so that no input takes long.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from bnexp.errors import UserError, shown

MAX_CHARACTERS = 2**18
MAX_NODES = 10_000
MAX_DEPTH = 20
_MAX_DIGITS = 300

_CONSTANTS: dict[str, bool | None] = {
    spelling: value
    for words, value in (("null", None), ("true yes on", True), ("false no off", False))
    for word in words.split()
    for spelling in (word, word.capitalize(), word.upper())
} | {"": None, "~": None}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Scalar:
    text: str
    quoted: bool = False

    @property
    def value(self) -> bool | int | float | str | None:
        """What it means where a number or a constant may stand."""
        if self.quoted:
            return self.text
        if self.text in _CONSTANTS:
            return _CONSTANTS[self.text]
        if _INTEGER.fullmatch(self.text) and len(self.text) <= _MAX_DIGITS:
            return int(self.text)
        if _FLOAT.fullmatch(self.text):
            return float(self.text)
        if special := _NOT_FINITE.fullmatch(self.text):
            return float(special[1] + special[2])
        return self.text


def parse_yaml(text: str, where: str) -> Any:
    """The one document in `text`. Raises UserError, which begins with `where` and the line."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: more than {MAX_CHARACTERS:,} characters are no config")
    try:
        return _Composer(text, where).document()
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{_place(where, mark)}: not valid YAML: {problem}") from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not valid YAML: {error}") from None


def unshared(tree: Any) -> Any:
    """A copy in which no part is the same object as another. UserError if that is too much."""
    return _Composer("", "config").copy(tree)


def _place(where: str, mark: yaml.Mark | None) -> str:
    return f"{where} line {mark.line + 1}, column {mark.column + 1}" if mark else where


class _Composer:
    def __init__(self, text: str, where: str):
        self.events = yaml.parse(text, yaml.SafeLoader)
        self.where = where
        self.anchors: dict[str, Any] = {}
        self.nodes = 0

    def document(self) -> Any:
        next(self.events)  # the stream starts
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return Scalar("")
        tree = self._node(next(self.events), 0)
        next(self.events)  # the document ends
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            self._refuse(event, "a second document begins")
        return tree

    def _refuse(self, event: yaml.Event, problem: str) -> NoReturn:
        raise UserError(f"{_place(self.where, event.start_mark)}: {problem}")

    def _count(self, depth: int) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise UserError(f"{self.where}: more than {MAX_NODES:,} values are no config")
        if depth > MAX_DEPTH:
            raise UserError(f"{self.where}: nested more than {MAX_DEPTH} deep")

    def _node(self, event: yaml.Event, depth: int) -> Any:
        self._count(depth)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self._refuse(event, f"*{event.anchor[:60]} has no anchor before it")
            return self.copy(self.anchors[event.anchor], depth)
        assert isinstance(event, yaml.NodeEvent)
        if event.tag is not None:
            tag = shown(event.tag.replace("tag:yaml.org,2002:", "!!"))
            self._refuse(event, f"the tag {tag} is not understood here: write the value alone")
        node: Any
        if isinstance(event, yaml.ScalarEvent):
            node = Scalar(event.value, quoted=event.style is not None)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(depth)
        else:
            node = self._mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] | None = None
        own: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            if not isinstance(key, Scalar):
                self._refuse(event, "a key must be a word")
            value_event = next(self.events)
            value = self._node(value_event, depth + 1)
            merge = key == Scalar("<<")
            if key.text in own or (merge and merged is not None):
                self._refuse(event, f"the key {shown(key.text)} is given twice")
            if merge:
                merged = self._merge(value, value_event)
            else:
                own[key.text] = value
        return {**(merged or {}), **own}

    def _merge(self, value: Any, event: yaml.Event) -> dict[str, Any]:
        """Where a key is in several mappings, the earlier one has it."""
        merged: dict[str, Any] = {}
        for mapping in value if isinstance(value, list) else [value]:
            if not isinstance(mapping, dict):
                self._refuse(event, "<< takes a mapping or a list of mappings")
            for key, inner in mapping.items():
                merged.setdefault(key, inner)
        return merged

    def copy(self, node: Any, depth: int = 0) -> Any:
        self._count(depth)
        if isinstance(node, dict):
            return {key: self.copy(inner, depth + 1) for key, inner in node.items()}
        if isinstance(node, list):
            return [self.copy(inner, depth + 1) for inner in node]
        return node
