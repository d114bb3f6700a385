"""What a shell is told when it asks how a word on the command line may go on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def configs(incomplete: str) -> list[str]:
    """Shipped configs, and YAML files and folders here."""
    from bnexp.config.shipped import shipped_configs

    return [*_beginning(shipped_configs(), incomplete), *_files(incomplete, ".yaml", ".yml")]


def shipped(incomplete: str) -> list[str]:
    from bnexp.config.shipped import shipped_configs

    return _beginning(shipped_configs(), incomplete)


def studies(incomplete: str) -> list[str]:
    """The same of studies."""
    from bnexp.config.shipped import shipped_studies

    return [*_beginning(shipped_studies(), incomplete), *_files(incomplete, ".yaml", ".yml")]


def runs(incomplete: str) -> list[str]:
    """The names of the runs in $BNEXP_RUNS or runs/, newest first, and folders here."""
    from bnexp.records import all_runs

    names = [run.name for run in all_runs(Path(os.environ.get("BNEXP_RUNS") or "runs"))]
    return [*_beginning(names, incomplete), *_files(incomplete)]


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _files(incomplete: str, *suffixes: str) -> list[str]:
    folder, begun = os.path.split(incomplete)
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        os.path.join(folder, entry.name) + "/" * entry.is_dir()
        for entry in entries
        if entry.name.startswith(begun)
        and (begun or not entry.name.startswith("."))
        and (entry.is_dir() or entry.name.endswith(suffixes))
    ]
