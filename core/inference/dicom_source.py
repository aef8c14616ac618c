"""Make DICOM results belong to their series: copy its attributes, refer to its slices, save.

PS3.3 below is a part of the DICOM standard.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom import Dataset

from core.scans.dicom_header import DECODE_ERRORS, Unfit, name_transfer_syntax, open_dicom, reason
from core.scans.dicom_slice import Slice

MAKER, DESCRIPTION, SERIES_NUMBER = "Abdominal organ segmentation with V-Net", "Organs, segmented by V-Net", 9000
UTF_8 = "ISO_IR 192"  # as DICOM calls it
MAX_CHARACTERS = 64  # of a name (PS3.5 6.2, LO)
# What every object of a patient's study must have, but may be empty (PS3.3 C.7.1.1 and C.7.2.1).
MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
DATE, TIME = r"(\d{8})?", r"(\d{2,6}(\.\d+)?)?"
FORMS = {"PatientSex": "[MFO]?", "PatientBirthDate": DATE, "StudyDate": DATE, "StudyTime": TIME}  # others are emptied
REFERRED_TO = ("FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID")


def read_sources(slices: Sequence[Slice]) -> dict[Path, Dataset]:
    """Read the headers of the slices' files, by path, as `read_source`.

    Raises:
        ValueError: when a file lacks what results must refer to, or two files have the same identity.
    """
    sources = {}
    for path in dict.fromkeys(one.path for one in slices):
        try:
            sources[path] = read_source(path)
        except DECODE_ERRORS as error:
            raise ValueError(f"no DICOM object can refer to {path}: {reason(error)}") from error
    if len({source.SOPInstanceUID for source in sources.values()}) < len(sources):
        raise ValueError(
            f"no DICOM object can refer to the slices in {slices[0].path.parent}: two have the same SOPInstanceUID"
        )
    return sources


def read_source(path: Path) -> Dataset:
    """Read a file's header; empty what anonymisation left invalid, and fill in what DICOM requires.

    Raises:
        Unfit: when it lacks what the result must refer to.
    """
    with open_dicom(path) as file:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    name_transfer_syntax(header)
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if not header.get(keyword):
            setattr(header, keyword, header.file_meta.get(f"MediaStorage{keyword}", ""))
    for keyword in REFERRED_TO:
        if not header.get(keyword):
            raise Unfit(f"it has no {keyword}")
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        if not header.get(keyword):  # one of its own, the same for all slices and results
            entropy = [keyword, str(header.FrameOfReferenceUID)]
            setattr(header, keyword, pydicom.uid.generate_uid(entropy_srcs=entropy))
    header.decode()
    header.SpecificCharacterSet = UTF_8  # an organ's name may need more letters than the patient's
    for keyword in MAY_BE_EMPTY:
        if not re.fullmatch(FORMS.get(keyword, ".*"), str(header.get(keyword) or "")):
            header[keyword].value = None
        if keyword not in header:
            setattr(header, keyword, None)
    return header


def reference_to(source: Dataset, one: Slice) -> Dataset:
    """Make a reference to a slice, by its file and, in a file of several, its frame."""
    reference = item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)
    if one.frames > 1:
        reference.ReferencedFrameNumber = one.frame + 1
    return reference


def item(**attributes: Any) -> Dataset:
    """Make a DICOM data set of attributes by keyword."""
    made = Dataset()
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made


def as_text(name: str) -> str:
    """Return a name as a text of DICOM: MAX_CHARACTERS at most, and no backslash, which would end it."""
    return name.replace("\\", "/")[:MAX_CHARACTERS]


def save(made: Dataset, path: Path) -> None:
    """Write a DICOM object.

    Raises:
        OSError: when the file cannot be written.
        ValueError: when a value that was copied from the series cannot be.
    """
    try:
        made.save_as(path, enforce_file_format=True)
    except OSError:
        raise
    except DECODE_ERRORS as error:
        raise ValueError(f"no DICOM object can hold a value of the series ({reason(error)})") from error
