"""Find the scans that infer.py is given: NIfTI files, folders of them, DICOM series."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from core.scans.files import case_id, find_files, find_scans
from core.scans.nifti import Reading
from core.system.exits import print_error

# ---- The command -----------------------------------------------------------------------------------------------------


def find_inputs(inputs: Sequence[str]) -> tuple[dict[str, Path], list[Path]]:
    """The scans of the inputs, ordered by case id, and the inputs that had to be refused, each named on stderr.

    Raises:
        ValueError: when two inputs mean the same case.
    """
    found: dict[str, Path] = {}
    refused: list[Path] = []
    for path in map(Path, inputs):
        try:
            scans = find_input(path)
        except (ValueError, OSError) as error:
            print_error(error)
            refused.append(path)
            continue
        for case, scan in scans.items():
            if os.path.realpath(found.setdefault(case, scan)) != os.path.realpath(scan):
                raise ValueError(f"case {case}: {found[case]} and {scan} both mean it; rename one or leave it out")
    return dict(sorted(found.items())), refused


def find_input(path: Path) -> dict[str, Path]:
    """The scans of one input by case id: a NIfTI file, those of a folder, or the folder itself where it is a series'.

    A folder with files of both kinds is refused: often they are one scan twice, and which is meant is not ours to say.

    Raises:
        OSError, ValueError: when there is no scan, or it is DICOM and pydicom is not installed.
    """
    if path.is_dir() and not (path / "images").is_dir():
        from core.scans.dicom_header import import_pydicom
        from core.scans.dicom_series import is_series_folder

        nifti = find_files(path)
        if is_series_folder(path):
            if nifti:
                raise ValueError(f"{path}: holds DICOM and NIfTI files; give the NIfTI file, or move one kind away")
            import_pydicom()  # without it, the input is refused
            return {named_case(path): path}
        if not nifti and any(is_series_folder(folder) for folder in path.iterdir()):
            raise ValueError(f"{path}: its DICOM series are in folders within it; give those, say {path}/*")
    return find_scans(path)


def named_case(path: Path) -> str:
    """The case that an input's name stands for, whether or not it can be read; for a folder, its own name."""
    return case_id(Path(os.path.abspath(path)))


def choose_reading(arguments: argparse.Namespace) -> Reading:
    """What is accepted of scans, by the command line.

    Raises:
        ValueError: when --max-gib is no size.
    """
    try:
        max_gib = float(arguments.max_gib)
    except ValueError:
        max_gib = math.nan
    if not 0 < max_gib < math.inf:
        raise ValueError(f"--max-gib: got {arguments.max_gib}, expected a number above 0")
    return Reading(max_gib, arguments.assume_ras, arguments.replace_nonfinite)
