"""Read a CT series as scanners write it: a folder of DICOM files, one a slice, or one enhanced multi-frame file.

    find_series(folder) -> {SeriesInstanceUID: Series}         (headers only)
    load_series(folder, series_uid) -> voxels in HU, Geometry

Needs pydicom, and python-gdcm for JPEG-LS and lossless JPEG: `pip install pydicom python-gdcm`.
A volume is made of slices that lie evenly on a line and fill it; anything else is refused, never resampled.
PS3.3 and PS3.5 below are parts of the DICOM standard. Names, dates and numbers of a patient appear in no message.
"""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from core.scans import dicom_pixels
from core.scans.dicom_header import (
    DEFLATED,
    Slice,
    description_of,
    is_dicom,
    kind_of,
    number_of_frames,
    printable,
    read_header,
    slices_of,
    text,
)
from core.scans.dicom_pixels import FAILURE, FRAME, FRAME_SECONDS
from core.scans.geometry import GRID_TOLERANCE, Geometry
from core.scans.nifti import MAX_GIB, SPACING_MM
from core.scans.volumes import NIFTI_SUFFIXES
from core.system.exits import print_warning

if TYPE_CHECKING:
    from pydicom import Dataset

DECODER = Path(dicom_pixels.__file__).resolve()
NIFTI_EXTENT = 32767  # a NIfTI header holds no more voxels along an axis
WHOLE_GAP = 0.2  # by which a gap may differ from a multiple of the others and still mean missing slices
SAME_POSITION_MM = 0.01  # slices closer than that are two of one place
ROUNDING_MM = 0.101  # that a slice may always be off an even line, as two positions rounded to 0.1 mm put it
SAME_SPACING_MM = 1e-4  # by which pixel spacings may differ between slices: 0.05 mm across 512 pixels
SAME_DIRECTION = 1e-4  # by which direction cosines may differ between slices: 0.05 mm across 500 mm
AIR_HU = -1024.0  # what padding outside of the scanned circle becomes
BODY_HU = (-1000.0, 3071.0)  # values that tissue has; padding should have none of them
LISTED = 3  # names in a message before "and N more"


@dataclass
class Series:
    """The files of one SeriesInstanceUID.

    Attributes:
        uid: its SeriesInstanceUID; may be empty.
        description: its SeriesDescription; may be empty.
        headers: those of its CT slices, by file.
        others: by file, what it is in place of a slice of a CT volume.
    """

    uid: str
    description: str
    headers: dict[Path, "Dataset"] = field(default_factory=dict)
    others: dict[Path, str] = field(default_factory=dict)

    @property
    def slices(self) -> int:
        """How many slices its CT files have."""
        return sum(number_of_frames(header) for header in self.headers.values())

    def __str__(self) -> str:
        """As messages name it."""
        return f"{self.uid or repr('')} ('{self.description}', {self.slices} slices)"


# ---- Finding ---------------------------------------------------------------------------------------------------------


def is_series_folder(path: str | Path) -> bool:
    """Whether a folder holds DICOM files itself (folders within it do not count); needs no pydicom."""
    return Path(path).is_dir() and any(is_dicom(file) for file in files_of(path))


def files_of(folder: str | Path) -> list[Path]:
    """The regular files of a folder by name, without hidden ones, the index DICOMDIR, and those named as NIfTI."""
    files = (path for path in sorted(Path(folder).iterdir()) if path.is_file())
    return [
        path
        for path in files
        if not path.name.startswith(".")
        and path.name.upper() != "DICOMDIR"
        and not path.name.lower().endswith(NIFTI_SUFFIXES)
    ]


