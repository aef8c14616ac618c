"""Read a CT series as scanners write it: a folder of DICOM files, one a slice, or one enhanced multi-frame file.

    find_series(folder) -> {SeriesInstanceUID: Series}         (headers only)
    load_series(folder, series_uid) -> voxels in HU, Geometry

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

import numpy as np
from pydicom import Dataset

from core.scans import dicom_header, dicom_pixels
from core.scans.alternating import period_of_slices
from core.scans.dicom_acquisitions import Acquisition, acquisitions_in_turn, acquisitions_of
from core.scans.dicom_folders import files_of_series, listed
from core.scans.dicom_geometry import NIFTI_EXTENT, geometry_of, sort_slices
from core.scans.dicom_pixels import DECODE_ERRORS, FAILURE, FRAME, FRAME_SECONDS, decode, reason_of
from core.scans.dicom_slice import Slice, slices_of
from core.scans.geometry import Geometry
from core.scans.nifti import MAX_GIB
from core.system.exits import print_warning

DECODER = Path(dicom_pixels.__file__).resolve()
AIR_HU = -1024.0  # what padding outside of the scanned circle becomes
BODY_HU = (-1000.0, 3071.0)  # values that tissue has; padding should have none of them


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
    headers: dict[Path, Dataset] = field(default_factory=dict)
    others: dict[Path, str] = field(default_factory=dict)

    @property
    def slices(self) -> int:
        """Return the number of slices in its CT files."""
        return sum(dicom_header.number_of_frames(header) for header in self.headers.values())

    def __str__(self) -> str:
        """Return the name that messages use."""
        return f"{self.uid or repr('')} ('{self.description}', {self.slices} slices)"


# ---- Finding ---------------------------------------------------------------------------------------------------------


def find_series(folder: str | Path, warn: Callable[[str], None] = print_warning) -> dict[str, Series]:
    """Find the series in a folder by SeriesInstanceUID; read headers only.

    Of folders within it, only files that belong to the same series are read.

    Args:
        folder: where the files are.
        warn: is given what the user should know, a sentence each.

    Raises:
        FileNotFoundError: when there is no such folder, or no DICOM file in it.
        ValueError: when a DICOM file cannot be read, so that a slice of the series may be missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    dicom = files_of_series(folder, warn)
    if not dicom:
        raise FileNotFoundError(f"{folder}: no DICOM file in it; give the folder that holds the slices themselves")
    series: dict[str, Series] = {}
    for path in dicom:
        header = dicom_header.read_header(path)
        uid = dicom_header.text(header, "SeriesInstanceUID")
        found = series.setdefault(uid, Series(uid, dicom_header.description_of(header)))
        kind = dicom_header.kind_of(header)
        if kind:
            found.others[path] = kind
        else:
            found.headers[path] = header
    return series


def choose_series(folder: Path, asked: str | None, warn: Callable[[str], None]) -> tuple[Series, int | None]:
    """Choose the CT series asked for, UID or UID:N, or the only one in the folder; return it and N.

    What else is there is named in a warning.

    Raises:
        FileNotFoundError, ValueError: as `find_series`, and when none or more than one can be meant.
    """
    found = find_series(folder, warn)
    series_uid, number = split_choice(found, asked)
    names = "; ".join(str(series) for series in found.values() if series.headers) or "none"
    if series_uid is not None and series_uid not in found:
        raise ValueError(f"{folder}: has no series {dicom_header.printable(series_uid)}; its CT series: {names}")
    asked = [series for uid, series in found.items() if series_uid in (None, uid)]
    every = [series for series in asked if series.headers]
    others = [kind for series in asked for kind in series.others.values()]
    if not every:
        raise ValueError(f"{folder}: holds {listed(set(others))}, expected the slices of a CT volume")
    if len(every) > 1:
        raise ValueError(f"{folder}: holds {len(every)} CT series, expected one; choose by --series UID: {names}")
    if others:
        warn(f"{folder}: left out {len(others)} file(s) that are no slices of a CT volume: {listed(set(others))}")
    return every[0], number


def split_choice(found: Collection[str], asked: str | None) -> tuple[str | None, int | None]:
    """Split --series UID:N into the SeriesInstanceUID and the number of an acquisition, None where not given."""
    uid, colon, number = (asked or "").rpartition(":")
    if asked in found or not (colon and number.isdecimal()):
        return asked, None
    return uid, int(number)


