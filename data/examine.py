"""One case of a data set, read to its end and looked at: facts, findings, and a slice for the sheet of pictures.

`python -m data.doctor` runs this on every case, in parallel.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from core.anatomy import (
    MOST_OFF_TISSUE,
    SOLID_HU,
    Organ,
    measure,
    ras_steps_mm,
    share_off_tissue,
    sides_problem,
    volume_problems,
)
from core.nifti import Reading
from core.preprocess import Geometry, check_same_grid, load_labels, load_scan, read_nifti, window_hu
from core.resample import resize_image
from data.dicom import load_series
from dataset import hu_percentiles

SHOWN_PERCENTILES = (1, 99)  # of all voxels in HU: the ends without single odd voxels
# What near duplicates are told by: the scan in this window on so few voxels.
COARSE_SIZE, COARSE_WINDOW_HU = (32, 32, 24), (-160.0, 240.0)
STORED_HU = (-32768, 32767)  # values are counted by whole HU within these
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """What is wrong with a case, or with the data set (then `case` is empty); `message` says what to do about it."""

    case: str
    severity: str
    code: str
    message: str


@dataclass(frozen=True)
class Pair:
    """A case's files; `scan` may be the folder of a DICOM series, either may be missing."""

    case: str
    scan: Path | None
    labels: Path | None


@dataclass(frozen=True)
class Slice:
    """One axial slice, (X, Y): HU as int16 and ids, with its size in mm; voxels may have been left out evenly."""

    voxels: np.ndarray
    labels: np.ndarray
    size_mm: tuple[float, float]
    number: int
    depth: int


@dataclass
class Examined:
    """What one case came to.

    Attributes:
        findings: of this case alone.
        geometry: of the scan, or of the label map where there is no readable scan; None where there is neither.
        hu: SHOWN_PERCENTILES of the scan's voxels.
        body_hu: the median of its body's voxels.
        organs: what its label map has, by name; None without a readable one.
        fingerprint: the same for the same voxels in any order.
        coarse: the scan on few voxels, centred and of length 1.
        slice: for the sheet.
    """

    findings: list[Finding] = field(default_factory=list)
    geometry: Geometry | None = None
    hu: tuple[float, float] | None = None
    body_hu: float | None = None
    organs: dict[str, Organ] | None = None
    fingerprint: str | None = None
    coarse: np.ndarray | None = None
    slice: Slice | None = None


