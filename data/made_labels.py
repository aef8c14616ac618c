"""A data set of made labels: what `data.pseudo_label` writes, one scan at a time, and finds again after a break.

pseudo_labels.csv   a row for each scan (organ is empty) and each of its organs, with every criterion and the reason
annotated.csv       the organs of each case that can be trusted
weights.csv         the weight of each case

One process at a time changes the tables, and replaces them whole. A scan is done when its row is there and, unless it
was left out, its files are.
"""

import csv
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from core.inference.inputs import read_scan
from core.scans.annotated import ANNOTATED, read_annotated, write_annotated
from core.scans.files import listed
from core.scans.geometry import Geometry
from core.scans.nifti import Reading
from core.scans.volumes import NIFTI_SUFFIXES, save_label_map, save_scan
from core.scans.weights import PSEUDO_LABELS, WEIGHTS, read_weights, write_weights
from core.system.files import locked, open_text, write_table
from data.converted import copy_linked, place, remove, suffix_of
from data.judging import NOT_TAUGHT, Judgement, Limits

TABLE, LOCK = PSEUDO_LABELS, ".pseudo_labels.lock"
COLUMNS = [
    "case", "organ", "taken", "reason", "agreement", "ml", "largest_piece", "touches_edge", "weight", "made_by",
    "scan",
]  # fmt: skip


