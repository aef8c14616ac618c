"""The doctor's checks: of one case by itself, and of each case against the others."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from core.inference.inputs import read_scan
from core.scans.anatomy import comparable_ml, misplaced, odd_organs, odd_volumes, organs_in, plausible_ml, swapped_sides
from core.scans.annotated import annotated_classes
from core.scans.geometry import Geometry, check_same_grid
from core.scans.nifti import Reading
from core.scans.organ_names import check_organ_names
from core.scans.resample import resize_image
from core.scans.typical import hu_percentiles
from core.scans.volumes import SHIFTED_HU, load_labels, looks_too_high, window_hu

ALL_CASES = "all cases"  # in the place of a case id, of a finding about the data set
MIN_CASES = 5  # from which on one can be far off the rest
FAR_OFF = 6.0  # robust standard deviations
MIN_SPREAD = {"spacing_mm": 0.1, "extent_mm": 0.1, "hu": 20.0}  # of a factor e, and in HU: less is no difference
MAD_TO_SD = 1.4826  # of a normal distribution
# What copies that were resampled, turned into other types or denoised are told by: the scan in this window on so few
# voxels, and their correlation. Copies gave 0.998 and more, other patients 0.89 at most (RESULTS.md).
COARSE_SIZE, COARSE_WINDOW_HU, ALIKE = (32, 32, 24), (-160.0, 240.0), 0.97
SHEET_VOXELS = 256  # of a slice on the sheet, along its longer side
WHAT_TO_DO = {
    "no_partner": "add the missing file, or take the other one out",
    "two_files": "keep one",
    "dicom": "write it as NIfTI, which train.py reads",
    "unreadable": "copy or download the file again",
    "bad_labels": "make it a map of the organ list's ids, or give the --config that lists its organs",
    "grid_mismatch": "resample the label map to its scan's grid, or pair the right files",
    "mirrored": "mirror the affine of the one that is not as its source has it",
    "misplaced": "look whether the label map belongs to this scan",
    "sides_swapped": "look at the scan: mirror the file's affine, or swap the ids of the pair",
    "duplicate": "keep one, and never have copies in training and validation",
    "near_copy": "look at both; one patient's scans must not be in training and validation",
    "no_organs": "segment the case, or take it out",
    "organ_absent": "look whether the organ was removed or forgotten",
    "odd_volume": "look at the organ in doctor.png or a viewer",
    "odd_file": "look at the scan",
    "too_high": "subtract that from the scan, or give its file the rescale intercept (scl_inter)",
    "other_ids": "or give the --config that lists their organs",
    "outlier": "look whether the case belongs to the data",
}
ERRORS = (
    *("no_partner", "two_files", "unreadable", "bad_labels", "grid_mismatch", "mirrored", "sides_swapped", "duplicate"),
)


@dataclass(frozen=True)
class Finding:
    """Something about a case: its `code` is one of WHAT_TO_DO's."""

    case: str
    code: str
    message: str

    @property
    def severity(self) -> str:
        """Return "error" for what must not be trained on, "warning" for what somebody should look at."""
        return "error" if self.code in ERRORS else "warning"


@dataclass
class Examined:
    """Facts and findings about one case's files.

    Attributes:
        case: its id.
        findings: what was found.
        shape: voxels.
        spacing_mm: of neighbouring voxels.
        extent_mm: of the whole.
        hu: HU_PERCENTILES (core/scans/typical.py) of the body.
        volumes_ml: of the organs that occur, by name.
        comparable_ml: the same without organs that are small because the scan's edge cuts them.
        content: a hash of the scan's voxels in RAS+ order; a copy in another storage order has the same.
        coarse: the scan on COARSE_SIZE voxels, flat, of mean 0 and length 1; None for a constant one.
        slice_hu: (A, B), an axial slice, SHEET_VOXELS at most.
        slice_labels: (A, B) ids in it.
        slice_mm: its size.
    """

    case: str
    findings: list[Finding] = field(default_factory=list)
    shape: tuple = ()
    spacing_mm: tuple = ()
    extent_mm: tuple = ()
    hu: list = field(default_factory=list)
    volumes_ml: dict = field(default_factory=dict)
    comparable_ml: dict = field(default_factory=dict)
    content: str = ""
    coarse: np.ndarray | None = None
    slice_hu: np.ndarray | None = None
    slice_labels: np.ndarray | None = None
    slice_mm: tuple = ()

    def find(self, code: str, message: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(self.case, code, message))


