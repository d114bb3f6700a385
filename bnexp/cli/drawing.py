"""results.png, drawn by a process of its own, which imports what it needs while this one trains."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

from bnexp.forking import importing


class Drawer:
    """Begins, where the system can fork, to import what draws."""

    def __init__(self) -> None:
        self._context = None
        if "forkserver" in multiprocessing.get_all_start_methods():
            self._context = importing([__name__, "bnexp.report.figures", "bnexp.report.run_data"])

    @contextlib.contextmanager
    def drawing(self, run: Path) -> Iterator[None]:
        """A block beside which the picture of a run is drawn; it is there at the end. Whatever
        keeps it from being drawn, the training is done."""
        if self._context is None:
            yield
            _draw(run)
            return
        process = self._context.Process(target=_draw, args=(run,), daemon=True)
        process.start()
        yield
        process.join()
        if process.exitcode:
            _say(f"the process that draws ended with code {process.exitcode}")


def _draw(path: Path) -> None:
    gc.disable()  # the process is about to end
    try:
        from bnexp.records import Run
        from bnexp.report import write_results_png

        write_results_png(Run(path))
    except Exception as error:
        _say(" ".join(f"{type(error).__name__}: {error}".split()))


def _say(reason: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"bnexp: results.png could not be drawn ({reason:.300})", file=sys.stderr)
