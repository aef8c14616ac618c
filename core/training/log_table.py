"""log.csv: a row for each epoch of a run."""

import csv
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.system.files import open_text, whole_file


class LogTable:
    """The rows of log.csv, which is read when the first row is added."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, str]] | None = None

    def append(self, row: dict[str, Any]) -> None:
        """Add an epoch's row in place of rows of the same or a later epoch, which a stopped run left.

        None and NaN become empty cells.

        Raises:
            OSError: when the file cannot be read or written.
        """
        if self.rows is None:
            self.rows = []
            with suppress(FileNotFoundError), open_text(self.path) as file:
                self.rows = list(csv.DictReader(file))
        self.rows = [old for old in self.rows if int(old["epoch"]) < row["epoch"]]
        self.rows.append({key: format_cell(value) for key, value in row.items()})
        with whole_file(self.path) as temporary, open_text(temporary, "w") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(self.rows)


def format_cell(value: float | int | None) -> str:
    """Return a value as a cell's text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
