"""bnexp config"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def config(
    path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file to resolve.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Dotted overrides.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema for editors instead.")
    ] = False,
) -> None:
    """Print the resolved config, defaults filled in."""
    from bnexp.errors import UserError

    if schema:
        import json

        from bnexp.config import Config

        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
        return
    if path is None:
        raise UserError("name a config, as in: bnexp config configs/digits.yaml (or --schema)")
    from bnexp.config import load_config

    typer.echo(load_config(path, overrides or []).to_yaml(), nl=False)
