"""A label map as RT Structure Set: closed contours of each organ in mm, slice by slice, for treatment planning systems.

A contour runs half a voxel outside of the outermost voxels' centres, so that it encloses exactly the organ's voxels.
Holes are contours of their own: what lies within an even number of an organ's contours is not the organ.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from core.inference import dicom_source
from core.scans.dicom_header import DECODE_ERRORS, reason
from core.scans.dicom_slice import Slice
from core.scans.geometry import Geometry
from core.scans.organ_colours import rgb_of

RT_STRUCTURE_SET, STUDY_CLASS = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.3.1.2.3.1"
COPIED = (*dicom_source.MAY_BE_EMPTY, "StudyInstanceUID", "FrameOfReferenceUID", "PositionReferenceIndicator")


def write_structures(labels: np.ndarray, geometry: Geometry, organs: Sequence[str], network: str, path: Path) -> None:
    """Write labels, (X, Y, Z) ids, as an RT Structure Set; an organ's ROI number is its id.

    An organ that was not found has no contours.

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
    stack = geometry.from_ras(labels).transpose(2, 1, 0)  # (slice, row, column)
    sources = dicom_source.read_sources(geometry.slices)
    try:
        source = sources[geometry.slices[0].path]
        images = [dicom_source.reference_to(sources[one.path], one) for one in geometry.slices]
        structures = structure_set(source, images, network)
        for organ, name in enumerate(organs[1:], start=1):
            add_organ(structures, organ, name, list(contours_of(stack == organ, geometry.slices, images)))
    except DECODE_ERRORS as error:
        raise ValueError(f"no RT Structure Set can be made of this series ({reason(error)})") from error
    dicom_source.save(structures, path)


def structure_set(source: Dataset, images: Sequence[Dataset], network: str) -> Dataset:
    """Make a structure set without organs, of a slice's patient and study, that refers to all slices."""
    now = datetime.now()
    series = dicom_source.item(SeriesInstanceUID=source.SeriesInstanceUID, ContourImageSequence=images)
    study = dicom_source.item(ReferencedSOPClassUID=STUDY_CLASS, ReferencedSOPInstanceUID=source.StudyInstanceUID)
    study.RTReferencedSeriesSequence = [series]
    frame = dicom_source.item(FrameOfReferenceUID=source.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    structures = dicom_source.item(
        **{keyword: source.get(keyword) for keyword in COPIED},
        SpecificCharacterSet=dicom_source.UTF_8,
        SOPClassUID=RT_STRUCTURE_SET,
        SOPInstanceUID=generate_uid(),
        Modality="RTSTRUCT",
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=dicom_source.SERIES_NUMBER,
        SeriesDescription=dicom_source.DESCRIPTION,
        InstanceNumber=1,
        Manufacturer=dicom_source.MAKER,
        SoftwareVersions=network or "unknown",
        OperatorsName=None,
        ApprovalStatus="UNAPPROVED",
        StructureSetLabel="ORGANS",
        StructureSetDate=now.strftime("%Y%m%d"),
        StructureSetTime=now.strftime("%H%M%S"),
        ReferencedFrameOfReferenceSequence=[frame],
        StructureSetROISequence=[],
        ROIContourSequence=[],
        RTROIObservationsSequence=[],
    )
    structures.file_meta = FileMetaDataset()
    # Explicit VR holds no contour of more than 65,534 bytes.
    structures.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return structures


def add_organ(structures: Dataset, organ: int, name: str, contours: Sequence[Dataset]) -> None:
    """Add an organ and its contours to a structure set."""
    frame = structures.FrameOfReferenceUID
    structures.StructureSetROISequence.append(
        dicom_source.item(
            ROINumber=organ,
            ReferencedFrameOfReferenceUID=frame,
            ROIName=dicom_source.as_text(name),
            ROIGenerationAlgorithm="AUTOMATIC",
        )
    )
    drawn = dicom_source.item(ReferencedROINumber=organ, ROIDisplayColor=list(rgb_of(organ)))
    if contours:
        drawn.ContourSequence = contours
    structures.ROIContourSequence.append(drawn)
    structures.RTROIObservationsSequence.append(
        dicom_source.item(
            ObservationNumber=organ, ReferencedROINumber=organ, RTROIInterpretedType="ORGAN", ROIInterpreter=None
        )
    )


def contours_of(mask: np.ndarray, slices: Sequence[Slice], images: Sequence[Dataset]) -> Iterator[Dataset]:
    """Return the contours of a mask, (slice, row, column), slice by slice, each with a reference to its image."""
    from skimage.measure import find_contours

    for k in np.flatnonzero(mask.any(axis=(1, 2))):
        one = slices[k]
        row_mm, column_mm = one.spacing
        along_row, down_column = one.orientation
        # A border of background, so that contours close where an organ ends with the image.
        for contour in find_contours(np.pad(mask[k], 1).astype(np.uint8), 0.5):
            rows, columns = without_straight_points(contour[:-1] - 1).T
            points = one.position + np.outer(columns * column_mm, along_row) + np.outer(rows * row_mm, down_column)
            yield dicom_source.item(
                ContourImageSequence=[images[k]],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(points),
                ContourData=[f"{mm:.4f}" for mm in points.ravel()],
            )


def without_straight_points(contour: np.ndarray) -> np.ndarray:
    """Return a closed contour, (N, 2), without the points at which it goes straight on."""
    before, after = contour - np.roll(contour, 1, axis=0), np.roll(contour, -1, axis=0) - contour
    return contour[np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 0]
