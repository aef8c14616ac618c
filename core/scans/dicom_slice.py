"""The slices of a CT volume that the header of a DICOM file describes, checked: places, scale, pixels.

    slices_of(path, header) -> Slice, Slice, ...

PS3.3 below is a part of the DICOM standard.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.pixels import get_decoder

from core.scans.dicom_header import (
    GROUP_OF,
    HEADER_TAGS,
    MARKS,
    Unfit,
    is_compressed,
    number_of_frames,
    printable,
    reason,
)
from core.scans.dicom_pixels import DECODE_ERRORS

HU_TYPES = ("", "HU", "US")  # RescaleType; "US" means not said, and CT without one is in HU (PS3.3 C.11.1.1.2)
UNIT_TOLERANCE = 1e-3  # by which direction cosines may be off unit length and right angles, as they are rounded


@dataclass(frozen=True)
class Slice:
    """One slice as its header describes it; lengths in mm, axes of the patient in LPS as in DICOM.

    Attributes:
        path: its file.
        frame: its number in the file, from 0.
        frames: how many the file has.
        compressed: True when a decoder in C must read the file's pixels.
        rows: extent down the columns, in pixels.
        columns: extent along the rows, in pixels.
        position: (3,), ImagePositionPatient: the centre of the first pixel.
        orientation: (2, 3), ImageOrientationPatient: directions along a row and down a column.
        spacing: PixelSpacing: between rows, between columns.
        slope: HU per stored value.
        intercept: HU of the stored value 0.
        padding: stored values, lowest and highest, that mean "not scanned"; None: no value does.
        same: what must be the same in all slices of a volume, by name.
        marks: what may tell acquisitions apart, by name: those of MARKS that the slice has.
    """

    path: Path
    frame: int
    frames: int
    compressed: bool
    rows: int
    columns: int
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float]
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    same: dict[str, str]
    marks: dict[str, str]


def slices_of(path: Path, header: Dataset) -> Iterator[Slice]:
    """Return the slices of a CT file.

    Raises:
        ValueError: naming the file and the attribute that is missing, or is not what it is in CT.
    """
    try:
        check_pixels(header)
        frames = number_of_frames(header)
        declared = int(header.get("NumberOfFrames") or 1)
        if frames != declared:
            raise Unfit(f"declares {declared} frames and describes {frames}")
        for frame in range(frames):
            yield slice_of(path, header, frame, frames)
    except DECODE_ERRORS as error:
        raise ValueError(f"{path}: {reason(error)}") from error


def slice_of(path: Path, header: Dataset, frame: int, frames: int) -> Slice:
    """Make one slice of a CT file from its header.

    Raises:
        Unfit: naming the attribute that is missing or wrong.
    """
    rescale_type = str(attribute(header, frame, "RescaleType") or "").strip()
    if rescale_type not in HU_TYPES:
        raise Unfit(f"RescaleType is {printable(rescale_type)}, expected HU")
    slope, intercept = (numbers(header, frame, keyword, 1)[0] for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope == 0:
        raise Unfit("RescaleSlope is 0, so that all voxels would be the same")
    orientation = numbers(header, frame, "ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=UNIT_TOLERANCE):
        raise Unfit("ImageOrientationPatient is no pair of unit vectors at a right angle")
    return Slice(
        path=path,
        frame=frame,
        frames=frames,
        compressed=is_compressed(header),
        rows=int(header.Rows),
        columns=int(header.Columns),
        position=numbers(header, frame, "ImagePositionPatient", 3),
        orientation=orientation,
        spacing=tuple(numbers(header, frame, "PixelSpacing", 2).tolist()),
        slope=float(slope),
        intercept=float(intercept),
        padding=padding_of(header),
        same={key: str(header.get(key) or "") for key in ("FrameOfReferenceUID", "PatientID")},
        marks=marks_of(header, frame),
    )


def marks_of(header: Dataset, frame: int) -> dict[str, str]:
    """Return what may tell the acquisition of a frame from others in the same series, by keyword."""
    marks = dict(header.marks)
    for keyword in MARKS:
        if keyword in HEADER_TAGS or (keyword in GROUP_OF and "PerFrameFunctionalGroupsSequence" in header):
            with suppress(*DECODE_ERRORS):  # damage to them does not matter
                value = attribute(header, frame, keyword)
                marks[keyword] = "" if value is None else str(value)
    return marks


def attribute(header: Dataset, frame: int, keyword: str) -> Any:
    """Return an attribute of a frame, from the file or an enhanced file's functional groups; None when absent."""
    if "PerFrameFunctionalGroupsSequence" not in header or keyword not in GROUP_OF:
        return header.get(keyword)
    shared = header.get("SharedFunctionalGroupsSequence") or ()
    for groups in (header.PerFrameFunctionalGroupsSequence[frame], *shared[:1]):
        group = groups.get(GROUP_OF[keyword])
        if group:
            return group[0].get(keyword)
    return None


def numbers(header: Dataset, frame: int, keyword: str, count: int) -> np.ndarray:
    """Return an attribute of `count` numbers, (count,) float64.

    Raises:
        Unfit: when it is missing, has another number of values, or one is not finite.
    """
    value = attribute(header, frame, keyword)
    if value is None or value == "":
        raise Unfit(f"has no {keyword}, so it cannot be placed or scaled as CT")
    values = np.atleast_1d(np.array(value, dtype=np.float64))
    if values.shape != (count,) or not np.isfinite(values).all():
        raise Unfit(f"{keyword} has the values {values.tolist()[:9]}, expected {count} finite number(s)")
    return values


def check_pixels(header: Dataset) -> None:
    """Refuse pixels that are not stored as those of CT are (PS3.3 A.3.3 and C.8.2.1), by the header alone.

    Raises:
        Unfit: naming the attribute.
    """
    expected = {
        "SamplesPerPixel": (1,),
        "PhotometricInterpretation": ("MONOCHROME2",),
        "BitsAllocated": (8, 16),
        "PixelRepresentation": (0, 1),
        "BitsStored": range(1, int(header.get("BitsAllocated") or 0) + 1),
        "HighBit": (int(header.get("BitsStored") or 0) - 1,),
    }
    for keyword, values in expected.items():
        if header.get(keyword) not in values:
            came = "missing" if header.get(keyword) is None else printable(str(header.get(keyword)))
            wanted = " or ".join(map(str, values)) if len(values) < 3 else f"{values[0]} to {values[-1]}"
            raise Unfit(f"{keyword} is {came}, expected {wanted}")
    if min(int(header.get("Rows") or 0), int(header.get("Columns") or 0)) < 1:
        raise Unfit("has no rows or columns")
    syntax = header.file_meta.TransferSyntaxUID
    try:
        available = syntax.is_private is False and get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise Unfit(f"nothing installed decodes its {printable(syntax.name)}; try: pip install python-gdcm")


def padding_of(header: Dataset) -> tuple[int, int] | None:
    """Return the stored values of PixelPaddingValue and PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2), or None.

    Writers mix up its signed and unsigned type, so it is wrapped into the pixels' own range.
    """
    ends = [header.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    span = 2 ** int(header.BitsAllocated)
    lowest = -span // 2 if header.PixelRepresentation == 1 else 0
    values = [(int(value) - lowest) % span + lowest for value in ends if value is not None]
    return min(values), max(values)
