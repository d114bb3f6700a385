"""results.png, drawn by a process of its own, which imports what it needs while this one trains."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

from bnexp.forking import importing


class Drawer:
    """Begins, where the system can fork, to import what draws."""

    def __init__(self) -> None:
        self._context: ForkServerContext | None = None
        if "forkserver" in multiprocessing.get_all_start_methods():
            with contextlib.suppress(OSError):  # no further process, or memory, to be had
                drawing = ["bnexp.report.figures", "bnexp.report.run_data"]
                self._context = importing([__name__, *drawing])

    @contextlib.contextmanager
    def drawing(self, run: Path) -> Iterator[None]:
        """A block beside which the picture of a run is drawn; it is there at the end. Whatever
        keeps it from being drawn, the training is done."""
        process = None
        if self._context is not None:
            with contextlib.suppress(OSError, EOFError):
                process = self._context.Process(target=_draw_alone, args=(run,), daemon=True)
                process.start()
        yield
        if process is None or process.pid is None:
            _draw(run)
            return
        process.join()
        if process.exitcode:
            _say(f"the process that draws ended with code {process.exitcode}")


def _draw_alone(path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the command, which ends this process
    gc.disable()  # the process is about to end
    _draw(path)


def _draw(path: Path) -> None:
    try:
        from bnexp.records import Run
        from bnexp.report import write_results_png

        write_results_png(Run(path))
    except Exception as error:
        _say(" ".join(f"{type(error).__name__}: {error}".split()))


def _say(reason: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"bnexp: results.png could not be drawn ({reason:.300})", file=sys.stderr)
