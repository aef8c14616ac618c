"""Write converted cases: one case at a time, and the folder that they are in.

convert_case(case, ...) -> images/CASE_0000.nii.gz, labels/CASE.nii.gz
DataFolder              -> convert.json, organs.yaml, annotated.csv
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core.scans.annotated import read_annotated, write_annotated
from core.scans.files import list_files
from core.scans.geometry import Geometry, check_same_grid
from core.scans.organ_names import read_organ_names
from core.scans.volumes import load_labels, read_geometry, save_label_map
from core.system.files import locked, read_text, rename_old, whole_file, write_text
from core.system.yaml_files import dump_yaml, read_yaml
from data.label_names import Key, OrganMap, same_organ
from data.layouts import SourceCase
from data.other_formats import NIFTI_SUFFIXES, is_other_format, write_as_nifti

RECORD, ORGANS, LOCK = "convert.json", "organs.yaml", ".convert.lock"
IDS = 256  # that a label map can hold


@dataclass
class Converted:
    """Outcome of converting one case.

    Attributes:
        case: its id.
        error: why it failed; empty when it did not.
        present: names of the organs that occur in it.
        named: ids that its label map's header names, and those that it holds; empty where the header names none.
        dropped: voxels that became background, by the source's key.
        overlaps: voxels that two masks claim, by the names of the loser and the winner.
    """

    case: str
    error: str = ""
    present: tuple[str, ...] = ()
    named: frozenset[int] = frozenset()
    dropped: Counter = field(default_factory=Counter)
    overlaps: Counter = field(default_factory=Counter)


# ---- One case --------------------------------------------------------------------------------------------------------


def convert_case(case: SourceCase, organ_map: OrganMap, organs: Sequence[str], data_dir: Path, copy: bool) -> Converted:
    """Write a case's scan and label map; when it fails, neither is there. Earlier files of the case are replaced."""
    result = Converted(case.id)
    images, labels_file = data_dir / "images", data_dir / "labels" / f"{case.id}.nii.gz"
    scan_file = images / f"{case.id}_0000{suffix_of(case.scan)}"
    written = [labels_file, *(images / f"{case.id}_0000{suffix}" for suffix in NIFTI_SUFFIXES)]
    try:
        remove(written)
        with tempfile.TemporaryDirectory() as folder:
            scan = as_nifti(case.scan, Path(folder))
            if case.labels:
                labels, geometry = read_label_map(case.labels, organ_map, result, Path(folder))
            else:
                labels, geometry = read_masks(case, organ_map, organs, result, Path(folder))
            check_same_grid(read_geometry(scan), geometry, f"case {case.id}")
            place(scan, scan_file, copy or scan != case.scan)
            save_label_map(labels, geometry, labels_file, organs)
        result.present = tuple(organs[organ] for organ in np.flatnonzero(count_ids(labels)) if organ)
    except (ValueError, OSError, MemoryError) as error:
        result.error = str(error).removeprefix(f"case {case.id}: ") or type(error).__name__
    finally:
        if not labels_file.exists():  # it failed, or a signal ends the command
            with suppress(OSError):
                remove(written)
    return result


def read_label_map(path: Path, organ_map: OrganMap, result: Converted, folder: Path) -> tuple[np.ndarray, Geometry]:
    """Read a label map and change its ids; count what is dropped.

    Returns:
        labels, (X, Y, Z) uint8 ids of the organ list in RAS+ order, and the geometry of the file.

    Raises:
        FileNotFoundError, ValueError: when it cannot be read, or holds what has no name.
    """
    nifti = as_nifti(path, folder)
    ids, geometry = load_labels(nifti)
    in_header = header_names(nifti, organ_map)
    counts = count_ids(ids)
    present = [int(key) for key in np.flatnonzero(counts) if key]
    result.named = frozenset([*in_header, *present] if in_header else [])
    unknown = [key for key in present if key not in organ_map.names]
    if unknown:
        listed = ", ".join(f"{key} ({counts[key]} voxels)" for key in unknown[:5])
        raise ValueError(f"{path}: ids without a name: {listed}; --source-organs {unknown[0]}=NAME names them")
    for key in present:
        if key in organ_map.ignored:
            raise ValueError(
                f"{path}: {counts[key]} voxels are {organ_map.names[key]!r} (id {key}), which nobody annotated; "
                f"--source-organs {key}=background makes them background"
            )
    result.dropped.update({key: int(counts[key]) for key in present if key in organ_map.dropped})
    table = np.zeros(IDS, np.uint8)
    for key in present:
        table[key] = organ_map.target[key]
    return table[ids], geometry


