"""volumes.csv: a row for each case and organ.

The file is replaced whole, and one process at a time changes it, so several may share a folder.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from core.inference.measures import Measures
from core.system.files import locked, open_text, write_table

VOLUMES, VOLUMES_LOCK = "volumes.csv", ".volumes.lock"
FIRST_COLUMNS = ["case", "id", "organ", "ml"]  # all that there were in earlier versions
HU_COLUMNS = ["hu_mean", "hu_sd", "hu_median"]
VOLUME_COLUMNS = [*FIRST_COLUMNS, *HU_COLUMNS, "pieces", "touches_edge"]


def read_volumes(output: Path) -> list[dict]:
    """Return the rows of volumes.csv; none when there is no such file.

    In a table of an earlier version, what was not measured then is empty.

    Raises:
        OSError, ValueError: when it cannot be read, or is another kind of table.
    """
    path = output / VOLUMES
    if not path.exists():
        return []
    with open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if reader.fieldnames not in (VOLUME_COLUMNS, FIRST_COLUMNS):
                came = reader.fieldnames
                raise ValueError(f"{path}: has the columns {came}, expected {VOLUME_COLUMNS}; move it away")
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{path}: cannot be read as a table ({error}); move it away") from error
    for row in rows:
        if None in row or None in row.values() or not (row["id"].isascii() and row["id"].isdecimal()):
            came = ",".join(map(str, row.values()))
            raise ValueError(f"{path}: has the row {came}, expected {','.join(reader.fieldnames)}; move it away")
    return rows


def write_volumes(output: Path, case: str, measured: Sequence[Measures], organs: Sequence[str]) -> None:
    """Replace a case's rows in volumes.csv by what was measured of each organ of its; the rows of other cases stay.

    Args:
        output: the folder.
        case: the case's id.
        measured: by id, without the background; empty: the case's rows are removed.
        organs: names by id, background first.

    Raises:
        OSError, ValueError: when it cannot be read or written, or is another kind of table.
    """
    with locked(output / VOLUMES_LOCK):
        rows = [row for row in read_volumes(output) if row["case"] != case]
        for i, (organ, found) in enumerate(zip(organs[1:], measured, strict=False), start=1):
            rows.append({"case": case, "id": i, "organ": organ} | cells_of(found))
        rows.sort(key=lambda row: (row["case"], int(row["id"])))
        write_table(output / VOLUMES, VOLUME_COLUMNS, rows)


def cells_of(found: Measures) -> dict[str, str]:
    """Return the cells of one organ by column; an organ that was not found has no HU."""
    hu = {column: "" if math.isnan(value := getattr(found, column)) else f"{value:.1f}" for column in HU_COLUMNS}
    return {"ml": f"{found.ml:.3f}", **hu, "pieces": str(found.pieces), "touches_edge": " ".join(found.touches_edge)}
