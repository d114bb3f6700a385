"""From plain data, as JSON holds it, to typed results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bnexp.errors import UserError

T = TypeVar("T")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A UserError in the block becomes one that names the file that is damaged."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read(kind: type[T], value: Any) -> T:
    """`value` as a dataclass, whose fields must be there and of their types. Names it does not
    know are left out. UserError saying in one line what is wrong."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or kind.__name__
        raise UserError(f"{where[:100]}: {first['msg']}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{kind.__name__}: {error}") from None
