"""Organs that a data set's source annotates, case by case: annotated.csv.

    case,organs
    img0001,liver;spleen

Where an organ is annotated, background means that it is not there. Where it is not annotated, background says nothing
about it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from core.scans.case_table import read_case_table, write_case_table
from core.scans.files import listed
from core.scans.organ_words import mirrored_ids, same_name
from core.system.exits import print_warning

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
    found = read_case_table(Path(data_dir) / ANNOTATED, COLUMNS, "annotated organs", ids) or {}
    return {case: tuple(name for name in organs.split(SEPARATOR) if name) for case, organs in found.items()}


def write_annotated(data_dir: str | Path, organs: Mapping[str, Sequence[str]]) -> None:
    """Write the names of the annotated organs by case id, whole."""
    joined = {case: SEPARATOR.join(names) for case, names in organs.items()}
    write_case_table(Path(data_dir) / ANNOTATED, COLUMNS, joined)


def annotated_classes(names: Sequence[str] | None, organs: Sequence[str]) -> np.ndarray:
    """Return (K,) bool: the classes among the `names` of annotated organs, and the background; None: all."""
    return np.array([True, *(names is None or any(same_name(organ, name) for name in names) for organ in organs[1:])])


def warn_of_unknown_names(annotated: Iterable[Sequence[str] | None], organs: Sequence[str]) -> None:
    """Warn of names of annotated organs that none of the organ list has, each once."""
    names = dict.fromkeys(name for of_case in annotated for name in of_case or ())
    unknown = [name for name in names if not any(same_name(organ, name) for organ in organs[1:])]
    if unknown:
        print_warning(f"{ANNOTATED}: {listed(unknown)} is none of organs; names are separated by {SEPARATOR}")


def check_both_sides(ids: Sequence[str], annotated: Sequence[np.ndarray], organs: Sequence[str]) -> None:
    """Raise a ValueError for a case in which a flip would give an organ the id of one that is not annotated."""
    other_side = mirrored_ids(organs)
    for case, classes in zip(ids, annotated, strict=True):
        for organ in np.flatnonzero(classes != classes[other_side]):
            raise ValueError(
                f"augment_flip: {ANNOTATED} lists only one of {organs[organ]} and {organs[other_side[organ]]} for case "
                f"{case}; expected both or none of them, or augment_flip: false"
            )


def with_known(taught: Sequence[str], known: Sequence[str], organs: Sequence[str]) -> list[str]:
    """Return the organs of the list that are `taught` or `known`, in its order; spellings may differ."""
    classes = annotated_classes([*taught, *known], organs)
    return [organ for organ, is_one in zip(organs, classes, strict=True) if is_one][1:]
