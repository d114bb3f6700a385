"""Append-only CSV files."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

from bnexp.atomic import write_atomically
from bnexp.records.files import read_bytes


class CsvLog:
    """An append-only CSV file whose lines are always whole for a reader.

    Opening it on an existing file keeps the rows up to `last_step` and drops what a killed run
    wrote after its checkpoint, a torn last line included.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], last_step: int = 0) -> None:
        header = ",".join(columns) + "\n"
        kept = [header]
        text = (read_bytes(path) or b"").decode(errors="replace")
        for line in text.split("\n")[1:-1]:
            step = line.partition(",")[0]
            whole = line.count(",") == len(columns) - 1
            if whole and re.fullmatch("[0-9]{1,15}", step) and int(step) <= last_step:
                kept.append(line + "\n")
        write_atomically(path, "".join(kept), follow_links=False)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def append(self, rows: Iterable[Iterable[object]]) -> None:
        """Write rows with one system call. Floats are written so that float32 survives."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(
            [format(v, ".9g") if isinstance(v, float) else v for v in row] for row in rows
        )
        data = text.getvalue().encode()
        while data:
            data = data[self._file.write(data) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Nowhere:
    """Where a process writes its rows that is not to write the record."""

    def append(self, rows: Iterable[Iterable[object]]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


RowLog = CsvLog | Nowhere