# ---- One case --------------------------------------------------------------------------------------------------------


def examine(
    files: tuple[str, Path | None, Path | None],
    organs: tuple[str, ...],
    reading: Reading,
    annotated: Mapping[str, Sequence[str]],
) -> Examined:
    """Read a case's files to their end and look at them; no error leaves it."""
    case, scan, labels = files
    seen = Examined(case)
    warnings: list[str] = []
    reading = replace(reading, warn=warnings.append)
    voxels = ids = None
    try:
        if scan:
            voxels, geometry = read_scan(scan, reading)
            describe_scan(seen, voxels, geometry)
    except (ValueError, OSError, MemoryError) as error:
        seen.find("unreadable", str(error))
    try:
        if labels:
            ids, labels_geometry = load_labels(labels, len(organs), reading)
            describe_labels(seen, ids, labels_geometry, organs, annotated.get(case))
            check_organ_names(labels, organs)
    except (ValueError, OSError, MemoryError) as error:
        about_ids = any(words in str(error) for words in ("organ ids", "ids outside", "its header says"))
        seen.find("bad_labels" if about_ids else "unreadable", str(error))
    for message in dict.fromkeys(warnings):
        seen.find("odd_file", message)
    if voxels is not None and ids is not None:
        try:
            check_same_grid(geometry, labels_geometry, f"case {case}")
            check_place(seen, voxels, ids, organs)
            keep_slice(seen, voxels, ids, geometry)
        except ValueError as error:
            seen.find("grid_mismatch", str(error))
    return seen


def describe_scan(seen: Examined, voxels: np.ndarray, geometry: Geometry) -> None:
    """Note what a scan is like."""
    seen.shape, seen.spacing_mm, seen.extent_mm = geometry.shape, geometry.spacing_mm, geometry.extent_mm
    seen.hu = hu_percentiles(voxels)
    content = hashlib.sha256(str(voxels.shape).encode())
    for plane in voxels:
        content.update(np.ascontiguousarray(plane))
    seen.content = content.hexdigest()
    image = resize_image(window_hu(voxels, COARSE_WINDOW_HU), COARSE_SIZE).ravel()
    image -= image.mean()
    length = float(np.linalg.norm(image))
    seen.coarse = image / np.float32(length) if length else None


def describe_labels(
    seen: Examined, ids: np.ndarray, geometry: Geometry, organs: Sequence[str], annotated: Sequence[str] | None
) -> None:
    """Note which organs are there, how large, and on which side; only annotated ones (None: all) can be absent."""
    found = organs_in(ids, geometry, organs)
    seen.volumes_ml = {name: organ.ml for name, organ in found.items()}
    seen.comparable_ml = comparable_ml(found)
    expected = zip(organs[1:], annotated_classes(annotated, organs)[1:], strict=True)
    absent = [name for name, is_annotated in expected if is_annotated and name not in found]
    if not found:
        seen.find("no_organs", "its label map is empty")
    elif absent:
        seen.find("organ_absent", f"without {', '.join(absent)}")
    for right, left in swapped_sides(found):
        apart = found[left].right_mm - found[right].right_mm
        seen.find("sides_swapped", f"the {right} lies {apart:.0f} mm to the patient's left of the {left}")
    for name, ml in odd_volumes(found):
        low, high = plausible_ml(name)
        seen.find("odd_volume", f"{name} of {ml:.4g} mL, expected {low:g} to {high:g} in an adult")


