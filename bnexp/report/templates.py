"""The pages' templates: everything is escaped, and a name that is missing is an error."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(name: str, **filters: Callable) -> Template:
    """The template in the file `name`, with these filters."""
    environment = Environment(
        loader=PackageLoader("bnexp.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
