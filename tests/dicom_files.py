"""DICOM series that tests write, and the place of a real one."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "dicom" / "pelvis_jpeg2000"
CT_IMAGE, ENHANCED_CT, MR_IMAGE, RT_STRUCTURES = (
    f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "2.1", "4", "481.3")
)
ROWS, COLUMNS, SLICES = 6, 8, 4  # all different, so that no two axes can be mixed up
SECRET = "SECRET"  # in all that names the patient; must never be printed


def stored_values(k: int) -> np.ndarray:
    """Return what slice k stores, (rows, columns): every voxel of the volume another value."""
    return (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 100 * k + 1000).astype(np.uint16)


def make_slice(k: int, **changes: object) -> Dataset:
    """Make slice k of an axial series: in mm 0.5 between rows, 0.8 columns, 2.5 slices; HU = stored - 1024."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = CT_IMAGE
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = f"1.2.3.{k + 1}"
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.PatientName, one.PatientID, one.PatientBirthDate = f"{SECRET}^NAME", f"{SECRET}-ID", "19700101"
    one.Modality, one.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    one.SeriesInstanceUID, one.SeriesDescription, one.FrameOfReferenceUID = "1.2.3.4", "Abdomen", "1.2.9"
    one.StudyInstanceUID = "1.2.8"
    one.ImagePositionPatient, one.ImageOrientationPatient = [-10, -20, 30 + 2.5 * k], [1, 0, 0, 0, 1, 0]
    one.PixelSpacing, one.RescaleSlope, one.RescaleIntercept = [0.5, 0.8], 1, -1024
    one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 12, 11, 0
    one.PixelData = stored_values(k).tobytes()
    one["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        if value is None:
            delattr(one, keyword)
        else:
            setattr(one, keyword, value)
    return one


def make_series(count: int = SLICES, **changes: object) -> list[Dataset]:
    return [make_slice(k, **changes) for k in range(count)]


def write(folder: Path, slices: list[Dataset], name: str = "IM") -> Path:
    """Write slices so that neither the names' order nor the instance numbers are those of the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, one in enumerate(slices):
        one.InstanceNumber = 7 * k % 5
        syntax = one.file_meta.TransferSyntaxUID
        how = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
        one.save_as(folder / f"{name}{(3 * k + 2) % 100:03d}.dcm", enforce_file_format=True, **how)
    return folder
