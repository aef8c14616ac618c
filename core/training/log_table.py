"""log.csv: a row for each epoch of a run."""

import csv
import os
from pathlib import Path
from typing import Any

from core.scoring.results import format_cell
from core.system.exits import print_warning
from core.system.files import open_text, write_table

KNOWN_BY = {"epoch", "train_loss"}  # columns that every log of a run has; a researcher may add others


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
            self.rows = self.read()
        self.rows = [old for old in self.rows if int(old["epoch"]) < row["epoch"]]
        self.rows.append({key: format_cell(value) for key, value in row.items()})
        write_table(self.path, list(dict.fromkeys(key for each in self.rows for key in each)), self.rows)

    def read(self) -> list[dict[str, str]]:
        """Return the rows of the file; none, with a warning, when another program has made another table of it."""
        if not self.path.is_file():
            return []
        with open_text(self.path) as file:
            rows = list(csv.DictReader(file))
        if all(row.keys() >= KNOWN_BY and None not in row and (row.get("epoch") or "").isdecimal() for row in rows):
            return rows
        old = self.path.with_name(f"{self.path.name}.old")
        os.replace(self.path, old)
        print_warning(f"{self.path}: is no log of this run any more, so it is now {old.name}, and a new one starts")
        return []


def summary_line(row: dict, epochs: int) -> str:
    """Return one epoch in one line."""
    scores = "" if row["val_dice"] is None else f"  validation loss {row['val_loss']:.4f}  Dice {row['val_dice']:.4f}"
    return f"epoch {row['epoch']:>3}/{epochs}  loss {row['train_loss']:.4f}{scores}  {row['seconds']:.1f} s"
