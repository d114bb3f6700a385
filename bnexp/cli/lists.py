"""bnexp init, bnexp models and bnexp data: what a config can name."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from pathlib import Path

from rich.table import Table

from bnexp.cli.terminal import output
from bnexp.config.shipped import find_config, shipped_configs
from bnexp.errors import UserError
from bnexp.printable import printable


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
    print(f"train as it says: bnexp train {shlex.quote(str(target))}", file=sys.stderr)


def _first_sentence(text: str) -> str:
    """Of the comment a config begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
    text = " ".join(line[2:] for line in lines)
    return re.split(r"(?<!et al)\. ", text)[0].rstrip(".:")


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


def run_data(root: Path | None, as_json: bool) -> None:
    """List the data sets that `data.name` knows, and where their files are."""
    from bnexp.data.files import search_folders
    from bnexp.data.overview import DATA_SETS, DIGITS, place_of

    found, damaged = {}, {}
    for data_set in DATA_SETS:
        try:
            found[data_set] = place_of(data_set, root)
        except UserError as error:
            found[data_set], damaged[data_set] = None, str(error)
    if as_json:
        rows = [
            {
                "name": each.name,
                "training_images": each.training_images,
                "test_images": each.test_images,
                "shape": list(each.shape),
                "classes": each.classes,
                "here": place is not None,
                "path": None if place is None else printable(place),
                "damaged": damaged.get(each),
                "download_megabytes": each.megabytes,
            }
            for each, place in found.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    console = output()
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("data", no_wrap=True)
    for column in ("training", "test", "pixels", "classes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("files", overflow="fold")
    for each, place in found.items():
        here = damaged.get(each) or f"not here: torchvision downloads {each.megabytes} MB"
        if place is not None:
            here = "in the package" if each is DIGITS else printable(place)
        height, width, channels = each.shape
        numbers = (f"{each.training_images:,}", f"{each.test_images:,}")
        pixels = f"{height}x{width}{'x3' if channels == 3 else ''}"
        table.add_row(each.name, *numbers, pixels, str(each.classes), here)
    table.add_row("image-folder", "", "", "", "", "your own: data.root=FOLDER, a folder per class")
    console.print(table)
    looked = ", ".join(printable(folder) for folder in search_folders(root))
    print(f"\nlooked for in {looked}; say another place by data.root or $BNEXP_DATA")
