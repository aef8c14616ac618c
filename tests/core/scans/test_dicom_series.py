"""CT series of DICOM files, made here and real; hand-worked places and HU, and every refusal."""

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import (
    COLUMNS,
    ENHANCED_CT,
    MR_IMAGE,
    REAL,
    ROWS,
    RT_STRUCTURES,
    SECRET,
    SLICES,
    make_series,
    make_slice,
    stored_values,
    write,
)
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from core.scans import dicom_series as dicom
from core.scans.dicom_folders import is_series_folder
from core.scans.dicom_series import find_series, load_series
from core.scans.volumes import save_label_map


def load(folder: Path, **options: object) -> tuple:
    """Load a series without a single warning."""
    warnings: list[str] = []
    loaded = load_series(folder, warn=warnings.append, **options)
    assert warnings == []
    return loaded


def warned(folder: Path, **options: object) -> tuple[list[str], tuple]:
    warnings: list[str] = []
    loaded = load_series(folder, warn=warnings.append, **options)
    assert SECRET not in str(warnings)
    return warnings, loaded


def refusal(folder: Path, **options: object) -> str:
    """Return the one sentence by which a series is refused; it names the folder and nothing of the patient."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_series(folder, warn=lambda _: None, **options)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert SECRET not in message
    return message


def place(geometry, column: int, row: int, k: int) -> list[float]:
    """Return where a stored voxel lies, in mm in RAS+."""
    return nib.affines.apply_affine(geometry.affine, [column, row, k]).tolist()


# ---- Read rightly ----------------------------------------------------------------------------------------------------


def test_axial_series_has_the_hu_and_places_worked_out_by_hand(tmp_path):
    voxels, geometry = load(write(tmp_path / "scan", make_series()))
    assert voxels.dtype == np.float32
    assert voxels.flags.c_contiguous
    assert voxels.shape == geometry.shape == (COLUMNS, ROWS, SLICES)
    assert geometry.stored_shape == (COLUMNS, ROWS, SLICES)
    np.testing.assert_allclose(geometry.spacing_mm, (0.8, 0.5, 2.5), rtol=1e-6)
    # Column 2, row 3, slice 1: L = -10 + 2 * 0.8, P = -20 + 3 * 0.5, S = 30 + 2.5; right is -L, front is -P.
    np.testing.assert_allclose(place(geometry, 2, 3, 1), [8.4, 18.5, 32.5], rtol=1e-6)
    # It stores 1000 + 100 + 3 * 8 + 2. In RAS+ columns and rows run the other way: 8 - 1 - 2 and 6 - 1 - 3.
    assert voxels[5, 2, 1] == 1126 - 1024
    # The first voxel of all, in the file's own order and in RAS+.
    assert geometry.from_ras(voxels)[0, 0, 0] == voxels[7, 5, 0] == 1000 - 1024


def test_label_map_is_written_on_the_series_own_grid(tmp_path):
    voxels, geometry = load(write(tmp_path / "scan", make_series()))
    labels = (voxels == 1126 - 1024).astype(np.uint8)  # the voxel worked out above
    save_label_map(labels, geometry, tmp_path / "scan.nii.gz")
    written = nib.load(tmp_path / "scan.nii.gz")
    assert written.shape == (COLUMNS, ROWS, SLICES)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert np.argwhere(np.asarray(written.dataobj)).tolist() == [[2, 3, 1]]
    np.testing.assert_array_equal(written.affine, geometry.affine)
    for affine, code in (written.get_sform(coded=True), written.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(affine @ [2, 3, 1, 1], [8.4, 18.5, 32.5, 1], rtol=1e-6)


def test_oblique_slices_lie_where_the_standards_equation_puts_them(tmp_path):
    # Rows along (0.8, 0.6, 0), columns towards the feet: the normal is their cross product, (-0.6, 0.8, 0).
    slices = make_series(ImageOrientationPatient=[0.8, 0.6, 0, 0, 0, -1], PixelSpacing=[2, 1])
    for k, one in enumerate(slices):
        one.ImagePositionPatient = [50 - 0.6 * 3 * k, -70 + 0.8 * 3 * k, 900]
    voxels, geometry = load(write(tmp_path / "scan", slices))
    # Column 1, row 2, slice 1 in LPS: (50, -70, 900) + 1 (0.8, 0.6, 0) + 2 * 2 (0, 0, -1) + 3 (-0.6, 0.8, 0).
    np.testing.assert_allclose(place(geometry, 1, 2, 1), [-49.0, 67.0, 896.0], rtol=1e-6)
    assert geometry.from_ras(voxels)[1, 2, 1] == 1000 + 100 + 2 * 8 + 1 - 1024
    # In RAS+ order: columns run to the left, rows to the feet, slices to the back. All three are turned round.
    assert voxels.shape == (COLUMNS, SLICES, ROWS)
    assert voxels[6, 2, 3] == geometry.from_ras(voxels)[1, 2, 1]


def test_tilted_gantry_is_kept_as_a_sheared_affine_with_a_warning(tmp_path):
    # The table moves by 5 mm along the patient, the slices lean by 20 degrees.
    cosine, sine = 0.9396926, 0.3420201
    slices = make_series(ImageOrientationPatient=[1, 0, 0, 0, cosine, -sine], PixelSpacing=[1, 1])
    for k, one in enumerate(slices):
        one.ImagePositionPatient = [-10, -20, 30 + 5 * k]
    warnings, (voxels, geometry) = warned(write(tmp_path / "scan", slices))
    assert len(warnings) == 1
    assert "sheared by 20.0 degrees" in warnings[0]
    np.testing.assert_allclose(place(geometry, 0, 2, 3), [10, 20 - 2 * cosine, 45 - 2 * sine], rtol=1e-6)
    assert geometry.from_ras(voxels)[0, 2, 3] == 1000 + 300 + 2 * 8 - 1024
    assert geometry.voxel_ml == pytest.approx(5 * cosine / 1000, rel=1e-6)
    save_label_map(np.zeros(geometry.shape, np.uint8), geometry, tmp_path / "scan.nii.gz")
    written = nib.load(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(written.affine, geometry.affine)
    assert written.get_qform(coded=True)[1] == 0  # a qform cannot say it


def test_slices_are_sorted_by_place_whatever_their_names_and_numbers(tmp_path):
    forth, geometry = load(write(tmp_path / "forth", make_series()))
    back, same = load(write(tmp_path / "back", make_series()[::-1]))
    np.testing.assert_array_equal(back, forth)
    np.testing.assert_array_equal(same.affine, geometry.affine)


def test_each_slice_has_its_own_rescaling(tmp_path):
    slices = make_series()
    for k, one in enumerate(slices):
        one.RescaleSlope, one.RescaleIntercept = 0.5 * (k + 1), -1000 - k
    voxels, geometry = load(write(tmp_path / "scan", slices))
    stack = geometry.from_ras(voxels)
    assert stack[2, 3, 0] == 0.5 * 1026 - 1000
    assert stack[2, 3, 3] == 2.0 * 1326 - 1003


def test_signed_values_and_unused_bits(tmp_path):
    signed = np.full((ROWS, COLUMNS), -2, dtype=np.int16)
    signed[0, 0] = 0x0800  # in 12 bits of two's complement that is -2048, with the unused bits left at 0
    options = {"PixelRepresentation": 1, "RescaleIntercept": 0, "PixelData": signed.tobytes()}
    voxels, geometry = load(write(tmp_path / "signed", make_series(**options)))
    assert geometry.from_ras(voxels)[0, 0, 0] == -2048
    assert geometry.from_ras(voxels)[1, 0, 0] == -2
    full = np.full((ROWS, COLUMNS), 65000, dtype=np.uint16)
    options = {"BitsStored": 16, "HighBit": 15, "RescaleIntercept": -64000, "PixelData": full.tobytes()}
    assert (load(write(tmp_path / "unsigned", make_series(**options)))[0] == 1000).all()


@pytest.mark.parametrize(("signed", "padding"), [(1, 63536), (1, -2000), (0, 63536)])
def test_padding_becomes_air_however_its_sign_is_written(tmp_path, signed, padding):
    stored = np.full((ROWS, COLUMNS), 100, dtype=np.uint16)
    stored[0, :3] = 63536  # the same 16 bits as -2000
    slices = make_series(PixelRepresentation=signed, BitsStored=16, HighBit=15, RescaleIntercept=-50)
    for one in slices:
        one.PixelData = stored.tobytes()
        one.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
    voxels, geometry = load(write(tmp_path / "scan", slices))
    assert geometry.from_ras(voxels)[:4, 0, 0].tolist() == [-1024, -1024, -1024, 50]


def test_padding_may_be_a_range_and_warns_where_it_is_as_in_tissue(tmp_path):
    slices = make_series()
    for one in slices:
        one.add_new("PixelPaddingValue", "US", 1001)
        one.add_new("PixelPaddingRangeLimit", "US", 1003)
    warnings, (voxels, geometry) = warned(write(tmp_path / "scan", slices))
    assert len(warnings) == 1
    assert "PixelPaddingValue is -23 HU, as in tissue" in warnings[0]
    assert geometry.from_ras(voxels)[:5, 0, 0].tolist() == [-24, -1024, -1024, -1024, -20]


def make_enhanced(count: int = SLICES) -> Dataset:
    """Return the series of `make_series` as one enhanced multi-frame file, frames in mixed order."""
    one = make_slice(0, ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None)
    del one.RescaleSlope, one.RescaleIntercept
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = ENHANCED_CT
    order = [2, 0, 3, 1][:count]
    one.NumberOfFrames = count
    shared, pixels, direction = Dataset(), Dataset(), Dataset()
    pixels.PixelSpacing, direction.ImageOrientationPatient = [0.5, 0.8], [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [pixels], [direction]
    one.SharedFunctionalGroupsSequence, one.PerFrameFunctionalGroupsSequence = [shared], []
    for k in order:
        groups, where, scale = Dataset(), Dataset(), Dataset()
        where.ImagePositionPatient = [-10, -20, 30 + 2.5 * k]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 1, -1024 - k, "HU"
        groups.PlanePositionSequence, groups.PixelValueTransformationSequence = [where], [scale]
        one.PerFrameFunctionalGroupsSequence.append(groups)
    one.PixelData = b"".join(stored_values(k).tobytes() for k in order)
    return one


def test_enhanced_multi_frame_file_is_read_frame_by_frame(tmp_path):
    folder = write(tmp_path / "scan", [make_enhanced()])
    assert next(iter(find_series(folder).values())).slices == SLICES
    voxels, geometry = load(folder)
    plain, same = load(write(tmp_path / "plain", make_series()))
    np.testing.assert_array_equal(geometry.affine, same.affine)
    np.testing.assert_array_equal(voxels, plain - np.arange(SLICES))  # each frame has its own intercept here


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_uncompressed_and_deflated_transfer_syntaxes(tmp_path, syntax):
    plain, _ = load(write(tmp_path / "plain", make_series()))
    slices = make_series()
    for one in slices:
        one.file_meta.TransferSyntaxUID = syntax
        if not syntax.is_little_endian:
            one.PixelData = np.frombuffer(one.PixelData, "<u2").astype(">u2").tobytes()
    np.testing.assert_array_equal(load(write(tmp_path / "scan", slices))[0], plain)


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1], ids=lambda s: s.name
)
def test_compressed_transfer_syntaxes(tmp_path, syntax):
    plain, _ = load(write(tmp_path / "plain", make_series()))
    folder = write(tmp_path / "scan", make_series())
    for path in folder.iterdir():
        compress(path, syntax)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(load(folder)[0], plain)


def compress(path: Path, syntax: str) -> None:
    """Rewrite a file in a compressed transfer syntax, without loss."""
    if syntax == RLELossless:
        one = pydicom.dcmread(path)
        one.compress(syntax)
        one.save_as(path)
        return
    import gdcm

    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


def test_positions_rounded_by_the_scanner_are_one_even_series(tmp_path):
    # 0.625 mm apart, written with one decimal: gaps of 0.6 and 0.7.
    slices = make_series(12)
    for k, one in enumerate(slices):
        one.ImagePositionPatient = [-10, -20, round(0.625 * k, 1)]
    _, geometry = load(write(tmp_path / "scan", slices))
    assert geometry.spacing_mm[2] == pytest.approx(6.9 / 11)


# ---- Folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_series_is_told_from_others(tmp_path):
    folder = write(tmp_path / "scan", make_series())
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert is_series_folder(folder)
    assert not is_series_folder(tmp_path)  # an index and a folder within: no slices of its own
    assert not is_series_folder(folder / "IM002.dcm")
    assert not is_series_folder(tmp_path / "none")


def test_what_is_no_slice_is_left_out_by_name(tmp_path):
    folder = write(tmp_path / "scan", make_series())
    plain, _ = load(folder)
    (folder / "Thumbs.db").write_bytes(b"thumbs")
    (folder / "empty.dcm").touch()
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (folder / ".hidden").write_bytes(b"hidden")
    structures = make_slice(0, Modality="RTSTRUCT", SeriesInstanceUID="1.2.3.5", PixelData=None)
    structures.file_meta.MediaStorageSOPClassUID = structures.SOPClassUID = RT_STRUCTURES
    write(folder, [structures], "RS")
    # A localizer under the series' own UID, as old scanners write it.
    write(folder, [make_slice(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])], "LOC")
    warnings, (voxels, _) = warned(folder)
    np.testing.assert_array_equal(voxels, plain)
    assert warnings == [
        f"{folder}: left out, being no DICOM: Thumbs.db, empty.dcm",
        f"{folder}: left out 2 file(s) that are no slices of a CT volume: "
        "CT localizer, RTSTRUCT (RT Structure Set Storage)",
    ]


def test_several_series_are_asked_for(tmp_path):
    folder = write(tmp_path / "scan", make_series())
    write(folder, make_series(3, SeriesInstanceUID="1.2.3.7", SeriesDescription="Lung\x07"), "LUNG")
    message = refusal(folder)
    assert "holds 2 CT series, expected one; choose by --series UID" in message
    assert "1.2.3.4 ('Abdomen', 4 slices)" in message
    assert "1.2.3.7 ('', 3 slices)" in message  # no control characters: a terminal would obey them
    for one in folder.glob("LUNG*"):
        one.unlink()
    write(folder, make_series(3, SeriesInstanceUID="1.2.3.7", SeriesDescription="L" * 5000), "LUNG")
    assert f"1.2.3.7 ('{'L' * 100}', 3 slices)" in refusal(folder)
    assert load(folder, series_uid="1.2.3.4")[1].shape == (COLUMNS, ROWS, 4)
    assert load(folder, series_uid="1.2.3.7")[1].shape == (COLUMNS, ROWS, 3)
    assert "has no series 1.2.3; its CT series: 1.2.3.4" in refusal(folder, series_uid="1.2.3")
    assert {uid: series.slices for uid, series in find_series(folder).items()} == {"1.2.3.4": 4, "1.2.3.7": 3}


def test_folders_without_a_series_are_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "none")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("no DICOM")
    assert "no DICOM file in it" in refusal(tmp_path / "text")
    write(tmp_path / "text" / "within", make_series())
    assert "give the folder that holds the slices themselves" in refusal(tmp_path / "text")


# ---- Refusals --------------------------------------------------------------------------------------------------------


def every(**changes: object) -> Callable[[list[Dataset]], None]:
    """Return a function that changes all slices."""

    def change(slices: list[Dataset]) -> None:
        for one in slices:
            for keyword, value in changes.items():
                setattr(one, keyword, value) if value is not None else delattr(one, keyword)

    return change


def third(**changes: object) -> Callable[[list[Dataset]], None]:
    """Return a function that changes the third slice only."""
    return lambda slices: every(**changes)(slices[2:3])


def remove_two(slices: list[Dataset]) -> None:
    slices[:] = make_series(9)
    del slices[3], slices[5]


def make_mr(slices: list[Dataset]) -> None:
    for one in slices:
        one.Modality, one.SOPClassUID, one.file_meta.MediaStorageSOPClassUID = "MR", MR_IMAGE, MR_IMAGE


def make_unknown_syntax(slices: list[Dataset]) -> None:
    slices[2].file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
    slices[2].PixelData = pydicom.encaps.encapsulate([b"frame"])
    slices[2]["PixelData"].is_undefined_length = True


REFUSALS = {
    "missing slices": (remove_two, r"2 slice\(s\) missing: IM\d+.dcm and IM\d+.dcm are 5 mm apart, others 2.5 mm"),
    "uneven": (third(ImagePositionPatient=[-10, -20, 36]), r"unevenly spaced: .* are 1.5 mm apart, .* 3.5 mm"),
    "slightly uneven": (third(ImagePositionPatient=[-10, -20, 35.3]), "unevenly spaced"),
    "sideways": (third(ImagePositionPatient=[-10, -19.85, 35]), "shifted sideways by up to 0.3 pixels"),
    "double": (third(ImagePositionPatient=[-10, -20, 32.5]), r"1 slice\(s\) at a place that another one has"),
    "one slice": (lambda slices: slices.__delitem__(slice(1, None)), "has 1 slice, expected at least 2"),
    "another direction": (third(ImageOrientationPatient=[1, 0, 0, 0, 0.6, 0.8]), "ImageOrientationPatient differs"),
    "another spacing": (third(PixelSpacing=[0.5, 0.81]), "PixelSpacing differs from IM"),
    "another size": (third(Rows=ROWS - 1), "Rows differs from IM"),
    "another frame of reference": (third(FrameOfReferenceUID="1.2.10"), "FrameOfReferenceUID differs"),
    "another patient": (third(PatientID=f"{SECRET}-2"), "PatientID differs"),
    "MR": (make_mr, r"holds MR \(MR Image Storage\), expected the slices of a CT volume"),
    "localizer": (every(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "holds CT localizer, expected"),
    "no position": (third(ImagePositionPatient=None), "has no ImagePositionPatient"),
    "empty position": (third(ImagePositionPatient=""), "has no ImagePositionPatient"),
    "short position": (
        third(ImagePositionPatient=[1, 2]),
        r"ImagePositionPatient has the values \[1.0, 2.0\], expected 3",
    ),
    "no direction": (third(ImageOrientationPatient=None), "has no ImageOrientationPatient"),
    "no unit vectors": (every(ImageOrientationPatient=[1, 0, 0, 0, 1.1, 0]), "no pair of unit vectors"),
    "no right angle": (every(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]), "no pair of unit vectors"),
    "no pixel spacing": (third(PixelSpacing=None), "has no PixelSpacing"),
    "zero spacing": (every(PixelSpacing=[0, 0.8]), "voxels are 0 mm apart, expected 0.1 to 20"),
    "huge spacing": (every(PixelSpacing=[0.5, 50]), "voxels are 50 mm apart, expected 0.1 to 20"),
    "no rescale slope": (third(RescaleSlope=None), "has no RescaleSlope"),
    "no rescale intercept": (third(RescaleIntercept=None), "has no RescaleIntercept"),
    "zero slope": (third(RescaleSlope=0), "RescaleSlope is 0"),
    "other values": (third(RescaleType="Z_EFF"), "RescaleType is Z_EFF, expected HU"),
    "MONOCHROME1": (third(PhotometricInterpretation="MONOCHROME1"), "is MONOCHROME1, expected MONOCHROME2"),
    "colour": (third(SamplesPerPixel=3), "SamplesPerPixel is 3, expected 1"),
    "no bits": (third(BitsAllocated=None), "BitsAllocated is missing, expected 8 or 16"),
    "32 bits": (third(BitsAllocated=32), "BitsAllocated is 32, expected 8 or 16"),
    "bits stored": (third(BitsStored=17, HighBit=16), "BitsStored is 17, expected 1 to 16"),
    "high bit": (third(HighBit=15), "HighBit is 15, expected 11"),
    "no rows": (third(Rows=0), "has no rows or columns"),
    "frames in a plain file": (third(NumberOfFrames=2), "declares 2 frames and describes 1"),
    "too few pixels": (third(PixelData=bytes(10)), "expected 96 for the pixels|fewer|cannot be decoded"),
    "too many pixels": (third(PixelData=bytes(2 * 2 * ROWS * COLUMNS)), "more than the 1 frame"),
    "unknown syntax": (make_unknown_syntax, r"nothing installed decodes its MPEG2 .* try: pip install python-gdcm"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused_in_one_sentence(tmp_path, change, message):
    slices = make_series()
    change(slices)
    assert re.search(message, refusal(write(tmp_path / "scan", slices)))


@pytest.mark.parametrize("attribute", ["ImagePositionPatient", "RescaleSlope"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path, attribute, value):
    folder = write(tmp_path / "scan", make_series())
    old = rb"-10\-20\35.0" if attribute == "ImagePositionPatient" else b"1 "
    path = folder / "IM008.dcm"
    content = path.read_bytes()
    tag = b"\x20\x00\x32\x00DS" if attribute == "ImagePositionPatient" else b"\x28\x00\x53\x10DS"
    start = content.index(tag)
    new = value.encode() + b"\\1\\1" * (attribute == "ImagePositionPatient")
    new += b" " * (len(new) % 2)
    end = start + 8 + content[start + 6]
    assert content[start + 8 : end].startswith(old[:2].strip())
    path.write_bytes(content[: start + 6] + bytes([len(new), 0]) + new + content[end:])
    assert f"{attribute} has the values" in refusal(folder)


def test_enhanced_files_that_do_not_describe_every_frame_are_refused(tmp_path):
    one = make_enhanced()
    one.NumberOfFrames = 1_000_000_000
    assert "declares 1000000000 frames and describes 4" in refusal(write(tmp_path / "count", [one]))
    one = make_enhanced()
    del one.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    assert "has no ImagePositionPatient" in refusal(write(tmp_path / "place", [one]))


def test_every_cut_of_a_slice_is_refused(tmp_path):
    folder = write(tmp_path / "scan", make_series())
    path = folder / "IM011.dcm"  # the last slice, whose loss no gap would show
    content = path.read_bytes()
    for length in [*range(132, len(content), 61), len(content) - 2]:
        path.write_bytes(content[:length])
        message = refusal(folder)
        assert message.startswith(str(path)), length


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1], ids=lambda s: s.name)
def test_cut_compressed_pixels_are_refused(tmp_path, syntax):
    folder = write(tmp_path / "scan", make_series())
    path = folder / "IM008.dcm"
    compress(path, syntax)
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    assert refusal(folder).startswith(f"{path}: its pixels cannot be decoded")


def test_what_a_header_only_claims_takes_no_memory(tmp_path):
    folder = write(tmp_path / "many", make_series(Rows=65535, Columns=65535))
    assert "65535x65535x4 voxels, 64.0 GiB of memory, are more than expected: at most 8 GiB" in refusal(folder)
    folder = write(tmp_path / "one", make_series(Rows=16384, Columns=16384))
    assert "bytes, expected 536870912 for the pixels; cut off?" in refusal(folder)
    assert "are more than expected" in refusal(write(tmp_path / "small", make_series()), max_gib=1e-9)


def test_sequences_nested_without_end_are_refused(tmp_path):
    folder = write(tmp_path / "scan", make_series())
    path = folder / "IM008.dcm"
    content = path.read_bytes()
    start = content.index(b"\x08\x00\x16\x00UI")  # SOPClassUID
    level = b"\x08\x00\x40\x11SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4  # sequence and item, no lengths
    path.write_bytes(content[:start] + level * 20_000 + content[start:])
    assert refusal(folder).startswith(f"{path}: is no whole DICOM file")


def test_compressed_pixels_that_claim_another_size_are_refused(tmp_path):
    folder = write(tmp_path / "scan", make_series())
    path = folder / "IM008.dcm"
    compress(path, JPEGLosslessSV1)
    content = path.read_bytes()
    size = content.index(b"\xff\xc3") + 5  # in the frame header: height and width
    assert content[size : size + 4] == bytes([0, ROWS, 0, COLUMNS])
    path.write_bytes(content[:size] + b"\xff\xff\xff\xff" + content[size + 4 :])
    assert refusal(folder).startswith(f"{path}: its pixels cannot be decoded")


def test_a_deflated_file_may_be_smaller_than_its_pixels(tmp_path):
    slices = make_series(Rows=64, Columns=64, PixelData=bytes(2 * 64 * 64))
    for one in slices:
        one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    folder = write(tmp_path / "scan", slices)
    assert max(path.stat().st_size for path in folder.iterdir()) < 2 * 64 * 64
    assert (load(folder)[0] == -1024).all()


def test_a_deflated_file_that_is_cut_off_is_refused(tmp_path):
    slices = make_series(ImageComments="0" * 10_000)
    for one in slices:
        one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    folder = write(tmp_path / "scan", slices)
    load(folder)
    path = folder / "IM008.dcm"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    assert "is no whole DICOM file" in refusal(folder)


@pytest.mark.parametrize(("end", "words"), [("kill -SEGV $$", "ended by SIGSEGV"), ("exit 1", "ended with code 1")])
def test_a_decoder_that_crashes_is_a_refusal(tmp_path, monkeypatch, end, words):
    # A stand-in for Python, since no file is known to crash every version of a decoder.
    slices = make_series()
    for one in slices:
        one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    folder = write(tmp_path / "scan", slices)
    crashing = tmp_path / "python"
    crashing.write_text(f"#!/bin/sh\n{end}\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    assert words in refusal(folder)


def test_uncompressed_pixels_need_no_process(tmp_path, monkeypatch):
    folder = write(tmp_path / "scan", make_series())
    expected = load(folder)[0]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no such Python"))
    assert np.array_equal(load(folder)[0], expected)


@pytest.mark.long
def test_mutated_headers_are_read_or_refused_but_never_crash(tmp_path, monkeypatch):
    folder = write(tmp_path / "scan", make_series())
    monkeypatch.setattr(
        dicom, "decoded_frames", lambda slices: [(s.path, s.frame, np.zeros((s.rows, s.columns))) for s in slices]
    )
    path = folder / "IM008.dcm"
    content = path.read_bytes()
    draw, messages = random.Random(5), []
    for _ in range(1000):
        mutated = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            mutated[draw.randrange(132, len(content) - 96)] = draw.randrange(256)
        path.write_bytes(mutated)
        try:
            voxels, geometry = load_series(folder, warn=lambda _: None)
        except (ValueError, FileNotFoundError) as error:
            messages.append(str(error))
        else:
            assert np.isfinite(voxels).all()
            assert voxels.shape == geometry.shape
    assert 300 < len(messages) < 1000
    assert not [message for message in messages if SECRET in message or "Traceback" in message or len(message) > 500]


# ---- A real series ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans, which are not part of the repository")
def test_real_jpeg_2000_series(tmp_path):
    series = find_series(REAL)
    assert [(one.uid, one.description, one.slices) for one in series.values()] == [("", "CT Body 3.0", 20)]
    voxels, geometry = load(REAL)
    # The first position and its spacing stand in the headers; slices are named from the head down.
    assert geometry.shape == (512, 512, 20)
    np.testing.assert_allclose(place(geometry, 0, 0, 0), [249.51171875, 437.51171875, -804.5])
    np.testing.assert_allclose(place(geometry, 0, 0, 19), [249.51171875, 437.51171875, -766.5])
    np.testing.assert_allclose(geometry.spacing_mm, (0.9765625, 0.9765625, 2.0))
    # The extremes and the mean as SimpleITK 2.5.7 reads them.
    assert (voxels.min(), voxels.max()) == (-1024, 1839)
