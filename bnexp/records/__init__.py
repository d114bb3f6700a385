"""What a record is on disk: making it, reading it, appending to its logs."""

from bnexp.records.csv_log import CsvLog
from bnexp.records.experiment import (
    EVAL_COLUMNS,
    RUNS,
    STEP_COLUMNS,
    Run,
    all_runs,
    create_run,
    find_run,
    is_run,
    newest_finished_run,
)

__all__ = [
    "EVAL_COLUMNS",
    "RUNS",
    "STEP_COLUMNS",
    "CsvLog",
    "Run",
    "all_runs",
    "create_run",
    "find_run",
    "is_run",
    "newest_finished_run",
]
