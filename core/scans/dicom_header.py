"""Read the header of one DICOM file, and say whether it is a slice of a CT volume.

    read_header(path) -> pydicom's Dataset without pixels       -> kind_of; core/scans/dicom_slice.py makes its slices

Headers are hostile until they are checked. PS3.3, PS3.5 and PS3.10 below are parts of the DICOM standard. Names, dates
and numbers of a patient appear in no message.
"""

import logging
import warnings
from pathlib import Path

import pydicom
from pydicom import Dataset, config
from pydicom.tag import Tag
from pydicom.uid import UID

from core.scans.dicom_pixels import DECODE_ERRORS, HEAD_BYTES, dataset_start, name_transfer_syntax, open_dicom

# pydicom's warnings may contain a patient's data.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="pydicom")
config.settings.reading_validation_mode = config.IGNORE

PIXEL_DATA_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")  # (7FE0,0010), little and big endian
ENCAPSULATED = b"\xff\xff\xff\xff"  # in place of the length of compressed pixels (PS3.5 A.4)
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
    "ConvolutionKernel": "CTReconstructionSequence",
    "KVP": "CTXRayDetailsSequence",
    "FrameType": "CTImageFrameTypeSequence",
    **dict.fromkeys(
        ("FrameAcquisitionNumber", "FrameAcquisitionDateTime", "FrameReferenceDateTime", "TemporalPositionIndex"),
        "FrameContentSequence",
    ),
}
# What may tell the acquisitions under one SeriesInstanceUID apart, in the order in which it is tried.
TIMES = (
    *("AcquisitionDateTime", "AcquisitionTime", "FrameAcquisitionDateTime", "FrameReferenceDateTime", "ContentTime"),
    *("InstanceCreationTime", "TriggerTime"),
)
MARKS = (
    *("AcquisitionNumber", "FrameAcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex"),
    *("ConvolutionKernel", "ContrastBolusAgent", "ContrastBolusStartTime", "KVP", "ImageType", "FrameType"),
    *("SeriesNumber", "SeriesDescription", "SeriesTime", "ProtocolName", "ScanOptions", "FilterType", "SliceThickness"),
    *("XRayTubeCurrent", "Exposure"),
    *TIMES,
    "InstanceNumber",
)
HEADER_TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "ImageType", "Modality", "SeriesDescription", "SeriesInstanceUID"),
    *("FrameOfReferenceUID", "PatientID", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows"),
    *("Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(keyword for keyword in GROUP_OF if keyword not in MARKS),
]
MARK_TAGS = [mark for mark in MARKS if mark not in HEADER_TAGS]  # damage to them does not matter
SHOWN_CHARACTERS = 100  # of an attribute in a message: a whole UID, or the longest name of a transfer syntax


class Unfit(ValueError):
    """Fault of a file, in this module's own words; other messages are not shown, as they may quote the patient."""


def reason(error: Exception) -> str:
    """Return why a file was refused, in words that are safe to show."""
    return str(error) if isinstance(error, Unfit) else f"its header is damaged: {type(error).__name__}"


def is_dicom(path: Path) -> bool:
    """Return True when a file begins as DICOM files do, with or without the preamble."""
    with open(path, "rb") as file:
        return dataset_start(file.read(HEAD_BYTES)) is not None


def read_header(path: Path) -> Dataset:
    """Read from a file's header what this module needs, without the pixels.

    Raises:
        ValueError: when it cannot be read, or ends before the pixels.
    """
    try:
        with open_dicom(path) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*HEADER_TAGS, *MARK_TAGS])
            at_pixels = file.read(len(PIXEL_DATA_TAGS[0])) in PIXEL_DATA_TAGS
            length = file.read(4 if header.original_encoding[0] else 8)[-4:]
        name_transfer_syntax(header)
        if at_pixels and length == ENCAPSULATED and not header.file_meta.TransferSyntaxUID.is_compressed:
            raise Unfit("its pixels are compressed and it does not say how")
        header.marks = take_marks(header)
        header.decode()
        storage = storage_class(header)
        kind_of(header), number_of_frames(header)  # here, where a damaged attribute is named with its file
    except DECODE_ERRORS as error:
        raise ValueError(f"{path}: is no whole DICOM file ({reason(error)}); copy it again or remove it") from error
    cut = not at_pixels and header.file_meta.TransferSyntaxUID != DEFLATED
    if not storage and at_pixels:
        raise ValueError(f"{path}: does not say what kind of image it is (SOPClassUID); export it again or remove it")
    if not storage or (cut and storage in (CT_IMAGE, *ENHANCED_CT)):
        raise ValueError(f"{path}: ends before its pixels, so a slice may be missing; copy it again or remove it")
    return header


def is_compressed(header: Dataset) -> bool:
    """Return True when a file's pixels, or all of its elements, are compressed."""
    syntax = header.file_meta.TransferSyntaxUID
    return syntax.is_compressed or syntax == DEFLATED


def take_marks(header: Dataset) -> dict[str, str]:
    """Take the elements of MARK_TAGS out of a header, and return them as they are written, by keyword.

    They are not converted: a number that is damaged here is no reason to refuse the slice.
    """
    marks = {}
    for keyword in MARK_TAGS:
        element = header.get_item(Tag(keyword))
        if element is not None:
            value = element.value
            marks[keyword] = (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)).strip(" \0")
            del header[Tag(keyword)]
    return marks


def kind_of(header: Dataset) -> str | None:
    """Describe a file that is not a slice of a CT volume; return None for a slice."""
    storage, modality = storage_class(header), text(header, "Modality")
    if modality != "CT" or storage not in (CT_IMAGE, *ENHANCED_CT):
        return f"{modality or 'no modality'} ({printable(storage.name) or 'no storage class'})"
    if "LOCALIZER" in text(header, "ImageType"):
        return "CT localizer"
    return None


def storage_class(header: Dataset) -> UID:
    """Return what kind of object a file is; anonymizers may empty it in the dataset."""
    return UID(str(header.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID") or ""))


def text(header: Dataset, keyword: str) -> str:
    """Return a text attribute in printable characters; empty when it is absent."""
    value = header.get(keyword)
    return printable("" if value is None else str(value))


def description_of(header: Dataset) -> str:
    """Return SeriesDescription if it is plain text, else nothing: a damaged one may run on into other attributes."""
    value = header.get("SeriesDescription")
    return printable(value) if isinstance(value, str) and value.isprintable() else ""


def printable(value: str) -> str:
    """Return text from a file in the form that a message may show."""
    shown = value[:SHOWN_CHARACTERS]
    return "".join(character if character.isprintable() else " " for character in shown).strip()


def number_of_frames(header: Dataset) -> int:
    """Return the number of slices of a CT file; enhanced files have a functional group for each."""
    if storage_class(header) in ENHANCED_CT:
        return len(header.get("PerFrameFunctionalGroupsSequence") or ())
    return 1
