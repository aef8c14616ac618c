"""Tables of two columns beside a data set, one line for each case: annotated.csv and weights.csv."""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from core.scans.files import listed
from core.system.exits import print_warning
from core.system.files import open_text, whole_file


def read_case_table(
    path: Path, columns: Sequence[str], what: str, ids: Collection[str] | None = None
) -> dict[str, str] | None:
    """Return the second column by case id; None when there is no such file.

    Blank lines, and blanks around a cell, do not count. Cases that the file lists and that are not among `ids` are
    warned of: their names may be misspelled.

    Args:
        path: the file.
        columns: the names of its two columns, the first for the case ids.
        what: what it is a list of, for errors.
        ids: those of the data set's cases; None: any.

    Raises:
        ValueError: when the file has other columns, or names a case twice.
    """
    if not path.is_file():
        return None
    try:
        with open_text(path) as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file) if any(map(str.strip, row))]
        if not lines:
            raise ValueError("it is empty")
        header, *rows = lines
        other = next((row for row in rows if len(row) != len(columns)), None)
        if header != list(columns) or other:
            shown = f"{','.join(other)!r}: " if other else ""
            raise ValueError(f"{shown}its columns are not {', '.join(columns)}")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: is no list of {what} ({error}); write it again, or remove it") from error
    found = dict(rows)
    if len(found) < len(rows):
        raise ValueError(f"{path}: names a case twice")
    unknown = [] if ids is None else [case for case in found if case not in ids]
    if unknown:
        print_warning(f"{path}: lists {listed(unknown)}, expected ids of the {len(ids)} cases; such lines do nothing")
    return found


def write_case_table(path: Path, columns: Sequence[str], values: Mapping[str, str]) -> None:
    """Write the second column by case id, whole."""
    with whole_file(path) as temporary, open_text(temporary, "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(values.items())