def header_names(path: Path, organ_map: OrganMap) -> dict[int, str]:
    """Return the organ names by id in a label map's header; none where it has none.

    Raises:
        ValueError: when one is not the name that the source is read with.
    """
    names = read_organ_names(path)
    for key, name in names.items():
        taken = organ_map.names.get(key)
        if taken is not None and key not in organ_map.given and not same_organ(name, taken):
            raise ValueError(
                f"{path}: its header says that id {key} is {name!r}, but it is read as {taken!r}; "
                f"--source-organs {key}=NAME decides"
            )
    return names


def read_masks(
    case: SourceCase, organ_map: OrganMap, organs: Sequence[str], result: Converted, folder: Path
) -> tuple[np.ndarray, Geometry]:
    """Join masks into a label map; where two overlap, the organ later in the list wins. As `read_label_map`."""
    labels = geometry = None
    for name in sorted(used_masks(case, organ_map), key=organ_map.target.get):
        organ = organ_map.target[name]
        mask, own = load_labels(as_nifti(case.masks[name], folder))
        values = np.flatnonzero(count_ids(mask)[1:]) + 1
        if len(values) > 1:
            found = ", ".join(map(str, values[:5]))
            raise ValueError(f"{case.masks[name]}: holds the ids {found}, expected a mask of one organ")
        if labels is None:
            labels, geometry = np.zeros_like(mask), own
        check_same_grid(geometry, own, f"case {case.id}", "its first mask", name)
        inside = mask > 0
        for other, voxels in enumerate(np.bincount(labels[inside], minlength=1)):
            if other not in (0, organ) and voxels:
                result.overlaps[organs[other], organs[organ]] += int(voxels)
        labels[inside] = organ
    if labels is None:
        raise ValueError(f"none of its {len(case.masks)} masks is an organ of the list")
    return labels, geometry


def count_ids(labels: np.ndarray) -> np.ndarray:
    """Return the number of voxels by id, (IDS,), of labels, (X, Y, Z) uint8."""
    # Plane by plane, because bincount copies its input to 64 bits.
    return sum((np.bincount(plane.ravel(), minlength=IDS) for plane in labels), np.zeros(IDS, np.int64))


def used_masks(case: SourceCase, organ_map: OrganMap) -> list[str]:
    """Return the names of a case's masks that are organs of the list."""
    return [name for name in case.masks if organ_map.target.get(name)]


def as_nifti(path: Path, folder: Path) -> Path:
    """Return a file that is NIfTI: itself, or what SimpleITK makes of it in a temporary folder."""
    if not is_other_format(path):
        return path
    target = Path(tempfile.mkdtemp(dir=folder)) / "converted.nii.gz"
    write_as_nifti(path, target)
    return target


def place(scan: Path, target: Path, copy: bool) -> None:
    """Link a scan to its place: a hard link, or a symbolic one to another disk; or copy it."""
    scan = scan.resolve()
    if not copy:
        for link in (os.link, os.symlink):
            with suppress(OSError, NotImplementedError):  # another disk, or a file system without such links
                return link(scan, target)
    with whole_file(target) as temporary:
        shutil.copyfile(scan, temporary)


def copy_linked(scan: Path, images: Path, case: str) -> None:
    """Replace a case's scan by a copy where it is a link, as an earlier command has made it."""
    target = images / f"{case}_0000{suffix_of(scan)}"
    if scan.exists() and target.exists() and target.samefile(scan):
        place(scan, target, copy=True)


def suffix_of(scan: Path) -> str:
    """Return the suffix of a scan's file in our layout."""
    return ".nii" if scan.name.lower().endswith(".nii") else ".nii.gz"


def remove(paths: Sequence[Path]) -> None:
    """Delete files, those that are there."""
    for path in paths:
        path.unlink(missing_ok=True)


# ---- The folder ------------------------------------------------------------------------------------------------------


