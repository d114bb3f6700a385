"""The README's pictures, from a finished run of configs/stale-averages.yaml, the demo:

    python docs/images/make.py runs/stale-averages-1

eval.svg is what `bnexp eval --recompute-stats` prints; report.png is the top of the page that
`bnexp report` writes, as Chromium shows it.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
COLUMNS = 108


def picture_of_eval(run: str) -> None:
    command = ["bnexp", "eval", run, "--recompute-stats"]
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    printed = subprocess.run(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
    console.print("[bold green]$ bnexp eval --recompute-stats", highlight=False)
    console.print(Text.from_ansi(printed.strip("\n")))
    console.save_svg(str(HERE / "eval.svg"), title="bnexp")


def picture_of_report(run: str) -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as api:
        page = Path(folder) / "report.html"
        subprocess.run(
            [sys.executable, "-m", "bnexp", "report", run, "--output", str(page)], check=True
        )
        browser = api.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": 920, "height": 1560})
        tab.goto(page.as_uri())
        tab.screenshot(path=HERE / "report.png")
        browser.close()


if __name__ == "__main__":
    picture_of_eval(sys.argv[1])
    picture_of_report(sys.argv[1])
