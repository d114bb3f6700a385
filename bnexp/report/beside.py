"""results.png, drawn by a process of its own, which imports what it needs while this one trains."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bnexp.report import write_results_png

# Imports come from where they come from here.
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from bnexp.report.beside import main; main()"


class Drawer:
    """Starts the process, which is gone when the block is left, however that is."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Drawer:
        with contextlib.suppress(OSError):  # no further process, or memory, to be had
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                # Ctrl-C is for the command, which ends this process.
                process_group=0 if os.name == "posix" else None,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()

    @contextlib.contextmanager
    def drawing(self, run: Path) -> Iterator[None]:
        """A block beside which the picture of a run is drawn; it is there at the end. Whatever
        keeps it from being drawn, the training is done."""
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.write(os.fsencode(os.path.abspath(run)) + b"\n")
                process.stdin.close()
        yield
        if process is None or process.wait() != 0:
            _draw(run)


def _draw(run: Path) -> None:
    """Draw it here; where that fails, say why in a line."""
    from bnexp.records import Run

    try:
        write_results_png(Run(run))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        with contextlib.suppress(OSError, ValueError):
            print(f"bnexp: results.png could not be drawn ({reason:.300})", file=sys.stderr)


def main() -> None:
    """The process: draws the run that it is told of, if it is."""
    gc.disable()  # it lives long, and works for a moment
    with contextlib.suppress(Exception):  # if need be, drawing says it
        import bnexp.report.figures
        import bnexp.report.run_data  # noqa: F401
    if path := sys.stdin.buffer.readline():
        _draw(Path(os.fsdecode(path.removesuffix(b"\n"))))
