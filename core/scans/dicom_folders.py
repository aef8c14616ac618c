"""Find the DICOM files of a folder, and the parts of one series that an export has put into several folders."""

import filecmp
import os
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np

from core.scans.dicom_acquisitions import is_even
from core.scans.dicom_header import is_dicom, kind_of, read_header, text
from core.scans.not_found import visible
from core.scans.volumes import NIFTI_SUFFIXES

SLICE_SUFFIXES = {".dcm", ".dicom", ".ima"}  # of names that only DICOM files have
HALF_COPIED = {".part", ".partial", ".crdownload", ".tmp", ".gz"}  # what a download, or a copy, adds to a name
SLICE_SIZE = 0.5  # of the smallest slice; a file without such a name is taken for a damaged slice from this size on
SAMPLED = 8  # files that tell which series a folder holds, where all would take long
MIN_IN_TURN = 3  # slices; fewer are always even
LISTED = 3  # names in a message before "and N more"
Identity = tuple[str, ...]  # what the slices of one series have in common
Places = dict[Identity, dict[str, Path]]  # the files of each series by place


def is_series_folder(path: str | Path) -> bool:
    """Return True when a folder itself holds DICOM files (its subfolders do not count); needs no pydicom."""
    return Path(path).is_dir() and any(is_dicom(file) for file in files_of(path))


def files_of(folder: str | Path) -> list[Path]:
    """List the regular files of a folder by name, without hidden ones, the index DICOMDIR, and NIfTI files."""
    files = (path for path in visible(Path(folder)) if path.is_file() and path.name.upper() != "DICOMDIR")
    return [path for path in files if not path.name.lower().endswith(NIFTI_SUFFIXES)]


def series_folders_within(folder: str | Path) -> list[Path]:
    """List the folders below a folder, at any depth, that hold DICOM files; hidden ones are skipped."""
    found, seen = [], {os.path.realpath(folder)}
    for current, below, _ in os.walk(folder, followlinks=True):
        paths = {name: os.path.realpath(os.path.join(current, name)) for name in below if not name.startswith(".")}
        below[:] = sorted(name for name, path in paths.items() if path not in seen)  # a link may lead back
        seen.update(paths.values())
        if current != str(folder) and is_series_folder(current):
            found.append(Path(current))
    return found


