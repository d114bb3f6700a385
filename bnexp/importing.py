"""Objects of the user's own code, named as `package.module:object`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from bnexp.errors import UserError


def is_object_name(name: str) -> bool:
    """Whether `name` reads as `package.module:object` and not as a path."""
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def require_extra(package: str, what: str) -> None:
    """UserError where the optional `package`, which `what` needs, can't be imported. Extras are
    called as their packages are."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} needs {package}: pip install 'bnexp[{package}]'") from None


IMPORTED: list[str] = []
"""The objects of the user's own code that `import_object` has imported in this process."""


def import_object(name: str) -> Any:
    """What `package.module:object` names, modules found as Python finds them.

    The working folder is searched too and stays on `sys.path`: what is imported may import more,
    later and in worker processes. Raises UserError where the module or the object isn't there;
    what the module itself raises on import passes through.
    """
    module_name, _, attribute = name.partition(":")
    if not is_object_name(name):
        raise UserError(f"{name!r} names no object: write package.module:object")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    IMPORTED.append(name)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"{name}: {module_name} needs the module {error.name}, which is not installed here"
            ) from error
        raise UserError(
            f"{name}: there is no module {error.name}; start bnexp in the folder it lies in, or "
            "put that folder on PYTHONPATH"
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{name}: {module_name} has no {attribute}{hint}")
        found = getattr(found, part)
    return found


def call(name: str, function: Any, arguments: Mapping[str, Any]) -> Any:
    """`function(**arguments)`; UserError where the arguments don't fit its signature."""
    import inspect

    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise UserError(f"{name} can't be called with {given}: {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    return function(**arguments)
