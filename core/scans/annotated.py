"""Organs that a data set's source annotates, case by case: annotated.csv.

    case,organs
    img0001,liver;spleen

Where an organ is annotated, background means that it is not there. Where it is not annotated, background says nothing
about it.
"""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from core.scans.files import listed
from core.scans.organ_words import mirrored_ids, same_name
from core.system.exits import print_warning
from core.system.files import open_text, whole_file

ANNOTATED = "annotated.csv"
COLUMNS = ["case", "organs"]
SEPARATOR = ";"


def read_annotated(data_dir: str | Path, ids: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Return the names of the annotated organs by case id; empty where a data set has no annotated.csv.

    Cases that the file does not list are annotated with every organ of the list. Cases that it lists and that are not
    among `ids` are warned of: their names may be misspelled.

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
    unknown = [] if ids is None else [case for case in found if case not in ids]
    if unknown:
        print_warning(f"{path}: lists {listed(unknown)}, expected ids of the {len(ids)} cases; such lines do nothing")
    return found


def write_annotated(data_dir: str | Path, organs: Mapping[str, Sequence[str]]) -> None:
    """Write the names of the annotated organs by case id, whole."""
    path = Path(data_dir) / ANNOTATED
    with whole_file(path) as temporary, open_text(temporary, "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows([case, SEPARATOR.join(names)] for case, names in organs.items())


def annotated_classes(names: Sequence[str] | None, organs: Sequence[str]) -> np.ndarray:
    """Return (K,) bool: the classes among the `names` of annotated organs, and the background; None: all."""
    return np.array([True, *(names is None or any(same_name(organ, name) for name in names) for organ in organs[1:])])


def check_both_sides(ids: Sequence[str], annotated: Sequence[np.ndarray], organs: Sequence[str]) -> None:
    """Raise a ValueError for a case in which a flip would give an organ the id of one that is not annotated."""
    other_side = mirrored_ids(organs)
    for case, classes in zip(ids, annotated, strict=True):
        for organ in np.flatnonzero(classes != classes[other_side]):
            raise ValueError(
                f"augment_flip: {ANNOTATED} lists only one of {organs[organ]} and {organs[other_side[organ]]} for case "
                f"{case}; expected both or none of them, or augment_flip: false"
            )
