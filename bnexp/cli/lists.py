"""bnexp init and bnexp models: what comes with the package."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from bnexp.cli.tables import output
from bnexp.config.shipped import find_config, shipped_configs
from bnexp.errors import UserError


def run_init(name: str | None, path: Path | None) -> None:
    """Write the shipped config `name` to `path` (NAME.yaml); without a name, list them."""
    if name is None:
        for known, file in shipped_configs().items():
            print(f"{known:18}{_first_sentence(file.read_text(encoding='utf-8'))}")
        print("\nbnexp init NAME writes one of them here", file=sys.stderr)
        return
    if name not in shipped_configs():
        find_config(name)  # names what is near
        raise UserError(f"{name} is a file, not one of {', '.join(shipped_configs())}")
    target = path or Path(f"{name}.yaml")
    text = shipped_configs()[name].read_text(encoding="utf-8")
    try:
        with open(target, "x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise UserError(
            f"{target} exists already; name another file: bnexp init {name} FILE"
        ) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{target} can't be written: {error.strerror}") from None
    print(target)


def _first_sentence(text: str) -> str:
    """Of the comment a config begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
    return " ".join(line[2:] for line in lines).split(". ")[0].rstrip(".:")


def run_models(as_json: bool) -> None:
    """List the networks that `model.name` knows."""
    from bnexp.networks import MODELS
    from bnexp.networks.torchvisions import torchvision_names

    names = [*MODELS, *torchvision_names()]
    if as_json:
        print(json.dumps(names, indent=2))
        return
    console = output()
    console.print("\n".join(MODELS), highlight=False)
    console.print(
        "  ".join(torchvision_names()), highlight=False, soft_wrap=not console.is_terminal
    )
