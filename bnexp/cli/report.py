"""bnexp report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FORMATS = ("html", "png", "svg")


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="Run folders or names; the newest finished run if left out."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page, or the folder of the figures; in the run's folder if left out.",
        ),
    ] = None,
    file_format: Annotated[
        str, typer.Option("--format", help="html: one page; png or svg: every figure as a file.")
    ] = "html",
) -> None:
    """Write one self-contained HTML page about runs."""
    from bnexp.errors import UserError
    from bnexp.records import find_run, newest_finished_run

    if file_format not in FORMATS:
        raise UserError(f"--format {file_format}: allowed are {', '.join(FORMATS)}")
    found = [find_run(name) for name in runs] if runs else [newest_finished_run()]
    if file_format == "html":
        from bnexp.report.page import write_report

        folder = found[0].path if len(found) == 1 else found[0].path.parent
        path = output or folder / "report.html"
        if path.is_dir():
            raise UserError(f"--output {path} is a folder; name the file, as in {path}/report.html")
        if path.exists() and not path.is_file():
            raise UserError(f"--output {path} is no ordinary file")
        _make_folder(path.parent)
        try:
            write_report(found, path)
        except FileNotFoundError as error:
            raise UserError(f"--output {path} can't be written: {error.strerror}") from None
        print(path)
        return

    from bnexp.report.figures import save_plots
    from bnexp.report.run_data import RunData

    for run in found:
        folder = output or run.path / "figures"
        if output and len(found) > 1:
            folder = output / run.name
        _make_folder(folder)
        for path in save_plots(RunData.read(run), folder, file_format):
            print(path)


def _make_folder(folder: Path) -> None:
    from bnexp.errors import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output: {folder} is not a folder") from None