@dataclass(frozen=True)
class Examination:
    """How cases are looked at.

    Attributes:
        organs: names by id, background first.
        reading: what is accepted of files.
        pixels: width of a slice on the sheet.
        series: SeriesInstanceUID to take from a DICOM folder; None: the only one.
    """

    organs: tuple[str, ...]
    reading: Reading
    pixels: int
    series: str | None = None

    def __call__(self, pair: Pair) -> Examined:
        """Read a case to its end and look at it; whatever is wrong with its files becomes a finding."""
        found = Examined()

        def report(severity: str, code: str, message: str) -> None:
            found.findings.append(Finding(pair.case, severity, code, message))

        scan = self.read_scan(pair, report) if pair.scan else None
        labels = self.read_labels(pair, report) if pair.labels else None
        for volume in (labels, scan):
            if volume:
                found.geometry = volume[1]
        if scan:
            voxels = scan[0]
            found.hu = tuple(np.percentile(voxels[::4, ::4, ::4], SHOWN_PERCENTILES).tolist())
            found.body_hu = hu_percentiles(voxels)[1]
            found.fingerprint, found.coarse = fingerprint(voxels), coarse(voxels)
        if labels:
            found.organs = measure(labels[0], ras_steps_mm(labels[1]), self.organs)
            self.check_labels(labels[0], found.organs, report)
        fits = bool(scan and labels and same_grid(scan[1], labels[1], pair.case, report))
        if fits:
            check_place(*scan[:1], labels[0], self.organs, report)
        if scan:
            found.slice = self.cut_slice(*scan, labels[0] if fits else None, found.organs if fits else None)
        return found

    def read_scan(self, pair: Pair, report: Callable) -> tuple[np.ndarray, Geometry] | None:
        """A scan in HU and its geometry; None when it cannot be read, which is reported, as are warnings."""
        reading = replace(self.reading, warn=lambda message: report(WARNING, "odd_file", f"{message}; look at it"))
        try:
            if pair.scan.is_dir() and not pair.scan.name.lower().endswith(".nii"):
                return load_series(pair.scan, self.series, reading.warn, reading.max_gib)
            return load_scan(pair.scan, reading)
        except (ValueError, OSError) as error:
            report(ERROR, "unreadable", with_repair(error))
            return None

    def read_labels(self, pair: Pair, report: Callable) -> tuple[np.ndarray, Geometry] | None:
        """A label map and its geometry; None when it cannot be read, or its values are no ids: both are reported."""
        reading = replace(self.reading, warn=lambda message: report(WARNING, "odd_file", f"{message}; look at it"))
        try:
            return load_labels(pair.labels, reading=reading)
        except (ValueError, OSError) as error:
            refusal = error
        try:
            read_nifti(pair.labels, replace(reading, warn=lambda message: None))
        except (ValueError, OSError):
            report(ERROR, "unreadable", with_repair(refusal))
        else:  # the file is whole, so its values are at fault
            report(ERROR, "unknown_id", f"{refusal}; is it a label map, saved with its ids as they were?")
        return None

    def check_labels(self, labels: np.ndarray, found: dict[str, Organ], report: Callable) -> None:
        """Report ids without a name, organs that are absent, odd volumes and wrong sides."""
        counts = np.bincount(labels.ravel(), minlength=len(self.organs))
        unknown = [f"{i} ({counts[i]} voxels)" for i in np.flatnonzero(counts) if i >= len(self.organs)]
        if unknown:
            report(
                ERROR,
                "unknown_id",
                f"its label map has ids outside the organ list: {', '.join(unknown)}; expected 0 to "
                f"{len(self.organs) - 1}: correct them, or name the organs in the settings (--config)",
            )
        absent = [organ for organ in self.organs[1:] if organ not in found]
        if not counts[1:].any():
            report(WARNING, "labels_empty", "its label map has no organ at all; label it, or leave the case out")
        elif absent:
            report(
                WARNING,
                "organ_absent",
                f"{', '.join(absent)}: not in its label map; right where the scan does not reach them or they were "
                "removed, else label them",
            )
        odd = volume_problems(found)
        if odd:
            report(WARNING, "odd_volume", f"{'; '.join(odd)} in an adult; are ids and voxel size right?")
        problem = sides_problem(found, self.organs)
        if problem:
            report(ERROR, "sides_swapped", problem)

    def cut_slice(
        self,
        voxels: np.ndarray,
        geometry: Geometry,
        labels: np.ndarray | None,
        found: dict[str, Organ] | None,
    ) -> Slice:
        """The axial slice through the middle of most organs; the scan's middle one where there is none."""
        depth = voxels.shape[2]
        number = middle_slice(found or {}, depth)
        plane = voxels[:, :, number]
        ids = np.zeros(plane.shape, np.uint8) if labels is None else labels[:, :, number]
        ids = np.where(ids < len(self.organs), ids, 0)
        step = tuple(slice(None, None, max(1, n // self.pixels)) for n in plane.shape)
        hu = np.clip(plane[step], *STORED_HU).astype(np.int16)
        return Slice(hu, ids[step].copy(), geometry.extent_mm[:2], number, depth)


def with_repair(error: Exception) -> str:
    """A refusal in one line, with what to do where it does not say so."""
    message = " ".join(str(error).split())
    return message if ";" in message else f"{message}; copy or convert it again, or leave the case out"


def same_grid(scan: Geometry, labels: Geometry, case: str, report: Callable) -> bool:
    """Whether both files of a case lie on the same voxels; reported when they do not."""
    try:
        check_same_grid(scan, labels, f"case {case}")
    except ValueError as error:
        report(ERROR, "grid_mismatch", f"{error}; export the label map on the scan's own grid")
        return False
    return True


def check_place(voxels: np.ndarray, labels: np.ndarray, organs: Sequence[str], report: Callable) -> None:
    """Report a label map whose solid organs lie on what is no organ: one of another scan, or mirrored against it."""
    off = share_off_tissue(voxels, labels, organs)
    if off > MOST_OFF_TISSUE:
        low, high = SOLID_HU
        report(
            WARNING,
            "labels_misplaced",
            f"{off:.0%} of the voxels labelled as liver, spleen or kidney have no organ's HU ({low:g} to {high:g}); "
            "does the label map belong to this scan, and lie the same way round?",
        )


def middle_slice(found: dict[str, Organ], depth: int) -> int:
    """The slice along Z that is nearest to the middles of most organs; the middle one of `depth` without any."""
    numbers = np.arange(depth)
    worth = np.zeros(depth)
    for first, end in (organ.slices for organ in found.values()):
        worth += np.clip(1 - np.abs(numbers + 0.5 - (first + end) / 2) / ((end - first) / 2), 0, None)
    return int(worth.argmax()) if worth.any() else depth // 2


def fingerprint(voxels: np.ndarray) -> str:
    """A hash of how often each whole HU occurs, and of the extents whatever their order, of (X, Y, Z) HU.

    So it is the same for a copy that is renamed, packed, typed or scaled otherwise, turned, or mirrored. Two scans with
    the same counts of all values in millions of noisy voxels are one scan.
    """
    low, high = STORED_HU
    counts = np.zeros(high - low + 1, np.int64)
    for plane in voxels:
        whole = np.rint(np.clip(plane, low, high)).astype(np.int32) - low
        counts += np.bincount(whole.ravel(), minlength=len(counts))
    return hashlib.sha256(np.array(sorted(voxels.shape)).tobytes() + counts.tobytes()).hexdigest()


def coarse(voxels: np.ndarray) -> np.ndarray | None:
    """A scan on COARSE_SIZE voxels, flat, mean 0 and length 1, so that products are correlations; None if constant."""
    image = resize_image(window_hu(voxels, COARSE_WINDOW_HU), COARSE_SIZE).ravel()
    image = image - image.mean()
    length = float(np.linalg.norm(image))
    return image / np.float32(length) if length > 1e-3 else None