def dicom_files(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """List the DICOM files of a folder; name the others in a warning.

    Raises:
        ValueError: when another one seems to be a slice that is damaged.
    """
    dicom, others = [], []
    for path in files_of(folder):
        (dicom if is_dicom(path) else others).append(path)
    if dicom and others:
        suffixes, sizes = {path.suffix.lower() for path in dicom}, [path.stat().st_size for path in dicom]
        for path in others:
            name, size = path.with_suffix("") if path.suffix.lower() in HALF_COPIED else path, path.stat().st_size
            like_a_slice = path.suffix.lower() in suffixes and size >= SLICE_SIZE * min(sizes)
            if like_a_slice or (name.suffix.lower() in SLICE_SUFFIXES and size):
                raise ValueError(
                    f"{folder}: {path.name} is no DICOM but is named like the slices, so one may be missing; copy it "
                    "again or move it away"
                )
        warn(f"{folder}: left out, being no DICOM: {listed([path.name for path in others])}")
    return dicom


def files_of_series(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """List the DICOM files of a folder, with those of its subfolders that belong to the same series.

    A folder without DICOM files of its own is read when its subfolders hold the parts of a single series. Copies of a
    slice count once.
    """
    own, within = dicom_files(folder, warn), series_folders_within(folder)
    if not within:
        return own
    if not own:
        return joined_files(within, warn) if is_one_series(within) else []
    known, joined = places_in([folder]), []
    for part in within:
        found = places_in([part])
        copies = copies_in(found, known)
        for identity in found.keys() & known.keys():
            new = {place: path for place, path in found[identity].items() if path not in copies}
            if not new:
                warn(f"{folder}: left out {part}, which holds {len(found[identity])} of its slices once more")
            elif new.keys() <= known[identity].keys():
                warn(f"{folder}: left out {part}, which holds {len(new)} other slice(s) at the same places")
            else:
                warn(f"{folder}: read with {len(new)} more slice(s) of the same series in {part}")
                joined += new.values()
                known[identity] |= new
    return [*own, *joined]


def joined_files(folders: Collection[Path], warn: Callable[[str], None]) -> list[Path]:
    """List the DICOM files of several folders without copies of the same slice."""
    known: Places = defaultdict(dict)
    files = []
    for folder in folders:
        found = places_in([folder])
        copies = copies_in(found, known)
        files += [path for path in dicom_files(folder, warn) if path not in copies]
        for identity, places in found.items():
            known[identity] |= places
    return files


def copies_in(found: Places, known: Places) -> set[Path]:
    """Return the files that are the same slices as files in `known`, of the same series and place."""
    return {
        path
        for identity in found.keys() & known.keys()
        for place, path in found[identity].items()
        if place in known[identity] and is_copy(path, known[identity][place])
    }


def is_copy(one: Path, other: Path) -> bool:
    """Return True when two files are the same slice, by SOPInstanceUID, or by content where that was removed."""
    uids = [text(read_header(path), "SOPInstanceUID") for path in (one, other)]
    return uids[0] == uids[1] if any(uids) else filecmp.cmp(one, other, shallow=False)


def parts_beside(folders: Collection[Path]) -> list[tuple[Path, Path, int]]:
    """Find parts of the folders' series in the folders beside and above them.

    Only folders of which some files belong to the same series are looked through.

    Returns:
        each folder, the one that holds another part, and how many slices more that has.
    """
    known, found = {os.path.realpath(folder) for folder in folders}, []
    for parent in sorted({folder.parent for folder in folders}):
        given = {folder: identities_in(folder) for folder in folders if folder.parent == parent}
        beside = [parent / name for name in next(os.walk(parent), (None, [], []))[1] if not name.startswith(".")]
        for other in (parent, *sorted(beside)):
            with suppress(OSError):  # of others, what cannot be opened does not matter
                series = set() if os.path.realpath(other) in known else identities_in(other)
                for folder in (folder for folder, own in given.items() if own & series):
                    here, there = places_in([folder]), places_in([other])
                    if are_parts(here, there):
                        more = sum(len(there[i].keys() - here[i].keys()) for i in here.keys() & there.keys())
                        found.append((folder, other, more))
    return found


def identities_in(folder: Path) -> set[Identity]:
    """Return the series of a folder's files, by some of them."""
    files = files_of(folder)
    return set(places_of(files[:: max(1, len(files) // SAMPLED)]))


def is_one_series(folders: Collection[Path]) -> bool:
    """Return True when several folders hold the parts of a single CT series."""
    parts = [places for folder in folders if (places := places_in([folder]))]
    if len(parts) < 2 or len({identity for part in parts for identity in part}) != 1:
        return False
    return all(are_parts(*pair) for pair in combinations(parts, 2))


def are_parts(one: Places, other: Places) -> bool:
    """Return True when a series is in both, and neither has all the slices of it that the other has.

    Two whole acquisitions whose slices take turns are no parts.
    """
    return any(
        not (one[identity].keys() <= other[identity].keys() or other[identity].keys() <= one[identity].keys())
        and not take_turns(one[identity], other[identity])
        for identity in one.keys() & other.keys()
    )


def take_turns(one: Collection[str], other: Collection[str]) -> bool:
    """Return True when two sets of places share a part of the patient but no place, and each is even by itself."""
    if set(one) & set(other) or min(len(one), len(other)) < MIN_IN_TURN:
        return False
    try:
        first, second = (np.array([place.strip("[]").split(",") for place in places], float) for places in (one, other))
        axis = int(np.ptp(np.vstack([first, second]), axis=0).argmax())
    except ValueError:  # without ImagePositionPatient
        return False
    first, second = np.sort(first[:, axis]), np.sort(second[:, axis])
    return max(first[0], second[0]) < min(first[-1], second[-1]) and is_even(first) and is_even(second)


def places_in(folders: Collection[Path]) -> Places:
    """Return the CT files of folders by series and place; files that cannot be read are skipped."""
    return places_of([path for folder in folders for path in files_of(folder)])


def places_of(files: Collection[Path]) -> Places:
    """Return those of the files that are CT slices by series and place; others are skipped."""
    found: Places = defaultdict(dict)
    for path in files:
        with suppress(ValueError, OSError):
            if not is_dicom(path):
                continue
            header = read_header(path)
            identity = [text(header, key) for key in ("SeriesInstanceUID", "FrameOfReferenceUID", "PatientID")]
            if not identity[0]:  # removed to protect the patient
                identity.append(text(header, "SeriesDescription"))
            if kind_of(header) is None and any(identity[:2]):
                place = header.get("ImagePositionPatient") or path
                found[tuple(identity)][str(place)] = path
    return found


def places_of_input(folder: Path) -> Places:
    """Return the CT files by series and place that reading a folder would take, with those in folders within it."""
    own, within = places_in([folder]), places_in(series_folders_within(folder))
    return {identity: within.get(identity, {}) | places for identity, places in own.items()} if own else within


def listed(names: Collection[str]) -> str:
    """Return names for a message, in order; a long list is cut."""
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
