"""Organs that a data set's source annotates, case by case: annotated.csv.

    case,organs
    img0001,liver;spleen

Where an organ is annotated, background means that it is not there. Where it is not annotated, background says nothing
about it.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.system.files import open_text, whole_file

ANNOTATED = "annotated.csv"
COLUMNS = ["case", "organs"]
SEPARATOR = ";"


def read_annotated(data_dir: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the names of the annotated organs by case id; empty where a data set has no annotated.csv.

    Cases that the file does not list are annotated with every organ of the list.

    Raises:
        ValueError: when the file has other columns, or names a case twice.
    """
    path = Path(data_dir) / ANNOTATED
    if not path.is_file():
        return {}
    try:
        with open_text(path) as file:
            header, *rows = csv.reader(file)
        if header != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
    except (ValueError, csv.Error) as error:  # ValueError: also for a file without a line
        raise ValueError(f"{path}: is no list of annotated organs ({error}); write it again, or remove it") from error
    found = {case: tuple(name for name in organs.split(SEPARATOR) if name) for case, organs in rows}
    if len(found) < len(rows):
        raise ValueError(f"{path}: names a case twice")
    return found


def write_annotated(data_dir: str | Path, organs: Mapping[str, Sequence[str]]) -> None:
    """Write the names of the annotated organs by case id, whole."""
    path = Path(data_dir) / ANNOTATED
    with whole_file(path) as temporary, open_text(temporary, "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows([case, SEPARATOR.join(names)] for case, names in organs.items())
