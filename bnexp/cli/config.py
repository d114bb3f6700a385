"""bnexp config"""

from __future__ import annotations

import json

from bnexp.config import Config, load_config
from bnexp.config.shipped import find_config
from bnexp.errors import UserError


def run_config(path: str | None, overrides: list[str], schema: bool) -> None:
    if schema:
        print(json.dumps(Config.model_json_schema(), indent=2))
    elif path is None:
        raise UserError("name a config, as in: bnexp config digits (or --schema)")
    else:
        config = load_config(find_config(path), overrides)
        config.require_gates()
        print(config.to_yaml(), end="")
