"""What a shell is told when it asks how a word on the command line may go on.

Where that is nothing, it offers files and folders by itself, quoted as it needs them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path


def configs(incomplete: str) -> list[str]:
    """Shipped configs, and YAML files here."""
    from bnexp.config.shipped import shipped_configs

    return _beginning([*shipped_configs(), *_yaml_files()], incomplete)


def shipped(incomplete: str) -> list[str]:
    from bnexp.config.shipped import shipped_configs

    return _beginning(shipped_configs(), incomplete)


def studies(incomplete: str) -> list[str]:
    """The same of studies."""
    from bnexp.config.shipped import shipped_studies

    return _beginning([*shipped_studies(), *_yaml_files()], incomplete)


def runs(incomplete: str) -> list[str]:
    """The names of the runs in $BNEXP_RUNS or runs/, newest first."""
    from bnexp.records import all_runs

    names = [run.name for run in all_runs(Path(os.environ.get("BNEXP_RUNS") or "runs"))]
    return _beginning(names, incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _yaml_files() -> list[str]:
    """Those whose names no shell needs to quote."""
    paths = [path for path in Path().glob("*") if path.suffix in (".yaml", ".yml")]
    return sorted(path.name for path in paths if re.fullmatch(r"\w[\w.+-]*", path.name))
