"""Find and read the scans that infer.py is given: NIfTI files, folders of them, DICOM series."""

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np

from core.inference.volumes_table import VOLUMES
from core.scans import dicom_folders
from core.scans.dicom_series import load_series
from core.scans.files import NIFTI_SUFFIXES, case_id, find_files, find_scans, listed, nifti_in, select_cases
from core.scans.geometry import Geometry
from core.scans.nifti import Reading
from core.scans.not_found import CONVERTED_SUFFIXES, visible
from core.scans.volumes import load_scan, warn_of_values
from core.system.exits import print_error, print_warning

# ---- Find scans ------------------------------------------------------------------------------------------------------


def choose_scans(
    inputs: Sequence[str], cases: Sequence[str] | None, series_uid: str | None, show: bool = True
) -> tuple[dict[str, Path], list[Path]]:
    """Return the scans that the command line asks for, and the inputs that were refused.

    Args:
        inputs: NIfTI files, folders of them, folders of DICOM series.
        cases: ids, or the name of a file of ids, as `select_cases` takes them; None for all.
        series_uid: the DICOM series that is asked for, UID or UID:N, or None.
        show: whether to name refused inputs on stderr.

    Returns:
        the scans by case id, in order, and the inputs that were refused. No scan only when all inputs were refused.

    Raises:
        ValueError: when two inputs are the same case, an id is not among the cases, or a series is asked for but no
            scan is DICOM.
    """
    found, refused = find_inputs(inputs, show)
    if not found:
        return {}, refused
    selected = select_cases(found, cases)
    if series_uid is not None and not any(scan.is_dir() for scan in selected.values()):
        raise ValueError("--series: none of the scans is DICOM, expected the folder of a series; leave it out")
    return selected, refused


def find_inputs(inputs: Sequence[str], show: bool = True) -> tuple[dict[str, Path], list[Path]]:
    """Return all scans of the inputs by case id, in order, and the inputs that were refused, each named on stderr.

    Raises:
        ValueError: when two inputs are the same case.
    """
    given: dict[tuple[str, str], Path] = {}  # by case and real path, so that a scan that is named twice counts once
    refused: list[Path] = []
    for path in map(Path, inputs):
        try:
            scans = find_input(path)
        except (ValueError, OSError) as error:
            if show:
                print_error(error)
            refused.append(path)
            continue
        if show:
            warn_of_left_out(path, scans)
        for case, scan in scans.items():
            given.setdefault((case, os.path.realpath(scan)), scan)
    divided = divided_series(given.values())
    for scan, why in divided.items():
        if show:
            print_error(ValueError(why))
        refused.append(scan)
    found: dict[str, Path] = {}
    for (case, _), scan in given.items():
        if scan not in divided and found.setdefault(case, scan) != scan:
            raise ValueError(f"case {case}: {found[case]} and {scan} both mean it; rename one or leave it out")
    if show:
        warn_of_parts_beside(found.values())
    return dict(sorted(found.items())), refused


def divided_series(scans: Collection[Path]) -> dict[Path, str]:
    """Return the folders that hold only a part of a DICOM series, with the sentence that says where the rest is.

    Copies of a series are no parts.
    """
    folders = {scan: Path(os.path.abspath(scan)) for scan in scans if scan.is_dir()}
    parts = {}
    for scan, folder in folders.items() if len(folders) > 1 else ():
        with suppress(OSError):  # what cannot be opened fails when it is read
            parts[scan] = dicom_folders.places_of_input(folder)
    divided = {}
    for one, other in combinations(parts, 2):
        here, there = folders[one], folders[other]
        whole = Path(os.path.commonpath([here, there]))
        shared = parts[one].keys() & parts[other].keys()
        nested = whole in (here, there) and any(parts[one][i].keys() != parts[other][i].keys() for i in shared)
        if nested or dicom_folders.are_parts(parts[one], parts[other]):
            what_to_do = how_to_join(whole, nested)
            for part, rest in ((one, other), (other, one)):
                divided[part] = f"{part}: holds a part of a DICOM series, {rest} another part; {what_to_do}"
    return divided


