"""Weights of a data set's cases whose labels were made by a network: weights.csv.

    case,weight
    scan0001,0.914

A case that is listed there is never held out, is drawn the more often in an epoch the higher its weight is, and its
loss counts so much. Cases that are not listed were labelled by hand; beside pseudo_labels.csv, they are refused.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from core.scans.case_table import read_case_table, write_case_table
from core.scans.files import listed

WEIGHTS, PSEUDO_LABELS = "weights.csv", "pseudo_labels.csv"  # data.pseudo_label writes both
COLUMNS = ["case", "weight"]


def read_weights(data_dir: str | Path, ids: Collection[str] | None = None) -> dict[str, float]:
    """Return the weights by case id; empty where a data set has no weights.csv.

    Cases that it lists and that are not among `ids` are warned of.

    Raises:
        ValueError: when the file has other columns, names a case twice, a weight is not above 0 and at most 1, or one
            of `ids` has none beside pseudo_labels.csv.
    """
    path = Path(data_dir) / WEIGHTS
    weights = {}
    for case, typed in (read_case_table(path, COLUMNS, "weights", ids) or {}).items():
        try:
            weights[case] = float(typed)
        except ValueError:
            weights[case] = math.nan
        if not 0 < weights[case] <= 1:
            raise ValueError(f"{path}: the weight of {case} is {typed}, expected a number above 0 and at most 1")
    without = [case for case in ids or () if case not in weights]
    if without and path.with_name(PSEUDO_LABELS).is_file():
        raise ValueError(
            f"{path}: has no line for {listed(without)}, whose labels would pass for people's beside {PSEUDO_LABELS}; "
            "write the weight, or move scan and label map elsewhere: to another data set if people have corrected them"
        )
    return weights


def write_weights(data_dir: str | Path, weights: Mapping[str, float]) -> None:
    """Write the weights by case id, whole."""
    typed = {case: f"{weight:.10g}" for case, weight in weights.items()}
    write_case_table(Path(data_dir) / WEIGHTS, COLUMNS, typed)
