"""A run made visible: figures, and one self-contained page about one or several runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnexp.records import Run


def write_results_png(run: Run) -> None:
    """Write the dashboard results.png into the run's folder, atomically."""
    from bnexp.report.figures import results_png
    from bnexp.report.run_data import RunData

    run.write("results.png", results_png(RunData.read(run)))