def warn_of_parts_beside(scans: Collection[Path]) -> None:
    """Warn of DICOM series that go on in a folder beside the one that is given."""
    folders = {Path(os.path.abspath(scan)): scan for scan in scans if dicom_folders.is_series_folder(scan)}
    for folder, other, more in dicom_folders.parts_beside(folders):
        what_to_do = how_to_join(folder.parent, other == folder.parent)
        print_warning(f"{folders[folder]}: {other} holds {more} more slice(s) of the same series; {what_to_do}")


def how_to_join(whole: Path, nested: bool) -> str:
    """Return what to do about the parts of a series that are below a folder, or in it and in one below it."""
    alone = nested or dicom_folders.is_one_series(dicom_folders.series_folders_within(whole))
    return f"give {whole} alone" if alone else "put its files into one folder and give that"


def find_input(path: Path) -> dict[str, Path]:
    """Return the scans of one input by case id: a NIfTI file, all files of a folder, or the folder of a DICOM series.

    A folder whose subfolders hold the parts of a single series is the folder of that series.
    A folder with files of both kinds is refused: often both are the same scan, and only the user knows which to take.

    Raises:
        OSError, ValueError: when there is no scan.
    """
    if path.is_dir() and not (path / "images").is_dir():
        nifti = find_files(path, keep_folders=True)
        if dicom_folders.is_series_folder(path):
            if nifti:
                raise ValueError(f"{path}: holds DICOM and NIfTI files; give the NIfTI file, or move one kind away")
            return {named_case(path): path}
        within = [] if nifti else dicom_folders.series_folders_within(path)
        if dicom_folders.is_one_series(within):
            return {named_case(path): path}
        if within:
            direct = all(folder.parent == path for folder in within)
            names = f"say {path}/*" if direct else listed(list(map(str, within)))
            raise ValueError(f"{path}: its DICOM series are in folders within it; give those, {names}")
    return find_scans(path)


def warn_of_left_out(path: Path, scans: dict[str, Path]) -> None:
    """Warn of what may be further scans in a folder whose NIfTI files alone are taken; `scans` are those."""
    if not path.is_dir() or path in scans.values():
        return
    inner = path / "images" if (path / "images").is_dir() else path  # beside images, only label maps are expected
    left = [p for p in visible(inner) if p.name.lower().endswith(CONVERTED_SUFFIXES)]
    left += nifti_in(path) if inner != path else []
    folders = [p for p in visible(inner) if p.is_dir() and p not in scans.values() and not (p / VOLUMES).exists()]
    left += [p for p in folders if nifti_in(p) or dicom_folders.is_series_folder(p)]
    if left:
        print_warning(f"{path}: left out {listed([p.name for p in left])}; give folders one by one, and scans as NIfTI")


def named_case(path: Path) -> str:
    """Return the case id that an input's name gives, whether or not the input can be read; for a folder, its name."""
    return case_id(Path(os.path.abspath(path)))


# ---- Read one scan ---------------------------------------------------------------------------------------------------


def read_scan(file: Path, reading: Reading, series_uid: str | None = None) -> tuple[np.ndarray, Geometry]:
    """Return a scan's HU, (X, Y, Z) float32 in RAS+ order, and its geometry.

    Args:
        file: a NIfTI file, or the folder of a DICOM series.
        reading: which scans are accepted.
        series_uid: which of the series in a DICOM folder to read, UID or UID:N; None when there is only one.

    Raises:
        OSError, ValueError: when it cannot be read.
    """
    if file.is_dir() and file.name.lower().endswith(NIFTI_SUFFIXES) and not dicom_folders.is_series_folder(file):
        raise ValueError(f"{file}: is a folder with {len(nifti_in(file))} NIfTI files, expected one")
    if not file.is_dir():
        return load_scan(file, reading)
    voxels, geometry = load_series(file, series_uid, reading.warn, reading.max_gib)
    warn_of_values(voxels, reading.warn)
    return voxels, geometry