class MadeLabels:
    """The folder of a data set of made labels.

    Args:
        path: the folder.
        organs: names by id, background first.
        fingerprint: of the networks.
        limits: requirements on a label map.
        copy: whether to copy the scans instead of linking them.
    """

    def __init__(self, path: Path, organs: Sequence[str], fingerprint: str, limits: Limits, copy: bool):
        self.path, self.organs, self.copy = path, organs, copy
        # All that decides what a row says.
        self.made_by = f"{fingerprint} {limits.agreement:g} {limits.trusted:g}"

    def begin(self, cases: Mapping[str, Path]) -> dict[str, Path]:
        """Make the folder; return the scans that are left.

        Raises:
            OSError, ValueError: when it cannot be written, holds other things, or labels of other networks or limits.
        """
        for case, scan in cases.items():
            if scan.resolve().is_relative_to(self.path.resolve()):
                raise ValueError(f"--output: {self.path} holds the scan {scan} of case {case}; choose another folder")
        # A scan's rows come before its files; several processes, or one that was stopped, may have made the folders.
        foreign = chain(*map(self.path.glob, ("labels/*", "images/*", ANNOTATED, WEIGHTS)))
        if not (self.path / TABLE).is_file() and any(foreign):
            raise ValueError(f"--output: {self.path} holds a data set that this command has not made; choose another")
        for name in ("images", "labels"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        rows = self.read()
        for read in (read_annotated, read_weights):  # a wrong edit shows now, and not after each scan
            read(self.path)
        self.check_same_scans(cases, rows)
        others = {row["case"] for row in rows if row["made_by"] != self.made_by}
        if others:
            raise ValueError(
                f"--output: {self.path / TABLE} has {len(others)} cases of other networks or limits "
                f"({listed(sorted(others))}); choose another folder, or remove it"
            )
        taken = {row["case"]: row["taken"] == "yes" for row in rows if not row["organ"]}
        done = {case for case in cases if case in taken and (not taken[case] or self.has_files(case))}
        for case in done if self.copy else ():
            copy_linked(cases[case], self.path / "images", case)
        return {case: scan for case, scan in cases.items() if case not in done}

    def check_same_scans(self, cases: Mapping[str, Path], rows: Sequence[Mapping[str, str]]) -> None:
        """Raise a ValueError for a case that was made of another scan; a scan that is gone may have been moved."""
        for row in rows:
            scan, before = cases.get(row["case"]), row.get("scan")
            if scan and before and Path(before).exists() and scan.resolve() != Path(before):
                raise ValueError(
                    f"--output: {self.path / TABLE} has case {row['case']} of {before}, and {scan} would be it, too; "
                    "rename one, or choose another folder"
                )

    def has_files(self, case: str) -> bool:
        """Return True when the label map and the scan of a case are there."""
        return self.label_map(case).is_file() and any(self.scan(case, suffix).exists() for suffix in NIFTI_SUFFIXES)

    def label_map(self, case: str) -> Path:
        """Return the path of a case's label map."""
        return self.path / "labels" / f"{case}.nii.gz"

    def scan(self, case: str, suffix: str) -> Path:
        """Return the path of a case's scan."""
        return self.path / "images" / f"{case}_0000{suffix}"

    def add(self, case: str, scan: Path, labels: np.ndarray, geometry: Geometry, judgement: Judgement) -> None:
        """Write what came of a scan: its rows and, unless it is left out, its label map and the scan.

        The scan is a link to its file, or made of its DICOM series, as training reads NIfTI.

        Args:
            case: its id.
            scan: its file, or the folder of its series.
            labels: (X, Y, Z) ids; those of organs that are not trusted become background, in place.
            geometry: of the scan.
            judgement: of the labels.

        Raises:
            OSError, ValueError: when a file cannot be written or read.
        """
        with locked(self.path / LOCK):
            rows = [row for row in self.read() if row["case"] != case] + self.rows_of(case, scan, judgement)
            self.write(rows, case)
        if judgement.reason:
            return
        trusted = np.array([False, *(not organ.reason for organ in judgement.organs.values())])
        labels *= trusted[labels]
        remove([self.scan(case, suffix) for suffix in NIFTI_SUFFIXES])
        if scan.is_dir():
            # Read once more: to keep the voxels of all scans on their way would take GiBs. Its warnings were printed.
            voxels, _ = read_scan(scan, Reading(warn=lambda _: None))
            save_scan(voxels, geometry, self.scan(case, NIFTI_SUFFIXES[0]))
        else:
            place(scan, self.scan(case, suffix_of(scan)), self.copy)
        save_label_map(labels, geometry, self.label_map(case), self.organs)

    def rows_of(self, case: str, scan: Path, judgement: Judgement) -> list[dict[str, str]]:
        """Return the rows of a case."""
        about = {"case": case, "made_by": self.made_by, "scan": str(scan.resolve())}
        taken = {"taken": "no" if judgement.reason else "yes", "reason": judgement.reason}
        rows = [dict.fromkeys(COLUMNS, "") | about | taken | {"weight": cell(judgement.weight)}]
        for name, organ in judgement.organs.items():
            rows.append(
                dict.fromkeys(COLUMNS, "")
                | about
                | {"organ": name, "taken": "no" if organ.reason or judgement.reason else "yes", "reason": organ.reason}
                | {"agreement": cell(organ.agreement), "ml": cell(organ.ml), "largest_piece": cell(organ.largest_piece)}
                | {"touches_edge": " ".join(organ.cut)}
            )
        return rows

    def read(self) -> list[dict[str, str]]:
        """Return the rows of pseudo_labels.csv; none when there is no such file.

        Raises:
            OSError, ValueError: when it cannot be read, or is another kind of table.
        """
        path = self.path / TABLE
        if not path.is_file():
            return []
        with open_text(path) as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if reader.fieldnames not in (COLUMNS, COLUMNS[:-1]) or any(None in row or None in row.values() for row in rows):
            raise ValueError(f"{path}: is another kind of table, expected the columns {', '.join(COLUMNS)}")
        return rows

    def write(self, rows: Sequence[Mapping[str, str]], case: str) -> None:
        """Write the three tables, ordered by case; of annotated.csv and weights.csv only the line of `case` changes.

        People may have edited the others. pseudo_labels.csv comes first: it says that this command made the folder.
        """
        rows = sorted(rows, key=lambda row: row["case"])  # a case's rows keep their order
        write_table(self.path / TABLE, COLUMNS, rows)
        annotated, weights = read_annotated(self.path), read_weights(self.path)
        for table in (annotated, weights):
            table.pop(case, None)
        taken = [row for row in rows if row["case"] == case and row["taken"] == "yes"]
        if taken:
            annotated[case] = [row["organ"] for row in taken if row["organ"]]
            weights[case] = float(taken[0]["weight"])
        write_annotated(self.path, dict(sorted(annotated.items())))
        write_weights(self.path, dict(sorted(weights.items())))

    def summary(self, cases: Collection[str]) -> list[str]:
        """Say in lines how many scans were taken, how often each organ is trusted, and why scans were left out."""
        rows = [row for row in self.read() if row["case"] in cases]
        scans = [row for row in rows if not row["organ"]]
        taken = [row for row in scans if row["taken"] == "yes"]
        organs = Counter(row["organ"] for row in rows if row["organ"] and row["taken"] == "yes")
        lines = [f"{len(taken)} of {len(cases)} scans taken into {self.path}; {TABLE} says why"]
        if taken:
            lines.append(f"organs in so many: {', '.join(f'{organ} {organs[organ]}' for organ in self.organs[1:])}")
            taught = (row["organ"] for row in rows if row["organ"] and row["reason"] != NOT_TAUGHT)
            never = [organ for organ in dict.fromkeys(taught) if not organs[organ]]
            if never:
                lines.append(f"trusted in none: {', '.join(never)}; training can lose what no scan has (RESULTS.md)")
        return lines


def cell(value: float) -> str:
    """Return a number as a cell; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.4g}"
