"""volumes.csv: a row for each case and organ.

The file is replaced whole, and one process at a time changes it, so several may share a folder.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from core.system.files import locked, open_text, whole_file

VOLUMES, VOLUMES_LOCK = "volumes.csv", ".volumes.lock"
VOLUME_COLUMNS = ["case", "id", "organ", "ml"]


def read_volumes(output: Path) -> list[dict]:
    """Return the rows of volumes.csv; none when there is no such file.

    Raises:
        OSError, ValueError: when it cannot be read, or is another kind of table.
    """
    path = output / VOLUMES
    if not path.exists():
        return []
    with open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if reader.fieldnames != VOLUME_COLUMNS:
                came = reader.fieldnames
                raise ValueError(f"{path}: has the columns {came}, expected {VOLUME_COLUMNS}; move it away")
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{path}: cannot be read as a table ({error}); move it away") from error
    for row in rows:
        if None in row or None in row.values() or not (row["id"].isascii() and row["id"].isdecimal()):
            came = ",".join(map(str, row.values()))
            raise ValueError(f"{path}: has the row {came}, expected {','.join(VOLUME_COLUMNS)}; move it away")
    return rows


def write_volumes(output: Path, case: str, volumes_ml: Sequence[float], organs: Sequence[str]) -> None:
    """Replace a case's rows in volumes.csv by its volumes, (K,) in mL by id; without volumes they are removed.

    The rows of other cases stay.

    Raises:
        OSError, ValueError: when it cannot be read or written, or is another kind of table.
    """
    with locked(output / VOLUMES_LOCK):
        rows = [row for row in read_volumes(output) if row["case"] != case]
        for i, organ in enumerate(organs[1:], start=1):
            rows.append({"case": case, "id": i, "organ": organ, "ml": f"{volumes_ml[i]:.3f}"})
        with whole_file(output / VOLUMES) as temporary, open_text(temporary, "w") as file:
            writer = csv.DictWriter(file, VOLUME_COLUMNS)
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: (row["case"], int(row["id"]))))
