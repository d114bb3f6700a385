"""bnexp config"""

from __future__ import annotations

import json
from pathlib import Path

from bnexp.config import Config, load_config
from bnexp.errors import UserError


def run_config(path: Path | None, overrides: list[str], schema: bool) -> None:
    if schema:
        print(json.dumps(Config.model_json_schema(), indent=2))
    elif path is None:
        raise UserError("name a config, as in: bnexp config configs/digits.yaml (or --schema)")
    else:
        print(load_config(path, overrides).to_yaml(), end="")
