"""bnexp report"""

from __future__ import annotations

from pathlib import Path

from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.records import find_run, newest_finished_run
from bnexp.records.audit import find_audit
from bnexp.records.study import find_study
from bnexp.report.audit_page import render_record
from bnexp.report.figures import save_plots
from bnexp.report.page import write_report
from bnexp.report.run_data import RunData
from bnexp.report.study_page import render_study
from bnexp.study.run import refresh

FORMATS = ("html", "png", "svg")


def run_report(runs: list[str], output: Path | None, file_format: str, runs_dir: Path) -> None:
    if file_format not in FORMATS:
        raise UserError(f"--format {file_format}: allowed are {', '.join(FORMATS)}")
    if len(runs) == 1 and (study := find_study(runs[0], runs_dir)) is not None:
        if file_format != "html":
            raise UserError("a study is reported as a page: leave --format out")
        refresh(study)
        path = output or study.path / "report.html"
        write_atomically(path, render_study(study), follow_links=output is not None)
        print(path)
        return
    if len(runs) == 1 and (record := find_audit(runs[0], runs_dir)) is not None:
        if file_format != "html":
            raise UserError("an audit is reported as a page: leave --format out")
        path = output or record.path / "report.html"
        write_atomically(path, render_record(record), follow_links=output is not None)
        print(path)
        return
    found = [find_run(name, runs_dir) for name in runs] if runs else [newest_finished_run(runs_dir)]
    if file_format == "html":
        folder = found[0].path if len(found) == 1 else found[0].path.parent
        path = output or folder / "report.html"
        if path.is_dir():
            raise UserError(f"--output {path} is a folder; name the file, as in {path}/report.html")
        if path.exists() and not path.is_file():
            raise UserError(f"--output {path} is no ordinary file")
        _make_folder(path.parent)
        try:
            # A record's own link is replaced; one that the user named is followed.
            write_report(found, path, follow_links=output is not None)
        except FileNotFoundError as error:
            raise UserError(f"--output {path} can't be written: {error.strerror}") from None
        print(path)
        return

    for run in found:
        folder = output or run.path / "figures"
        if output and len(found) > 1:
            folder = output / run.name
        elif not output and folder.is_symlink():
            raise UserError(f"{folder} is a link to elsewhere: say where to write with --output")
        _make_folder(folder)
        for path in save_plots(RunData.read(run), folder, file_format):
            print(path)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output: {folder} is not a folder") from None