def check_place(seen: Examined, voxels: np.ndarray, ids: np.ndarray, organs: Sequence[str]) -> None:
    """Note a label map that is not on the scan's organs; that values are SHIFTED_HU too high is no fault of it."""
    if looks_too_high(voxels):  # read_scan has warned of it
        voxels = voxels - SHIFTED_HU
    off, mirrored = misplaced(voxels, ids, organs)
    if off and not misplaced(voxels - SHIFTED_HU, ids, organs)[0]:
        seen.find("too_high", f"its values look {SHIFTED_HU:g} too high: with that subtracted, the label map fits")
    elif off:
        message = f"{off:.0%} of its liver, kidneys and spleen lie on what has no organ's HU"
        if mirrored:
            seen.find("mirrored", f"{message}, as scan or label map have {mirrored} mirrored")
        else:
            seen.find("misplaced", message)


def keep_slice(seen: Examined, voxels: np.ndarray, ids: np.ndarray, geometry: Geometry) -> None:
    """Keep the axial slice in which most organs show, the largest area among equals."""
    per_slice = [np.bincount(ids[:, :, z].ravel(), minlength=2)[1:] for z in range(ids.shape[2])]
    z = max(range(len(per_slice)), key=lambda i: (np.count_nonzero(per_slice[i]), per_slice[i].sum()))
    step = max(1, max(ids.shape[:2]) // SHEET_VOXELS)
    seen.slice_hu, seen.slice_labels = voxels[::step, ::step, z].copy(), ids[::step, ::step, z].copy()
    seen.slice_mm = geometry.extent_mm[:2]


# ---- All cases -------------------------------------------------------------------------------------------------------


def find_duplicates(cases: Sequence[Examined]) -> Iterator[Finding]:
    """Yield a finding for each case whose scan is that of an earlier case or nearly so, in any storage order."""
    first: dict[str, str] = {}
    different = []
    for seen in cases:
        if seen.content and first.setdefault(seen.content, seen.case) != seen.case:
            yield Finding(seen.case, "duplicate", f"its scan is that of {first[seen.content]}")
        elif seen.coarse is not None:
            different.append(seen)
    if not different:
        return
    images = np.stack([seen.coarse for seen in different])
    for number, (seen, alike) in enumerate(zip(different, images @ images.T, strict=True)):
        if number and alike[:number].max() >= ALIKE:
            other = int(alike[:number].argmax())
            message = f"its scan looks like that of {different[other].case} (correlation {alike[other]:.3f})"
            yield Finding(seen.case, "near_copy", message)


def find_other_ids(cases: Sequence[Examined]) -> Iterator[Finding]:
    """Return the finding that most cases are odd in the same organ, once for the data set."""
    said = odd_organs([seen.comparable_ml for seen in cases])
    if said:
        yield Finding(ALL_CASES, "other_ids", said)


def find_outliers(cases: Sequence[Examined]) -> Iterator[Finding]:
    """Yield a finding for each case whose spacing, extent or HU are FAR_OFF robust deviations from the median."""
    read = [seen for seen in cases if seen.shape]
    if len(read) < MIN_CASES:
        return
    for what, least in MIN_SPREAD.items():
        values = np.array([getattr(seen, what) for seen in read], dtype=float)
        compared = values if what == "hu" else np.log(values)
        median = np.median(compared, axis=0)
        spread = np.maximum(MAD_TO_SD * np.median(np.abs(compared - median), axis=0), least)
        usual = listed(median if what == "hu" else np.exp(median))
        for seen, value, far in zip(read, values, np.abs(compared - median) / spread, strict=True):
            if far.max() > FAR_OFF:
                message = f"{what} {listed(value)}, the {len(read)} cases' median {usual}"
                yield Finding(seen.case, "outlier", message)


def listed(values: Sequence[float]) -> str:
    """Numbers for a message."""
    return " x ".join(f"{value:.4g}" for value in values)
