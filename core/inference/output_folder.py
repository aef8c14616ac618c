"""What infer.py leaves in its output folder: label maps, probabilities, and volumes.csv with a row per case and organ.

Every file is replaced whole, and volumes.csv is changed by one process at a time, so that several may share a folder.
The label map is the sign that all of a case is done: it comes last, and goes when the case fails.
"""

import csv
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.system.exits import print_error, print_warning
from core.system.files import locked, whole_file

VOLUMES, VOLUMES_LOCK = "volumes.csv", ".volumes.lock"
VOLUME_COLUMNS = ["case", "id", "organ", "ml"]
BLOCK_BYTES = 4096  # of a disk; one that has none left is full
AS_IS = {"newline": "", "errors": "surrogateescape"}  # file names need not be UTF-8, so nor need the cases' ids

# The folder of reports, and what the report of a case consists of beside the viewer.
REPORTS, REPORT_PAGE, REPORT_NUMBERS = "reports", "index.html", "report.json"


def label_map_path(output: Path, case: str) -> Path:
    """Where the label map of a case is."""
    return output / f"{case}.nii.gz"


def probabilities_path(output: Path, case: str) -> Path:
    """Where the probabilities of a case are."""
    return output / f"{case}_probabilities.nii.gz"


def report_files(output: Path, case: str) -> tuple[Path, Path]:
    """Where the report of a case is: its page, and what is in it in numbers."""
    folder = output / REPORTS / case
    return folder / REPORT_PAGE, folder / REPORT_NUMBERS


def is_finished(output: Path, case: str, probabilities: bool) -> bool:
    """Whether a case's label map is there, and its probabilities if they are wanted."""
    return label_map_path(output, case).is_file() and (not probabilities or probabilities_path(output, case).is_file())


# ---- The folder ------------------------------------------------------------------------------------------------------


def check_inputs_are_elsewhere(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse a folder in which results could take the place of inputs or of their reference label maps.

    Args:
        output: the folder for the results; need not exist.
        inputs: scans and folders of DICOM series; those that cannot be read too.

    Raises:
        ValueError: when the folder holds one of the inputs, their label maps, or lies in a series' folder.
    """
    for path in inputs:
        if path.is_dir() and Path(os.path.realpath(path)) in (output.resolve(), *output.resolve().parents):
            raise ValueError(f"--output: {output} lies in the input folder {path}; choose another folder")
        stands, leads = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path)).parent  # of a link
        for folder in (stands, leads):
            if output.resolve() == folder and not path.is_dir():
                raise ValueError(f"--output: {output} holds the scan {path}; choose another folder")
            if folder.name == "images" and output.resolve() == folder.parent / "labels":
                raise ValueError(f"--output: {output} holds the data's own label maps; choose another folder")


def prepare_folder(output: Path, cases: dict[str, Path]) -> None:
    """Make the folder for the results of cases, given with their scans; what can be found wrong before the work, is.

    Raises:
        OSError, ValueError: when nothing can be written there, or not where the cases' results belong.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=output) as file:
            file.write(bytes(BLOCK_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
    for case, scan in cases.items():
        for path in (label_map_path(output, case), probabilities_path(output, case)):
            if path.is_dir():
                raise ValueError(f"{path}: is a folder where case {case} is to be written; move it away")
            if path.exists() and path.samefile(scan):
                raise ValueError(f"--output: {path} is the scan {scan} itself (a link); choose another folder")
    with locked(output / VOLUMES_LOCK):
        read_volumes(output)


def rename_old(path: Path, why: str) -> None:
    """Give an earlier file, if there is one, the ending .old, in place of an older one, and say so on stderr."""
    if path.is_file():
        old = path.with_name(f"{path.name}.old")
        os.replace(path, old)
        print_warning(f"{why}, so the earlier {path.name} is now {old}")


def set_aside(output: Path, case: str) -> None:
    """Take what there is of a case that failed out of the way, so that nothing earlier can pass for new.

    Its files get the ending .old, in place of older ones, which stderr says; its rows leave volumes.csv. What cannot
    be done is named on stderr too.
    """
    for path in (label_map_path(output, case), probabilities_path(output, case), *report_files(output, case)):
        try:
            rename_old(path, f"case {case}: failed")
        except OSError as error:
            print_error(error)
    try:
        if any(row["case"] == case for row in read_volumes(output)):
            write_volumes(output, case, (), ())
    except (OSError, ValueError) as error:
        print_error(error)


# ---- volumes.csv -----------------------------------------------------------------------------------------------------


def read_volumes(output: Path) -> list[dict]:
    """The rows of volumes.csv; none when there is no such file.

    Raises:
        OSError, ValueError: when it cannot be read, or is another kind of table.
    """
    path = output / VOLUMES
    if not path.exists():
        return []
    with open(path, encoding="utf-8-sig", **AS_IS) as file:  # spreadsheet programs put a BOM before the text
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
    """Put the volumes of a case, (K,) in mL by id, into volumes.csv in place of its earlier rows; none removes those.

    The rows of other cases stay.

    Raises:
        OSError, ValueError: when it cannot be read or written, or is another kind of table.
    """
    with locked(output / VOLUMES_LOCK):
        rows = [row for row in read_volumes(output) if row["case"] != case]
        for i, organ in enumerate(organs[1:], start=1):
            rows.append({"case": case, "id": i, "organ": organ, "ml": f"{volumes_ml[i]:.3f}"})
        with whole_file(output / VOLUMES) as temporary, open(temporary, "w", encoding="utf-8", **AS_IS) as file:
            writer = csv.DictWriter(file, VOLUME_COLUMNS)
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: (row["case"], int(row["id"]))))