def choose_acquisition(
    folder: Path, series: Series, found: Sequence[Acquisition], number: int | None, why: str
) -> list[Slice]:
    """Choose the N-th of a series' acquisitions, from 1; `why` they are several where their headers do not tell.

    Raises:
        ValueError: when none or another one is asked for.
    """
    if number is not None and 1 <= number <= len(found):
        return found[number - 1].slices
    names = "; ".join(f"{series.uid}:{i} ({one.name})" for i, one in enumerate(found, start=1))
    if not found:
        raise ValueError(f"{folder}: series {series.uid} has one acquisition, expected --series UID without :{number}")
    names += f"; {series.uid}:0 (all slices as one volume)" if why else ""
    raise ValueError(
        f"{folder}: holds {len(found)} acquisitions under one series UID{why}; choose by --series UID:N: {names}"
    )


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
        series_uid: its SeriesInstanceUID, with :N for the N-th of its acquisitions, or :0 for all slices where only the
            image alternates; None: the only CT series.
        warn: is given what the user should know, a sentence each.
        max_gib: of voxels as float32; larger series are refused before memory is taken.

    Returns:
        voxels, (X, Y, Z) float32 in HU and RAS+ order, and the geometry that leads back to (column, row, slice).

    Raises:
        FileNotFoundError: when there is no such folder or no DICOM file in it.
        ValueError: when the series is no whole, even CT volume that can be read.
    """
    folder = Path(folder)
    series, number, slices = sorted_slices(folder, series_uid, warn)
    check_sizes(folder, slices, series, max_gib)
    found = acquisitions_of(slices)
    if found:
        slices = choose_acquisition(folder, series, found, number, "")
    voxels, geometry, period = read_slices(folder, slices, warn)
    if period > 1 and number == 0 and not found:
        return voxels, geometry
    if not found and (period > 1 or number is not None):
        found = acquisitions_of(slices, alternating=True) if period > 1 else []
        found = found if len(found) == period or period == 1 else acquisitions_in_turn(slices, period)
        slices = choose_acquisition(folder, series, found, number, ", as neighbouring slices alternate")
        voxels, geometry, period = read_slices(folder, slices, warn)
    if period > 1:
        raise ValueError(
            f"{folder}: neighbouring slices of this acquisition alternate, expected one volume; copy its files into a "
            "folder of their own to choose among them"
        )
    return voxels, geometry


def sorted_slices(
    folder: Path, series_uid: str | None, warn: Callable[[str], None]
) -> tuple[Series, int | None, list[Slice]]:
    """Return the series and the number that `choose_series` chooses, and all slices of the series, sorted."""
    series, number = choose_series(folder, series_uid, warn)
    slices = [one for path, header in series.headers.items() for one in slices_of(path, header)]
    return series, number, sort_slices(folder, slices)


def read_series_geometry(folder: str | Path, series_uid: str | None = None) -> Geometry | None:
    """Return the geometry that `load_series` returns, from headers; None where the image tells acquisitions apart.

    Raises:
        FileNotFoundError, ValueError: as `load_series`.
    """
    folder = Path(folder)
    series, number, slices = sorted_slices(folder, series_uid, warn=lambda _: None)
    found = acquisitions_of(slices)
    if number and not found:
        return None
    slices = choose_acquisition(folder, series, found, number, "") if found else slices
    return geometry_of(folder, slices, warn=lambda _: None)


def read_slices(folder: Path, slices: Sequence[Slice], warn: Callable[[str], None]) -> tuple[np.ndarray, Geometry, int]:
    """Read sorted slices into a volume; return it, its geometry, and how many acquisitions take turns along it.

    Raises:
        ValueError: when they are no even volume, or pixels cannot be decoded.
    """
    geometry = geometry_of(folder, slices, warn)
    warn_of_padding(folder, slices, warn)
    voxels = np.empty(geometry.shape, dtype=np.float32)
    stack = geometry.from_ras(voxels)  # a view of the same memory as (column, row, slice)
    place = {(one.path, one.frame): k for k, one in enumerate(slices)}
    for path, frame, stored in decoded_frames(slices):
        if (path, frame) in place:  # other frames of a file may be of another acquisition
            k = place[path, frame]
            stack[:, :, k] = to_hu(stored, slices[k]).T
    return voxels, geometry, period_of_slices(stack)


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
        needed = header.Rows * header.Columns * header.BitsAllocated // 8 * dicom_header.number_of_frames(header)
        if not dicom_header.is_compressed(header) and path.stat().st_size < needed:
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
    """Turn stored values, (rows, columns) int32, into float32 HU by the slice's own scale; padding becomes air."""
    hu = stored * np.float32(one.slope) + np.float32(one.intercept)
    if one.padding:
        hu[(stored >= one.padding[0]) & (stored <= one.padding[1])] = AIR_HU
    return hu


def decoded_frames(slices: Sequence[Slice]) -> Iterator[tuple[Path, int, np.ndarray]]:
    """Return the stored values of all frames of the slices' files: file, frame and (rows, columns) int32.

    Another process decodes what is compressed (core/scans/dicom_pixels.py says why).

    Raises:
        ValueError: naming the file whose pixels cannot be decoded.
    """
    files = {one.path: one.frames for one in slices}
    if not any(one.compressed for one in slices):
        for path, frames in files.items():
            try:
                yield from ((path, frame, stored) for frame, stored in enumerate(decode(path, frames)))
            except DECODE_ERRORS as error:
                raise ValueError(f"{path}: its pixels cannot be decoded ({reason_of(error)})") from error
        return
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
    """Return the next frame from the process that decodes, (rows, columns) int32.

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
