"""Weights of a data set's cases whose labels were made by a network: weights.csv.

    case,weight
    scan0001,0.914

A case that is listed there is never held out, is drawn the more often in an epoch the higher its weight is, and its
loss counts so much. Cases that are not listed were labelled by hand.
"""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path

from core.scans.files import listed
from core.system.exits import print_warning
from core.system.files import open_text, whole_file

WEIGHTS = "weights.csv"
COLUMNS = ["case", "weight"]


def read_weights(data_dir: str | Path, ids: Collection[str] | None = None) -> dict[str, float]:
    """Return the weights by case id; empty where a data set has no weights.csv.

    Cases that it lists and that are not among `ids` are warned of.

    Raises:
        ValueError: when the file has other columns, names a case twice, or a weight is not above 0 and at most 1.
    """
    path = Path(data_dir) / WEIGHTS
    if not path.is_file():
        return {}
    try:
        with open_text(path) as file:
            header, *rows = csv.reader(file)
        if header != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
        found = {case: float(weight) for case, weight in rows}
    except (ValueError, csv.Error) as error:  # ValueError: also for a file without a line
        raise ValueError(f"{path}: is no list of weights ({error}); write it again, or remove it") from error
    if len(found) < len(rows):
        raise ValueError(f"{path}: names a case twice")
    for case, weight in found.items():
        if not 0 < weight <= 1:
            raise ValueError(f"{path}: the weight of {case} is {weight:g}, expected a number above 0 and at most 1")
    unknown = [] if ids is None else [case for case in found if case not in ids]
    if unknown:
        print_warning(f"{path}: lists {listed(unknown)}, expected ids of the {len(ids)} cases; such lines do nothing")
    return found


def write_weights(data_dir: str | Path, weights: Mapping[str, float]) -> None:
    """Write the weights by case id, whole."""
    with whole_file(Path(data_dir) / WEIGHTS) as temporary, open_text(temporary, "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows([case, f"{weight:.4g}"] for case, weight in weights.items())
