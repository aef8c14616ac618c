"""The files in infer.py's output folder: their names, and checks before the work starts that they can be written."""

import json
import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

from core.inference.colour_tables import ITK_SNAP, SLICER
from core.inference.volumes_table import VOLUMES_LOCK, read_volumes
from core.system.exits import one_line
from core.system.files import locked

BLOCK_BYTES = 4096  # of a disk; a full disk cannot store one more
# What is written beside a case's label map, if asked for: the flag, and the end of the file's name.
PROBABILITIES, SEGMENTATION, STRUCTURES = "--probabilities", "--dicom-seg", "--rtstruct"
EXTRAS = {PROBABILITIES: "_probabilities.nii.gz", SEGMENTATION: "_seg.dcm", STRUCTURES: "_rtstruct.dcm"}

# The folder of reports, and the files of one case's report; the folder's own page lists all cases.
REPORTS, REPORT_PAGE, REPORT_VIEWER, REPORT_NUMBERS = "reports", "index.html", "viewer.html", "report.json"

PAGE_POLICY, NUMBERS = b"Content-Security-Policy", {"case", "organs", "remarks"}  # what tells our pages and numbers


def label_map_path(output: Path, case: str) -> Path:
    """Return the path of a case's label map."""
    return output / f"{case}.nii.gz"


def extra_path(output: Path, case: str, flag: str) -> Path:
    """Return the path of what a flag of EXTRAS adds to a case's label map."""
    return output / f"{case}{EXTRAS[flag]}"


def case_files(output: Path, case: str) -> list[Path]:
    """Return the paths of a case's label map and of everything that may be written beside it."""
    return [label_map_path(output, case), *(extra_path(output, case, flag) for flag in EXTRAS)]


def report_files(output: Path, case: str) -> tuple[Path, ...]:
    """Return the paths of a case's report: its page, its viewer, and its numbers."""
    return tuple(output / REPORTS / case / name for name in (REPORT_PAGE, REPORT_VIEWER, REPORT_NUMBERS))


def is_report_file(path: Path) -> bool:
    """Return True when a file is a page of this program, or the numbers of a report."""
    try:
        content = path.read_bytes()
        return json.loads(content).keys() >= NUMBERS if path.name == REPORT_NUMBERS else PAGE_POLICY in content
    except (OSError, ValueError, AttributeError):
        return False


# ---- Checks before the work starts -----------------------------------------------------------------------------------


def check_dicom_extras(extras: Collection[str], cases: dict[str, Path]) -> None:
    """Check that DICOM results can be written, if asked for: highdicom is installed, and the scans are DICOM.

    Raises:
        ValueError: naming what to install, or a scan that is not DICOM.
    """
    if SEGMENTATION in extras:
        try:
            import highdicom  # noqa: F401
        except ImportError as error:
            raise ValueError(f"{SEGMENTATION}: needs highdicom ({one_line(error)}); pip install highdicom") from error
    for flag in {SEGMENTATION, STRUCTURES} & {*extras}:
        for scan in cases.values():
            if not scan.is_dir():
                raise ValueError(f"{flag}: {scan} is NIfTI, expected a DICOM series, to whose slices the result refers")


def check_inputs_are_elsewhere(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse a folder in which results could take the place of inputs or of their reference label maps.

    Args:
        output: the folder for the results; need not exist.
        inputs: scans and folders of DICOM series, also those that cannot be read.

    Raises:
        ValueError: when the folder holds one of the inputs or their label maps, or is inside a series' folder.
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


def make_folder(output: Path) -> None:
    """Make the folder, and check that a file can be written there.

    Raises:
        OSError: when nothing can be written there.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=output) as file:
            file.write(bytes(BLOCK_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error


def check_paths_are_free(output: Path, cases: dict[str, Path]) -> None:
    """Check that the results of cases, given with their scans, can be written, and that volumes.csv can be read.

    Raises:
        OSError, ValueError: when a folder, a scan itself, a table of another kind or another case has a result's name.
    """
    for name in (SLICER, ITK_SNAP):
        if (output / name).is_dir():
            raise ValueError(f"{output / name}: is a folder where a table is to be written; move it away")
    label_maps = {label_map_path(output, case): case for case in cases}
    for case, scan in cases.items():
        for path in case_files(output, case):
            if label_maps.get(path, case) != case:
                raise ValueError(f"cases {case} and {label_maps[path]}: {path} would be of both; rename a scan")
            if path.is_dir():
                raise ValueError(f"{path}: is a folder where case {case} is to be written; move it away")
            if path.exists() and scan.exists() and path.samefile(scan):
                raise ValueError(f"--output: {path} is the scan {scan} itself (a link); choose another folder")
    with locked(output / VOLUMES_LOCK):
        read_volumes(output)