def find_series(folder: str | Path, warn: Callable[[str], None] = print_warning) -> dict[str, Series]:
    """The series in a folder by SeriesInstanceUID; only headers are read, folders within it are not.

    Args:
        folder: where the files are.
        warn: is given what the user should know, a sentence each.

    Raises:
        FileNotFoundError: when there is no such folder, or no DICOM file in it.
        ValueError: when a DICOM file cannot be read, so that a slice of the series may be missing; or without pydicom.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    dicom, others = [], []
    for path in files_of(folder):
        (dicom if is_dicom(path) else others).append(path)
    if not dicom:
        raise FileNotFoundError(f"{folder}: no DICOM file in it; give the folder that holds the slices themselves")
    if others:
        warn(f"{folder}: left out, being no DICOM: {listed([path.name for path in others])}")
    series: dict[str, Series] = {}
    for path in dicom:
        header = read_header(path)
        uid = text(header, "SeriesInstanceUID")
        found = series.setdefault(uid, Series(uid, description_of(header)))
        kind = kind_of(header)
        if kind:
            found.others[path] = kind
        else:
            found.headers[path] = header
    return series


def choose_series(folder: Path, series_uid: str | None, warn: Callable[[str], None]) -> Series:
    """The CT series of that UID, or the only one in the folder; what else lies there is named in a warning.

    Raises:
        FileNotFoundError, ValueError: as `find_series`, and when none or more than one can be meant.
    """
    found = find_series(folder, warn)
    names = "; ".join(str(series) for series in found.values() if series.headers) or "none"
    if series_uid is not None and series_uid not in found:
        raise ValueError(f"{folder}: has no series {printable(series_uid)}; its CT series: {names}")
    asked = [series for uid, series in found.items() if series_uid in (None, uid)]
    every = [series for series in asked if series.headers]
    others = [kind for series in asked for kind in series.others.values()]
    if not every:
        raise ValueError(f"{folder}: holds {listed(set(others))}, expected the slices of a CT volume")
    if len(every) > 1:
        raise ValueError(f"{folder}: holds {len(every)} CT series, expected one; choose by --series UID: {names}")
    if others:
        warn(f"{folder}: left out {len(others)} file(s) that are no slices of a CT volume: {listed(set(others))}")
    return every[0]


def listed(names: Collection[str]) -> str:
    """Names for a message, in order, long lists cut."""
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


# ---- Geometry --------------------------------------------------------------------------------------------------------


def sort_slices(folder: Path, slices: Sequence[Slice]) -> list[Slice]:
    """Slices in the order in which they lie along their normal; names and numbers of files say nothing.

    Raises:
        ValueError: when they do not belong into one volume.
    """
    if len(slices) < 2:
        raise ValueError(f"{folder}: the series has {len(slices)} slice, expected at least 2")
    first = slices[0]
    for other in slices[1:]:
        differs = {
            "Rows": first.rows != other.rows,
            "Columns": first.columns != other.columns,
            "PixelSpacing": not np.allclose(first.spacing, other.spacing, rtol=0, atol=SAME_SPACING_MM),
            "ImageOrientationPatient": not np.allclose(first.orientation, other.orientation, 0, SAME_DIRECTION),
            **{keyword: value != other.same[keyword] for keyword, value in first.same.items()},
        }
        if any(differs.values()):
            which = " and ".join(keyword for keyword, different in differs.items() if different)
            raise ValueError(f"{other.path}: {which} differs from {first.path.name}, expected the same in all slices")
    normal = np.cross(*first.orientation)
    return sorted(slices, key=lambda one: float(one.position @ normal))


def affine_of(folder: Path, slices: Sequence[Slice]) -> np.ndarray:
    """The affine (4, 4) from (column, row, slice) indices to mm in RAS+, of slices in order.

    PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1, places column i and row j of a slice at S + X di i + Y dj j in LPS+: S is
    ImagePositionPatient, X and Y are the halves of ImageOrientationPatient, di and dj the second and the first value of
    PixelSpacing. Slice k adds k times the step between the S of neighbours, which with a tilted gantry is not the
    normal of the slices. L and P are turned to R and A by their signs.

    Raises:
        ValueError: when slices are missing, uneven or double, or the spacing is not that of CT.
    """
    positions = np.array([one.position for one in slices])
    check_doubles(folder, slices)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    row_mm, column_mm = slices[0].spacing
    along_row, down_column = slices[0].orientation
    affine = np.eye(4)
    affine[:3] = np.column_stack([along_row * column_mm, down_column * row_mm, step, positions[0]])
    low, high = SPACING_MM
    for mm in (row_mm, column_mm, np.linalg.norm(step)):
        if not low <= mm <= high:
            raise ValueError(f"{folder}: its voxels are {mm:.4g} mm apart, expected {low:g} to {high:g}")
    off = positions - positions[0] - np.arange(len(slices))[:, None] * step
    off_voxels = np.linalg.solve(affine[:3, :3], off.T)
    far = (np.abs(off_voxels).max(axis=0) > GRID_TOLERANCE) & (np.linalg.norm(off, axis=1) > ROUNDING_MM)
    if far.any():
        raise ValueError(f"{folder}: {why_uneven(slices, off_voxels)}")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def gaps_of(slices: Sequence[Slice]) -> np.ndarray:
    """The distances in mm between neighbouring slices, along their normal."""
    normal = np.cross(*slices[0].orientation)
    return np.diff([one.position @ normal for one in slices])


def check_doubles(folder: Path, slices: Sequence[Slice]) -> None:
    """Refuse slices, in order, of which two are at one place.

    Raises:
        ValueError: naming two.
    """
    gaps = gaps_of(slices)
    doubles = np.count_nonzero(gaps < SAME_POSITION_MM)
    if doubles:
        raise ValueError(
            f"{folder}: {doubles} slice(s) at a place that another one has, such as "
            f"{beside(slices, int(gaps.argmin()))}; a file copied, or several phases under one series UID?"
        )


def why_uneven(slices: Sequence[Slice], off_voxels: np.ndarray) -> str:
    """In words, why slices, in order, fill no even grid; `off_voxels` (3, slices) is how far each is off it."""
    gaps = gaps_of(slices)
    closest, widest, typical = int(gaps.argmin()), int(gaps.argmax()), float(np.median(gaps))
    if np.abs(off_voxels[2]).max() <= GRID_TOLERANCE:
        return f"slices are shifted sideways by up to {np.abs(off_voxels[:2]).max():.2g} pixels, expected an even line"
    missing = np.rint(gaps / typical) - 1
    if missing.max() >= 1 and np.abs(gaps / typical - 1 - missing).max() <= WHOLE_GAP:
        return (
            f"{missing.sum():.0f} slice(s) missing: {beside(slices, widest)} are {gaps[widest]:.4g} mm apart, "
            f"others {typical:.4g} mm; expected an even spacing"
        )
    return (
        f"slices are unevenly spaced: {beside(slices, closest)} are {gaps[closest]:.4g} mm apart, "
        f"{beside(slices, widest)} {gaps[widest]:.4g} mm; expected the same everywhere"
    )


def beside(slices: Sequence[Slice], gap: int) -> str:
    """The names of the slices on both sides of a gap."""
    one, two = slices[gap], slices[gap + 1]
    if one.path == two.path:
        return f"frames {one.frame + 1} and {two.frame + 1} of {one.path.name}"
    return f"{one.path.name} and {two.path.name}"


def geometry_of(folder: Path, slices: Sequence[Slice], warn: Callable[[str], None]) -> Geometry:
    """The geometry of a volume of slices in order, stored as (columns, rows, slices), with a NIfTI header made for it.

    A tilted gantry's slices are sheared against each other; the sform holds that. A qform cannot and is left out then.

    Raises:
        ValueError: as `affine_of`.
    """
    affine = affine_of(folder, slices)
    shape = (slices[0].columns, slices[0].rows, len(slices))
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner", strip_shears=True)
    affine = header.get_sform()  # rounded to float32, as it will stand in the files written for this scan
    last = np.array(shape) - 1
    corners = np.array(np.meshgrid(*[(0, n) for n in last], indexing="ij")).reshape(3, -1).T
    apart = nib.affines.apply_affine(np.linalg.inv(affine) @ header.get_qform(), corners) - corners
    if np.abs(apart).max() > GRID_TOLERANCE:
        header.set_qform(None, code="unknown")
        step, normal = affine[:3, 2], np.cross(affine[:3, 0], affine[:3, 1])
        cosine = abs(step @ normal) / np.linalg.norm(step) / np.linalg.norm(normal)
        degrees = math.degrees(math.acos(min(cosine, 1.0)))
        warn(f"{folder}: slices are sheared by {degrees:.1f} degrees (tilted gantry); the affine keeps that")
    return Geometry(shape, affine, header)


# ---- Voxels ----------------------------------------------------------------------------------------------------------


def load_series(
    folder: str | Path,
    series_uid: str | None = None,
    warn: Callable[[str], None] = print_warning,
    max_gib: float = MAX_GIB,
) -> tuple[np.ndarray, Geometry]:
    """Read a CT series.

    Args:
        folder: where its files are.
        series_uid: its SeriesInstanceUID; None: the only CT series in the folder.
        warn: is given what the user should know, a sentence each.
        max_gib: of voxels as float32; larger series are refused before memory is taken.

    Returns:
        voxels, (X, Y, Z) float32 in HU and RAS+ order, and the geometry that leads back to (column, row, slice).

    Raises:
        FileNotFoundError: when there is no such folder or no DICOM file in it.
        ValueError: when the series is no whole, even CT volume that can be read, or pydicom is not installed.
    """
    folder = Path(folder)
    series = choose_series(folder, series_uid, warn)
    slices = [one for path, header in series.headers.items() for one in slices_of(path, header)]
    slices = sort_slices(folder, slices)
    check_sizes(folder, slices, series, max_gib)
    geometry = geometry_of(folder, slices, warn)
    warn_of_padding(folder, slices, warn)
    voxels = np.empty(geometry.shape, dtype=np.float32)
    stack = geometry.from_ras(voxels)  # a view of the same memory as (column, row, slice)
    place = {(one.path, one.frame): k for k, one in enumerate(slices)}
    for path, frame, stored in decoded_frames(slices):
        k = place[path, frame]
        stack[:, :, k] = to_hu(stored, slices[k]).T
    return voxels, geometry


def check_sizes(folder: Path, slices: Sequence[Slice], series: Series, max_gib: float) -> None:
    """Refuse a volume by its declared size, and files that are shorter than the uncompressed pixels that they declare.

    Raises:
        ValueError: naming the size, or the first such file.
    """
    shape = (slices[0].columns, slices[0].rows, len(slices))
    gib = 4 * math.prod(shape) / 2**30
    if gib > max_gib or max(shape) > NIFTI_EXTENT:
        raise ValueError(
            f"{folder}: {'x'.join(map(str, shape))} voxels, {gib:.1f} GiB of memory, are more than expected: at most "
            f"{max_gib:g} GiB, and {NIFTI_EXTENT} along an axis"
        )
    for path, header in series.headers.items():
        needed = header.Rows * header.Columns * header.BitsAllocated // 8 * number_of_frames(header)
        syntax = header.file_meta.TransferSyntaxUID
        if not syntax.is_compressed and syntax != DEFLATED and path.stat().st_size < needed:
            raise ValueError(f"{path}: has {path.stat().st_size} bytes, expected {needed} for the pixels; cut off?")


def warn_of_padding(folder: Path, slices: Sequence[Slice], warn: Callable[[str], None]) -> None:
    """Warn when the value that stands for "not scanned" is one that tissue has, as some writers' headers claim."""
    low, high = BODY_HU
    for one in slices:
        hu = [one.slope * value + one.intercept for value in one.padding or ()]
        if any(low < value <= high for value in hu):
            warn(f"{folder}: PixelPaddingValue is {hu[0]:g} HU, as in tissue; voxels of it become {AIR_HU:g} HU")
            return


