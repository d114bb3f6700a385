"""The command line. Commands import what is heavy when they run, so that `--help` is quick."""

from __future__ import annotations

import signal
import sys

import typer

from bnexp.cli.compare import compare
from bnexp.cli.config import config
from bnexp.cli.eval import evaluate
from bnexp.cli.report import report
from bnexp.cli.runs import runs
from bnexp.cli.train import train

app = typer.Typer(
    help="Train CNNs with batch normalization and measure what its moving averages are worth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(report)
app.command()(runs)
app.command()(compare)
app.command()(config)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from bnexp import __version__

        typer.echo(f"bnexp {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors that have an answer end in one line and their exit code."""
    from bnexp.errors import ExpectationNotMet, Interrupted, RunFailed, UserError, disk_failure

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        app(prog_name="bnexp")
    except (UserError, RunFailed, ExpectationNotMet, Interrupted) as error:
        _fail(str(error), error.exit_code)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of a KeyboardInterrupt, without a word
            _fail("interrupted", 130)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        failure = disk_failure(error)
        if failure is None:
            raise
        _fail(str(failure), failure.exit_code)
    except (MemoryError, RuntimeError) as error:
        from bnexp.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail("out of memory; take a smaller model, data.limit or test.batch_size", 1)


def _fail(message: str, exit_code: int) -> None:
    print(f"bnexp: {message}", file=sys.stderr)
    sys.exit(exit_code)
