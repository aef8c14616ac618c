"""Read the header of one DICOM file: is it a slice of a CT volume, and at which position.

    read_header(path) -> pydicom's Dataset without pixels       -> kind_of, slices_of -> Slice, Slice, ...

Headers are hostile until they are checked. PS3.3, PS3.5 and PS3.10 below are parts of the DICOM standard. Names, dates
and numbers of a patient appear in no message.
"""

import logging
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.scans.dicom_pixels import decode_errors

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

INSTALL = "pip install pydicom python-gdcm"
PREAMBLE_BYTES, MAGIC = 128, b"DICM"  # PS3.10 7.1: what every DICOM file begins with
META_GROUP = 2  # of the elements between them and the dataset itself
PIXEL_DATA_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")  # (7FE0,0010), little and big endian
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = (f"{CT_IMAGE}.1", f"{CT_IMAGE}.2")  # multi-frame: as acquired, and converted from single slices
DEFLATED = "1.2.840.10008.1.2.1.99"
# Which functional group of an enhanced multi-frame file holds an attribute (PS3.3 C.7.6.16.2).
GROUP_OF = {
    "PixelSpacing": "PixelMeasuresSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
}
HEADER_TAGS = [
    *("SOPClassUID", "ImageType", "Modality", "SeriesDescription", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("PatientID", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", *GROUP_OF),
]
HU_TYPES = ("", "HU", "US")  # RescaleType; "US" means not said, and CT without one is in HU (PS3.3 C.11.1.1.2)
MAX_INFLATED_BYTES = 2**30  # of a deflated file, which may be a thousandth of it
UNIT_TOLERANCE = 1e-3  # by which direction cosines may be off unit length and right angles, as they are rounded
SHOWN_CHARACTERS = 100  # of an attribute in a message: a whole UID, or the longest name of a transfer syntax


@dataclass(frozen=True)
class Slice:
    """One slice as its header describes it; lengths in mm, axes of the patient in LPS as in DICOM.

    Attributes:
        path: its file.
        frame: its number in the file, from 0.
        frames: how many the file has.
        rows: extent down the columns, in pixels.
        columns: extent along the rows, in pixels.
        position: (3,), ImagePositionPatient: the centre of the first pixel.
        orientation: (2, 3), ImageOrientationPatient: directions along a row and down a column.
        spacing: PixelSpacing: between rows, between columns.
        slope: HU per stored value.
        intercept: HU of the stored value 0.
        padding: stored values, lowest and highest, that mean "not scanned"; None: no value does.
        same: what must be the same in all slices of a volume, by name.
    """

    path: Path
    frame: int
    frames: int
    rows: int
    columns: int
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float]
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    same: dict[str, str]


class Unfit(ValueError):
    """Fault of a file, in this module's own words; other messages are not shown, as they may quote the patient."""


def reason(error: Exception) -> str:
    """Why a file was refused, in words that are safe to show."""
    return str(error) if isinstance(error, Unfit) else f"its header is damaged: {type(error).__name__}"


def is_dicom(path: Path) -> bool:
    """Return True when a file begins as DICOM files do."""
    with open(path, "rb") as file:
        return file.read(PREAMBLE_BYTES + len(MAGIC))[PREAMBLE_BYTES:] == MAGIC


def import_pydicom() -> Any:
    """Import pydicom without its warnings, which may contain a patient's data.

    Raises:
        ValueError: when it is not installed.
    """
    try:
        import pydicom
        from pydicom import config, pixels  # noqa: F401
    except ImportError as error:
        raise ValueError(f"reading DICOM needs packages that are not installed: {INSTALL}") from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module="pydicom")
    config.settings.reading_validation_mode = config.IGNORE
    return pydicom


