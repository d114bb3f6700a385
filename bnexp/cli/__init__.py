"""The command line: the commands, and how each of them ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# First, as it looks at the machine, and would wait were it asked at once what it has seen.
import bnexp.performance  # noqa: F401  # isort: skip

import typer

from bnexp.cli import commands
from bnexp.cli.processes import is_silent
from bnexp.cli.streams import PLAIN, flush_or_give_up
from bnexp.errors import (
    ExpectationNotMet,
    Interrupted,
    RunFailed,
    UserError,
    disk_failure,
    is_out_of_memory,
)
from bnexp.importing import IMPORTED
from bnexp.ranks import refuse_launcher
from bnexp.training.signals import SIGNALS

MESSAGE = 2000
_UsageError: Any = typer.BadParameter.__mro__[1]  # typer's, or click's in older ones
_PACKAGE = Path(__file__).parent.parent
_show_warning = warnings.showwarning

app = typer.Typer(
    help="Train CNNs with batch normalization and measure what its moving averages are worth.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(commands.train)
app.command("eval")(commands.evaluate)
app.command()(commands.audit)
app.command()(commands.study)
app.command()(commands.report)
app.command()(commands.runs)
app.command()(commands.compare)
app.command()(commands.config)
app.command()(commands.export)
app.command()(commands.init)
app.command()(commands.models)
app.command()(commands.data)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from bnexp import __version__

        typer.echo(f"bnexp {__version__}")
        raise typer.Exit


def command() -> None:
    """The script `bnexp`: `main`, then the end of the process at once.

    What is to be done at the end is done; but Python would also take apart all that torch has
    imported, piece by piece, for a fifth of a second. It does so where code of the user's was
    imported, which may have left files open, and where a profiler or other threads are at work.
    """
    try:
        main()
    except SystemExit as end:
        watched = sys.getprofile() is not None or sys.gettrace() is not None
        if threading.active_count() > 1 or watched or IMPORTED or not isinstance(end.code, int):
            raise
        atexit._run_exitfuncs()
        flush_or_give_up()
        os._exit(end.code)


def main() -> None:
    """Run the command line; errors that have an answer end in one line and their exit code."""
    interrupted = False

    def interrupt(*_) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    _at_a_signal(interrupt)
    _prepare_streams()
    warnings.showwarning = _warn
    try:
        try:
            if sys.argv[1:2] != ["train"]:
                refuse_launcher(" ".join(["bnexp", *sys.argv[1:2]]))
            sys.exit(app(sys.argv[1:] or ["--help"], prog_name="bnexp", standalone_mode=False) or 0)
        except SystemExit as end:
            sys.stdout.flush()
            code = 1 if isinstance(end.code, str) else end.code or 0
            _at_a_signal(lambda *_: os._exit(code))
            raise
    except (UserError, RunFailed, ExpectationNotMet, Interrupted) as error:
        _fail(str(error), error.exit_code)
    except _UsageError as error:
        place = error.ctx.command_path if error.ctx else "bnexp"
        _fail(f"{error.format_message().rstrip('.')}; see {place} --help", UserError.exit_code)
    except BaseException as error:
        # A KeyboardInterrupt may arrive as something else: typer makes an exit of it, and an
        # extension module that is being imported an error of its own.
        if interrupted:
            _fail("interrupted", 130)
        _fail_if_explained(error)
        raise
    finally:
        flush_or_give_up()


def _at_a_signal(handler: Callable[..., object]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)


def _prepare_streams() -> None:
    """Output that can't be shown is no reason to fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=PLAIN)


def _fail_if_explained(error: BaseException) -> None:
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        sys.exit(1)
    if failure := disk_failure(error):
        _fail(str(failure), failure.exit_code)
    if is_out_of_memory(error):
        _fail("out of memory; take a smaller model, data.limit or test.batch_size", 1)
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        _fail(f"{error}; without workers (data.workers=0, or the loader's own num_workers) no "
              "shared memory is needed, and what ends them shows", 1)  # fmt: skip


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning of ours is a line like an error's; those of others name their file and line."""
    if Path(filename).is_relative_to(_PACKAGE):
        _say(str(message))
    else:
        _show_warning(message, category, filename, lineno, file, line)


def _fail(message: str, exit_code: int) -> NoReturn:
    """Of several processes rank 0 says it: what happens to one of them happens to all. Whoever is
    impatient meanwhile changes nothing about it."""
    _at_a_signal(lambda *_: None)
    if not is_silent():
        _say(message)
    flush_or_give_up()
    _at_a_signal(lambda *_: os._exit(exit_code))
    sys.exit(exit_code)


def _say(message: str) -> None:
    """One line of bounded length, whatever the names in it hold."""
    if len(message) > MESSAGE:
        message = f"{message[: MESSAGE // 2]} ... {message[-MESSAGE // 2 :]}"
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    with contextlib.suppress(OSError, ValueError):  # the exit code says it, too
        print(f"bnexp: {line}", file=sys.stderr)