def to_hu(stored: np.ndarray, one: Slice) -> np.ndarray:
    """From stored values, (rows, columns) int32, to float32 HU by the slice's own scale; padding becomes air."""
    hu = stored * np.float32(one.slope) + np.float32(one.intercept)
    if one.padding:
        hu[(stored >= one.padding[0]) & (stored <= one.padding[1])] = AIR_HU
    return hu


def decoded_frames(slices: Sequence[Slice]) -> Iterator[tuple[Path, int, np.ndarray]]:
    """The stored values of all frames of the slices' files: file, frame and (rows, columns) int32.

    Another process decodes (core/scans/dicom_pixels.py says why).

    Raises:
        ValueError: naming the file whose pixels cannot be decoded.
    """
    files = {one.path: one.frames for one in slices}
    request = json.dumps({"files": [[str(path.resolve()), frames] for path, frames in files.items()]})
    shape = (slices[0].rows, slices[0].columns)
    # By its path, so that it is found from any folder; -P keeps the files beside it from hiding packages.
    command = [sys.executable, "-P", str(DECODER)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as decoder:
        try:
            with suppress(BrokenPipeError):  # it has ended already; receive_frame says so
                decoder.stdin.write(request.encode())
                decoder.stdin.close()
            for path, frames in files.items():
                for frame in range(frames):
                    yield path, frame, receive_frame(decoder, path, shape)
        finally:
            decoder.kill()


def receive_frame(decoder: subprocess.Popen, path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The next frame from the process that decodes, (rows, columns) int32.

    Raises:
        ValueError: when there is none: the file was refused there, or the process has ended.
    """
    what = decoder.stdout.read(1)
    if what == FAILURE:
        raise ValueError(f"{path}: its pixels cannot be decoded ({decoder.stdout.read().decode()})")
    content = decoder.stdout.read(math.prod(shape) * np.dtype(np.int32).itemsize) if what == FRAME else b""
    if len(content) < math.prod(shape) * np.dtype(np.int32).itemsize:
        ended_by = -decoder.wait()
        why = f"by {signal.Signals(ended_by).name}" if ended_by > 0 else f"with code {-ended_by}"
        if ended_by == getattr(signal, "SIGALRM", None):
            why = f"after {FRAME_SECONDS} s"
        raise ValueError(f"{path}: its pixels cannot be decoded (the decoder ended {why}); the file may be damaged")
    return np.frombuffer(content, dtype=np.int32).reshape(shape)
