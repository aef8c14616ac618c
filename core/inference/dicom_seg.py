"""A label map as DICOM Segmentation: a segment for each organ, on the slices of the series, for PACS and viewers.

Needs highdicom. Names of organs become SNOMED CT codes where DICOM lists one, with right and left as modifiers.
PS3.3 and PS3.16 below are parts of the DICOM standard.
"""

import hashlib
import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.scans.dicom_header import Unfit, decode_errors, reason
from core.scans.dicom_slice import Slice
from core.scans.geometry import Geometry
from core.scans.organ_colours import rgb_of
from core.scans.organ_words import OTHER_SIDE, standard_name
from core.system.files import whole_file

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.sr.coding import Code

MAKER, DESCRIPTION, SERIES_NUMBER = "Abdominal organ segmentation with V-Net", "Organs, segmented by V-Net", 9000
UTF_8 = "ISO_IR 192"  # as DICOM calls it
# What every object of a patient's study must have, but may be empty (PS3.3 C.7.1.1 and C.7.2.1).
MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
DATE, TIME = r"(\d{8})?", r"(\d{2,6}(\.\d+)?)?"
FORMS = {"PatientSex": "[MFO]?", "PatientBirthDate": DATE, "StudyDate": DATE, "StudyTime": TIME}  # others are emptied
REFERRED_TO = ("FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID")
OWN_CODES = "99ORGANS"  # the coding scheme of organs that DICOM has no code for; 99 marks private ones (PS3.3 8.2)


def write_segmentation(labels: np.ndarray, geometry: Geometry, organs: Sequence[str], network: str, path: Path) -> None:
    """Write labels, (X, Y, Z) ids, as a DICOM Segmentation; an organ's segment number is its id.

    Args:
        labels: in RAS+ order.
        geometry: of the DICOM series.
        organs: names by id, background first.
        network: fingerprint of the network that made them, in hexadecimal.
        path: the file.

    Raises:
        OSError: when the file cannot be written.
        ValueError: when the series lacks what the object must copy from it.
    """
    import highdicom

    logging.getLogger("highdicom").setLevel(logging.ERROR)  # or it tells that no organ was found
    warnings.filterwarnings("ignore", module="highdicom")  # of the patient's name, which must not be printed
    stack = geometry.from_ras(labels).transpose(2, 1, 0)  # (slice, row, column)
    try:
        sources, frames = read_sources(geometry.slices)
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=np.ascontiguousarray(stack[frames]),
            segmentation_type="BINARY",
            segment_descriptions=[describe(organ, name, network) for organ, name in enumerate(organs) if organ],
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name="V-Net",
            software_versions=network or "unknown",
            device_serial_number="none",
            content_label="ORGANS",
            series_description=DESCRIPTION,
        )
    except decode_errors() as error:
        raise ValueError(f"no DICOM Segmentation can be made of this series ({reason(error)})") from error
    segmentation.SpecificCharacterSet = UTF_8
    save(segmentation, path)


def save(made: "Dataset", path: Path) -> None:
    """Write a DICOM object, whole.

    Raises:
        OSError: when the file cannot be written.
        ValueError: when a value that was copied from the series cannot be.
    """
    try:
        with whole_file(path) as temporary:
            made.save_as(temporary, enforce_file_format=True)
    except OSError:
        raise
    except decode_errors() as error:
        raise ValueError(f"{path.name}: a value of the series cannot be written ({reason(error)})") from error


def read_sources(slices: Sequence[Slice]) -> tuple[list["Dataset"], list[int]]:
    """Read the headers of the slices' files; return them, and for each of their frames the number of its slice."""
    sources = {one.path: read_source(one.path) for one in slices}
    for header in sources.values():
        if not header.get("SliceThickness"):
            header.SliceThickness = float(np.linalg.norm(slices[1].position - slices[0].position))
    order = sorted(range(len(slices)), key=lambda k: (list(sources).index(slices[k].path), slices[k].frame))
    return list(sources.values()), order


def read_source(path: Path) -> "Dataset":
    """Read a file's header; empty what anonymisation left invalid, and fill in what DICOM requires.

    Raises:
        Unfit: when it lacks what the result must refer to.
    """
    import pydicom

    header = pydicom.dcmread(path, stop_before_pixels=True)
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


def describe(organ: int, name: str, network: str) -> "Dataset":
    """Describe the segment of an organ: name, code, colour, and the network that found it."""
    import highdicom
    from pydicom.sr.codedict import codes

    kind, side = code_of(name)
    made_by = highdicom.AlgorithmIdentificationSequence("V-Net", codes.DCM.ArtificialIntelligence, network or "unknown")
    segment = highdicom.seg.SegmentDescription(
        segment_number=organ,
        segment_label=as_text(name),
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=kind,
        algorithm_type="AUTOMATIC",
        algorithm_identification=made_by,
        display_color=highdicom.color.CIELabColor.from_rgb(*rgb_of(organ)),
    )
    if side:
        modifier = highdicom.sr.CodedConcept(side.value, side.scheme_designator, side.meaning)
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return segment


def as_text(name: str) -> str:
    """Return a name as a text of DICOM: at most 64 characters, and no backslash, which would end it."""
    return name.replace("\\", "/")[:64]


def code_of(name: str) -> tuple["Code", "Code | None"]:
    """Return the code of an organ, and that of its side; a private code for an organ that DICOM does not list."""
    from pydicom.sr.codedict import Code, codes

    words = re.findall(r"[^\W_]+", standard_name(name).casefold())
    sides = [word for word in words if word in OTHER_SIDE]
    keyword = "".join(word.capitalize() for word in words if word not in OTHER_SIDE)
    try:
        kind = getattr(codes.SCT, keyword)
    except AttributeError:
        return Code(hashlib.sha1(name.encode()).hexdigest()[:16], OWN_CODES, as_text(name)), None
    return kind, getattr(codes.SCT, sides[0].capitalize()) if len(sides) == 1 else None
