"""bnexp train"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[
        str | None, typer.Argument(help="YAML file; not needed with --resume.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="Dotted overrides: training.steps=500"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue this run from its checkpoint.")
    ] = None,
) -> None:
    """Train a network and compare its BN statistics."""
    from bnexp.cli.training import train_and_show

    assignments = list(overrides or [])
    if resume and config and "=" in config:
        assignments.insert(0, config)
        config = None
    if device is not None:
        assignments.append(f"device={json.dumps(device)}")
    if name is not None:
        assignments.append(f"name={json.dumps(name)}")
    train_and_show(None if config is None else Path(config), assignments, resume)