class DataFolder:
    """The folder that is written, and its record of finished cases.

    Args:
        path: DATA_DIR.
        organs: the organ list, background first.

    Raises:
        ValueError: when it was converted with another organ list, or its record is damaged.
    """

    def __init__(self, path: Path, organs: Sequence[str]):
        self.path, self.organs = path, tuple(organs)
        self.organs_file = path / ORGANS
        self.own: list[str] = []  # ids of the cases that this command converts
        self.converted: list[str] = []  # those that were finished now
        self.cases = self.read_record()

    def read_record(self) -> dict[str, dict]:
        """Return what convert.json says of each case; raise a ValueError as the class does."""
        record = self.path / RECORD
        if not record.is_file():
            return {}
        try:
            content = json.loads(read_text(record))
            before, cases = tuple(content["organs"]), dict(content["cases"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{record}: is damaged ({error}); convert into another DATA_DIR") from error
        if before != self.organs:
            raise ValueError(
                f"{self.path}: was converted with other organs ({', '.join(before)}); take another DATA_DIR"
            )
        return cases

    @property
    def annotated(self) -> dict[str, list[str]]:
        """Names of the organs that the source annotates, by finished case."""
        return {case: about["annotated"] for case, about in sorted(self.cases.items()) if about["key"]}

    def never_found(self, cases: Sequence[SourceCase]) -> list[str]:
        """Return the organs that these cases annotate, but that occur in none of those that are finished."""
        finished = [self.cases[case.id] for case in cases if self.cases.get(case.id, {}).get("key")]
        annotated = {name for about in finished for name in about["annotated"]}
        present = {name for about in finished for name in about["present"]}
        return [name for name in self.organs if name in annotated - present]

    def plan(
        self, cases: Sequence[SourceCase], organ_map: OrganMap
    ) -> tuple[list[SourceCase], list[SourceCase], dict[str, str]]:
        """Return the cases to convert, those that are finished, and the reason for those whose name is taken."""
        there = {"images": set(), "labels": set()}
        for name, found in there.items():
            if (self.path / name).is_dir():
                ids = None if name == "images" else {case.id for case in cases} | there["images"]
                found |= set(list_files(self.path / name, ids))
        todo, finished, taken = [], [], {}
        for case in cases:
            about = self.cases.get(case.id)
            present = [case.id in found for found in there.values()]
            if about is None and any(present):
                taken[case.id] = f"{self.path}: has a case of this name already, from elsewhere"
            elif about and about["scan"] != str(case.scan.resolve()):
                taken[case.id] = f"{self.path}: has a case of this name already, from {about['scan']}"
            elif about and about["key"] == key_of(case, organ_map) and all(present):
                finished.append(case)
            else:
                todo.append(case)
        return todo, finished, taken

    def start(self, todo: Sequence[SourceCase]) -> None:
        """Make the folders, and note the cases that this command is going to write."""
        for name in ("images", "labels"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        if not self.lists_organs():  # it may hold more settings, which stay
            rename_old(self.organs_file, f"{self.organs_file}: is another organ list, or none")
            write_text(self.organs_file, dump_yaml({"organs": list(self.organs)}))
        self.own = [case.id for case in todo]
        self.cases |= {case.id: {"scan": str(case.scan.resolve()), "key": None, "annotated": []} for case in todo}
        self.save()  # without lines of an earlier conversion of these

    def lists_organs(self) -> bool:
        """Return True when organs.yaml is there and lists these organs."""
        try:
            return read_yaml(self.organs_file).get("organs") == list(self.organs)
        except (OSError, ValueError):
            return False

    def finish(self, case: SourceCase, organ_map: OrganMap, result: Converted) -> None:
        """Note that a case is finished, which organs its source annotates, and which occur in it."""
        keys = used_masks(case, organ_map) if case.masks else list(organ_map.names)
        if case.annotated is not None:
            keys = [key for key in keys if organ_map.is_listed(key, case.annotated)]
        elif result.named:
            keys = [key for key in keys if key in result.named]
        annotated = [self.organs[organ] for organ in organ_map.annotated(keys)]
        self.cases[case.id] |= {"key": key_of(case, organ_map), "annotated": annotated, "present": list(result.present)}
        self.converted.append(case.id)
        self.save()

    def save(self) -> None:
        """Write convert.json, and annotated.csv for the finished cases; keep what another command wrote meanwhile.

        Lines that are there stay, whoever wrote them, but for those of cases that were converted now, or failed.
        """
        with locked(self.path / LOCK):
            self.cases = self.read_record() | {case: self.cases[case] for case in self.own}
            write_text(self.path / RECORD, json.dumps({"organs": self.organs, "cases": self.cases}, indent=1) + "\n")
            failed = {case for case, about in self.cases.items() if not about["key"]}
            there = {case: names for case, names in read_annotated(self.path).items() if case not in failed}
            write_annotated(self.path, self.annotated | there | {case: self.annotated[case] for case in self.converted})


def key_of(case: SourceCase, organ_map: OrganMap) -> str:
    """Return a value that changes when a case's files or the meaning of its ids do."""
    there = [path for path in case.files if path.exists()]  # a link may lead nowhere; its case fails when it is read
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in there]
    meaning: list[tuple[Key, int]] = sorted((str(key), organ) for key, organ in organ_map.target.items())
    told = [] if case.annotated is None else [case.annotated]
    return hashlib.sha256(json.dumps([files, meaning, *told]).encode()).hexdigest()[:16]
