"""Read the tables that pictures are drawn from."""

import csv
from collections.abc import Sequence
from pathlib import Path

from core.system.files import open_text


def read_table(path: Path, needed: Sequence[str], written_by: str) -> list[dict[str, str]]:
    """Return the rows of a table, by the names of its columns.

    Args:
        path: the table, with a heading.
        needed: columns that it must have.
        written_by: the script that writes such tables, for errors.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it lacks a column, or has no row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the table that {written_by} writes")
    try:
        with open_text(path) as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise ValueError(f"{path}: lacks the columns {', '.join(lacking)}")
    if not rows:
        raise ValueError(f"{path}: has no row")
    return rows
