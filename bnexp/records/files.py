"""Reading the files of a record, which may come from anyone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from bnexp.atomic import open_ordinary
from bnexp.errors import UserError

MAX_BYTES = 256 * 2**20  # of a text that is parsed whole


def read_bytes(path: Path, limit: int | None = None) -> bytes | None:
    """The content of the ordinary file at `path`; None if there is nothing.

    UserError, at once, where there is a folder, a pipe, a device or a loop of links, where it
    can't be read, or where it has more than `limit` bytes.
    """
    try:
        with open_ordinary(path) as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise UserError(f"{path} is damaged: it has {size:,} bytes")
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def read_text(path: Path) -> str | None:
    """The same as UTF-8 text of a bounded size."""
    content = read_bytes(path, MAX_BYTES)
    if content is None:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file at `path`, its strings valid Unicode and its numbers finite;
    None if there is no file. UserError if it is anything else."""
    text = read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=_whole)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999, lone surrogates
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _whole(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, with which a short text can be an endless one."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases are not allowed here", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


_UNREADABLE = (
    yaml.YAMLError,
    ValueError,
    RecursionError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
)


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in the YAML file at `path`; None if there is no file. UserError if it is
    anything else."""
    text = read_text(path)
    if text is None:
        return None
    try:
        value = yaml.load(text, _PlainLoader)
        json.dumps(value, ensure_ascii=False, default=str).encode()  # lone surrogates
    except _UNREADABLE as error:  # PyYAML lets many kinds through
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged: {reason[:200]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a mapping")
    return value