def read_header(path: Path) -> "Dataset":
    """Read from a file's header what this module needs, without the pixels.

    Raises:
        ValueError: when it cannot be read, or ends before the pixels.
    """
    pydicom = import_pydicom()
    try:
        check_inflated_size(path)
        with open(path, "rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=HEADER_TAGS)
            at_pixels = file.read(len(PIXEL_DATA_TAGS[0])) in PIXEL_DATA_TAGS
        header.decode()
        storage = storage_class(header)
        kind_of(header), number_of_frames(header)  # here, where a damaged attribute is named with its file
    except decode_errors() as error:
        raise ValueError(f"{path}: is no whole DICOM file ({reason(error)}); copy it again or remove it") from error
    cut = not at_pixels and header.file_meta.get("TransferSyntaxUID") != DEFLATED
    if not storage or (cut and storage in (CT_IMAGE, *ENHANCED_CT)):
        raise ValueError(f"{path}: ends before its pixels, so a slice may be missing; copy it again or remove it")
    return header


def check_inflated_size(path: Path) -> None:
    """Refuse a deflated file that would take too much memory before it is inflated; others pass.

    Raises:
        Unfit, zlib.error: when it is too large, or broken.
    """
    from pydicom.filereader import read_dataset

    size, inflate = 0, zlib.decompressobj(-zlib.MAX_WBITS)
    with open(path, "rb") as file:
        # The meta information, by the call that dcmread makes, so that both find its end at the same place.
        file.seek(PREAMBLE_BYTES + len(MAGIC))
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != META_GROUP)
        meta.decode()
        if meta.get("TransferSyntaxUID") != DEFLATED:
            return
        while not inflate.eof:
            compressed = inflate.unconsumed_tail or file.read(2**20)
            inflated = len(inflate.decompress(compressed, 2**24))
            if not compressed and not inflated:
                raise Unfit("its deflated data are cut off")
            size += inflated
            if size > MAX_INFLATED_BYTES:
                raise Unfit(f"inflates to more than {MAX_INFLATED_BYTES / 2**30:g} GiB")


def kind_of(header: "Dataset") -> str | None:
    """Describe a file that is not a slice of a CT volume; return None for a slice."""
    storage, modality = storage_class(header), text(header, "Modality")
    if modality != "CT" or storage not in (CT_IMAGE, *ENHANCED_CT):
        return f"{modality or 'no modality'} ({printable(storage.name) or 'no storage class'})"
    if "LOCALIZER" in text(header, "ImageType"):
        return "CT localizer"
    return None


def storage_class(header: "Dataset") -> "UID":
    """Return what kind of object a file is; anonymizers may empty it in the dataset."""
    from pydicom.uid import UID

    return UID(str(header.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID") or ""))


def text(header: "Dataset", keyword: str) -> str:
    """Return a text attribute in printable characters; empty when it is absent."""
    value = header.get(keyword)
    return printable("" if value is None else str(value))


def description_of(header: "Dataset") -> str:
    """Return SeriesDescription if it is plain text, else nothing: a damaged one may run on into other attributes."""
    value = header.get("SeriesDescription")
    return printable(value) if isinstance(value, str) and value.isprintable() else ""


def printable(value: str) -> str:
    """Return text from a file in the form that a message may show."""
    shown = value[:SHOWN_CHARACTERS]
    return "".join(character if character.isprintable() else " " for character in shown).strip()


def number_of_frames(header: "Dataset") -> int:
    """Return the number of slices of a CT file; enhanced files have a functional group for each."""
    if storage_class(header) in ENHANCED_CT:
        return len(header.get("PerFrameFunctionalGroupsSequence") or ())
    return 1


def slices_of(path: Path, header: "Dataset") -> Iterator[Slice]:
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
    except decode_errors() as error:
        raise ValueError(f"{path}: {reason(error)}") from error


def slice_of(path: Path, header: "Dataset", frame: int, frames: int) -> Slice:
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
        rows=int(header.Rows),
        columns=int(header.Columns),
        position=numbers(header, frame, "ImagePositionPatient", 3),
        orientation=orientation,
        spacing=tuple(numbers(header, frame, "PixelSpacing", 2).tolist()),
        slope=float(slope),
        intercept=float(intercept),
        padding=padding_of(header),
        same={key: str(header.get(key) or "") for key in ("FrameOfReferenceUID", "PatientID")},
    )


def attribute(header: "Dataset", frame: int, keyword: str) -> Any:
    """Return an attribute of a frame, from the file or an enhanced file's functional groups; None when absent."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        return header.get(keyword)
    shared = header.get("SharedFunctionalGroupsSequence") or ()
    for groups in (header.PerFrameFunctionalGroupsSequence[frame], *shared[:1]):
        group = groups.get(GROUP_OF[keyword])
        if group:
            return group[0].get(keyword)
    return None


def numbers(header: "Dataset", frame: int, keyword: str, count: int) -> np.ndarray:
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


def check_pixels(header: "Dataset") -> None:
    """Refuse pixels that are not stored as those of CT are (PS3.3 A.3.3 and C.8.2.1), by the header alone.

    Raises:
        Unfit: naming the attribute.
    """
    from pydicom.pixels import get_decoder

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
        raise Unfit(f"nothing installed decodes its {printable(syntax.name)}; try: {INSTALL}")


def padding_of(header: "Dataset") -> tuple[int, int] | None:
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
