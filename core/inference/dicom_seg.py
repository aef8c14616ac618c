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

import numpy as np
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from core.inference import dicom_source
from core.scans.dicom_header import CT_IMAGE, DECODE_ERRORS, reason
from core.scans.dicom_slice import Slice
from core.scans.geometry import Geometry
from core.scans.organ_colours import rgb_of
from core.scans.organ_words import OTHER_SIDE, standard_name

OWN_CODES = "99ORGANS"  # the coding scheme of organs that DICOM has no code for; 99 marks private ones (PS3.3 8.2)
ABOUT = {
    "manufacturer": dicom_source.MAKER,
    "manufacturer_model_name": "V-Net",
    "device_serial_number": "none",
    "content_label": "ORGANS",
    "series_description": dicom_source.DESCRIPTION,
    "series_number": dicom_source.SERIES_NUMBER,
    "instance_number": 1,
}
OF_SEVERAL_FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames")
# Words of a name that is no organ, but a disease in it.
LESIONS = {"tumor", "tumour", "lesion", "cyst", "metastasis", "metastases", "cancer", "carcinoma", "nodule", "mass"}


def write_segmentation(labels: np.ndarray, geometry: Geometry, organs: Sequence[str], network: str, path: Path) -> None:
    """Write labels, (X, Y, Z) ids, as a DICOM Segmentation; an organ's segment number is its id.

    Args:
        labels: in RAS+ order.
        geometry: of the DICOM series.
        organs: names by id, background first.
        network: fingerprint of the network and options that made them.
        path: the file.

    Raises:
        OSError: when the file cannot be written.
        ValueError: when the series lacks what the object must copy from it.
    """
    import highdicom

    logging.getLogger("highdicom").setLevel(logging.ERROR)  # or it tells that no organ was found
    warnings.filterwarnings("ignore", module="highdicom")  # of the patient's name, which must not be printed
    stack = geometry.from_ras(labels).transpose(2, 1, 0)  # (slice, row, column)
    # DICOM knows no segmentation without a frame: where no organ was found, those of the first slice are empty.
    slices = geometry.slices if stack.any() else geometry.slices[:1]
    sources = dicom_source.read_sources(geometry.slices)
    gap_mm = float(np.linalg.norm(geometry.slices[1].position - geometry.slices[0].position))
    segments = [describe(organ, name, network) for organ, name in enumerate(organs) if organ]
    stand_ins = [as_single_slice(sources[one.path], one, gap_mm) for one in slices]
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=stand_ins,
            pixel_array=np.ascontiguousarray(stack[: len(slices)]),
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            sop_instance_uid=highdicom.UID(),
            **ABOUT,
            software_versions=network or "unknown",
        )
    except DECODE_ERRORS as error:
        raise ValueError(f"no DICOM Segmentation can be made of this series ({reason(error)})") from error
    refer_to(segmentation, stand_ins, [dicom_source.reference_to(sources[one.path], one) for one in slices])
    segmentation.SpecificCharacterSet = dicom_source.UTF_8
    dicom_source.save(segmentation, path)


def as_single_slice(source: Dataset, one: Slice, gap_mm: float) -> Dataset:
    """Return a slice's header as that of a file of its own, with an identity that `refer_to` replaces.

    highdicom accepts one multi-frame file, of one acquisition, or files of one slice; series are of all kinds.
    """
    header = dicom_source.item(
        SOPClassUID=CT_IMAGE,
        SOPInstanceUID=generate_uid(),
        ImagePositionPatient=[f"{mm:.10g}" for mm in one.position],
        ImageOrientationPatient=[f"{cosine:.10g}" for cosine in one.orientation.ravel()],
        PixelSpacing=[f"{mm:.10g}" for mm in one.spacing],
        SliceThickness=source.get("SliceThickness") or f"{gap_mm:.10g}",
    )
    for element in source:
        if element.tag not in header and element.keyword not in OF_SEVERAL_FRAMES:
            header.add(element)
    return header


def refer_to(segmentation: Dataset, stand_ins: Sequence[Dataset], slices: Sequence[Dataset]) -> None:
    """Put references to the slices in place of those to their stand-ins."""
    references = {one.SOPInstanceUID: reference for one, reference in zip(stand_ins, slices, strict=True)}
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        for derivation in groups.get("DerivationImageSequence") or ():
            for image in derivation.SourceImageSequence:
                # The organs' frames of a slice share one item, in which it is done already.
                image.update(references.get(image.ReferencedSOPInstanceUID, {}))
    files = {one.ReferencedSOPInstanceUID: one.ReferencedSOPClassUID for one in slices}
    segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence = [
        dicom_source.item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=uid) for uid, kind in files.items()
    ]


def describe(organ: int, name: str, network: str) -> Dataset:
    """Describe the segment of an organ: name, code, colour, and the network that found it."""
    import highdicom

    kind, side = code_of(name)
    made_by = highdicom.AlgorithmIdentificationSequence("V-Net", codes.DCM.ArtificialIntelligence, network or "unknown")
    segment = highdicom.seg.SegmentDescription(
        segment_number=organ,
        segment_label=dicom_source.as_text(name),
        segmented_property_category=category_of(name),
        segmented_property_type=kind,
        algorithm_type="AUTOMATIC",
        algorithm_identification=made_by,
        display_color=highdicom.color.CIELabColor.from_rgb(*rgb_of(organ)),
    )
    if side:
        modifier = highdicom.sr.CodedConcept(side.value, side.scheme_designator, side.meaning)
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return segment


def category_of(name: str) -> Code:
    """Return the code of what a name is: an organ, or a disease in it."""
    words = set(re.findall(r"[^\W_]+", name.casefold()))
    return codes.SCT.MorphologicallyAbnormalStructure if words & LESIONS else codes.SCT.AnatomicalStructure


def code_of(name: str) -> tuple[Code, Code | None]:
    """Return the code of an organ, and that of its side; a private code for an organ that DICOM does not list."""
    words = re.findall(r"[^\W_]+", standard_name(name).casefold())
    sides = [word for word in words if word in OTHER_SIDE]
    keyword = "".join(word.capitalize() for word in words if word not in OTHER_SIDE)
    try:
        kind = getattr(codes.SCT, keyword)
    except AttributeError:
        return Code(hashlib.sha1(name.encode()).hexdigest()[:16], OWN_CODES, dicom_source.as_text(name)), None
    return kind, getattr(codes.SCT, sides[0].capitalize()) if len(sides) == 1 else None
