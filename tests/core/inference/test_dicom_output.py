"""A label map as DICOM Segmentation and as RT Structure Set, read back by other means, voxel for voxel."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import REAL, make_series, write
from matplotlib.path import Path as Polygon
from pydicom import Dataset
from scipy import ndimage
from skimage.color import rgb2lab

from core.inference.dicom_seg import category_of, code_of, write_segmentation
from core.inference.dicom_source import read_sources, save
from core.inference.rtstruct import write_structures
from core.scans.dicom_series import load_series
from core.scans.geometry import Geometry

ORGANS = ("background", "liver", "kidney_right", "left adrenal gland", "my organ", "spleen", "inferior vena cava")
TURNED = [np.cos(0.3), np.sin(0.3), 0, -np.sin(0.3), np.cos(0.3), 0]


def enhanced(folder: Path, count: int) -> Path:
    """Write one file whose frames are the slices, in an order that is not that of their positions."""
    slices = make_series(count)
    one = slices[0]
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    one.NumberOfFrames, one.PerFrameFunctionalGroupsSequence = count, []
    order = [(2 * k + 1) % count for k in range(count)] if count % 2 else list(range(count))[::-1]
    for k in order:
        groups = Dataset()
        position, transformation, frame = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = slices[k].ImagePositionPatient
        transformation.RescaleSlope, transformation.RescaleIntercept = 1, -1024
        frame.FrameAcquisitionNumber = 1
        groups.PlanePositionSequence = [position]
        groups.PixelValueTransformationSequence = [transformation]
        one.PerFrameFunctionalGroupsSequence.append(groups)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = one.ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = one.PixelSpacing, 2.5
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    one.SharedFunctionalGroupsSequence = [shared]
    one.PixelData = b"".join(slices[k].PixelData for k in order)
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(one, keyword)
    return write(folder, [one])


@pytest.fixture(params=["axial", "from above", "turned", "one file", "real"])
def read(request, tmp_path) -> tuple[Path, np.ndarray, Geometry]:
    """Return a series' folder, labels with holes, pieces and organs at the edge in RAS+ order, and the geometry."""
    folder = tmp_path / "series"
    if request.param == "real":
        if not REAL.is_dir():
            pytest.skip(f"{REAL} is not there")
        folder = REAL
    elif request.param == "one file":
        enhanced(folder, 5)
    else:
        slices = make_series(5)
        for one in slices:
            one.StudyInstanceUID, one.SOPInstanceUID = "1.2.8", one.file_meta.MediaStorageSOPInstanceUID
            if request.param == "from above":
                one.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]
            if request.param == "turned":
                one.ImageOrientationPatient = TURNED
        write(folder, slices)
    voxels, geometry = load_series(folder, warn=lambda _: None)
    rng = np.random.default_rng(0)
    blob = np.where(np.array(voxels.shape) > 100, 50, 2)
    coarse = rng.integers(0, len(ORGANS), -(-np.array(voxels.shape) // blob))
    labels = ndimage.zoom(coarse, blob, order=0)[tuple(map(slice, voxels.shape))].astype(np.uint8)
    holes = rng.integers(0, voxels.shape, (12, 3))
    labels[tuple(holes.T)] = rng.integers(0, len(ORGANS), 12)
    labels[labels == 5] = 0  # the spleen is not found
    return folder, labels, geometry


def stored(labels: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return labels as (slice, row, column)."""
    return geometry.from_ras(labels).transpose(2, 1, 0)


def slice_at(geometry: Geometry, position: Sequence[float]) -> int:
    """Return the number of the slice at a position in LPS mm."""
    distances = [np.linalg.norm(np.subtract(one.position, [float(mm) for mm in position])) for one in geometry.slices]
    assert min(distances) < 0.01
    return int(np.argmin(distances))


def test_each_segment_is_its_organ_voxel_for_voxel(read, tmp_path):
    pytest.importorskip("highdicom")
    folder, labels, geometry = read
    write_segmentation(labels, geometry, ORGANS, "abc123", tmp_path / "seg.dcm")
    found = pydicom.dcmread(tmp_path / "seg.dcm")
    frames = np.atleast_3d(found.pixel_array).reshape(-1, found.Rows, found.Columns)
    back = np.zeros_like(stored(labels, geometry))
    for frame, groups in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
        k = slice_at(geometry, groups.PlanePositionSequence[0].ImagePositionPatient)
        back[k][frame > 0] = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    assert np.array_equal(back, stored(labels, geometry))
    assert found.SegmentationType == "BINARY"

    segments = {one.SegmentNumber: one for one in found.SegmentSequence}
    assert [segments[i].SegmentLabel for i in range(1, len(ORGANS))] == list(ORGANS[1:])
    kinds = {i: one.SegmentedPropertyTypeCodeSequence[0] for i, one in segments.items()}
    # SNOMED CT: liver, kidney, adrenal gland, spleen, inferior vena cava.
    codes = {1: "10200004", 2: "64033007", 3: "23451007", 5: "78961009", 6: "64131007"}
    assert {i: (kinds[i].CodeValue, kinds[i].CodingSchemeDesignator) for i in codes} == {
        i: (code, "SCT") for i, code in codes.items()
    }
    assert (kinds[4].CodingSchemeDesignator, kinds[4].CodeMeaning) == ("99ORGANS", "my organ")
    sides = {i: kind.get("SegmentedPropertyTypeModifierCodeSequence") for i, kind in kinds.items()}
    assert {i: side[0].CodeMeaning for i, side in sides.items() if side} == {2: "Right", 3: "Left"}
    identity = segments[1].SegmentationAlgorithmIdentificationSequence[0]
    assert (segments[1].SegmentAlgorithmType, identity.AlgorithmVersion) == ("AUTOMATIC", "abc123")
    # The liver's colour, #9d4300; L* of 0..100 and a*, b* of -128..127 stand in 0..65535. (scikit-image
    # leaves out the adaptation of white, which changes b* by 4 here.)
    lab = np.array(segments[1].RecommendedDisplayCIELabValue) / 65535 * (100, 255, 255) - (0, 128, 128)
    np.testing.assert_allclose(lab, rgb2lab(np.array([0x9D, 0x43, 0x00]) / 255, illuminant="D50"), atol=5)

    sources = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(folder.glob("*.dcm"))]
    assert found.PatientID == sources[0].PatientID
    # The real series has an empty one.
    assert found.StudyInstanceUID == (sources[0].StudyInstanceUID or found.StudyInstanceUID) != ""
    referred = {one.ReferencedSOPInstanceUID for one in found.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred == {one.file_meta.MediaStorageSOPInstanceUID for one in sources}


def test_the_contours_enclose_the_organs_voxel_for_voxel(read, tmp_path):
    folder, labels, geometry = read
    write_structures(labels, geometry, ORGANS, "abc123", tmp_path / "rtstruct.dcm")
    found = pydicom.dcmread(tmp_path / "rtstruct.dcm")
    names = {one.ROINumber: one.ROIName for one in found.StructureSetROISequence}
    assert names == dict(enumerate(ORGANS[1:], start=1))
    to_index = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ geometry.affine)  # from LPS mm to column, row, slice
    uids = {path: pydicom.dcmread(path).file_meta.MediaStorageSOPInstanceUID for path in folder.glob("*.dcm")}
    back = np.zeros_like(stored(labels, geometry))
    for organ in found.ROIContourSequence:
        inside = np.zeros(back.shape, bool)
        assert ("ContourSequence" in organ) == (organ.ReferencedROINumber != 5)
        for contour in organ.get("ContourSequence", ()):
            mm = np.array([float(text) for text in contour.ContourData]).reshape(-1, 3)
            assert len(mm) == contour.NumberOfContourPoints >= 4
            places = (to_index @ np.column_stack([mm, np.ones(len(mm))]).T).T
            k = int(np.rint(places[0, 2]))
            np.testing.assert_allclose(places[:, 2], k, atol=0.01)
            image = contour.ContourImageSequence[0]
            assert image.ReferencedSOPInstanceUID == uids[geometry.slices[k].path]
            assert image.get("ReferencedFrameNumber", 1) == geometry.slices[k].frame + 1
            first, last = places[:, :2].min(axis=0).astype(int), places[:, :2].max(axis=0).astype(int) + 1
            columns, rows = (np.arange(low, high + 1) for low, high in zip(first, last, strict=True))
            rows, columns = rows[rows < back.shape[1]], columns[columns < back.shape[2]]
            centres = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
            within = Polygon(places[:, :2]).contains_points(centres).reshape(len(rows), len(columns))
            inside[k, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] ^= within
        back[inside] = organ.ReferencedROINumber
    assert np.array_equal(back, stored(labels, geometry))
    assert list(found.ROIContourSequence[0].ROIDisplayColor) == [0x9D, 0x43, 0x00]
    reference = found.ReferencedFrameOfReferenceSequence[0]
    series = reference.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert len(series.ContourImageSequence) == len(geometry.slices)
    assert reference.FrameOfReferenceUID == pydicom.dcmread(geometry.slices[0].path).FrameOfReferenceUID


def axial(folder: Path, **changes: object) -> Geometry:
    slices = make_series(5, **changes)
    for one in slices:
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID
    return load_series(write(folder, slices), warn=lambda _: None)[1]


def test_no_organ_found_makes_empty_objects(tmp_path, caplog):
    geometry = axial(tmp_path / "series")
    labels = np.zeros(geometry.shape, np.uint8)
    write_structures(labels, geometry, ORGANS, "", tmp_path / "rtstruct.dcm")
    found = pydicom.dcmread(tmp_path / "rtstruct.dcm")
    assert [one.ROIName for one in found.StructureSetROISequence] == list(ORGANS[1:])
    assert not any("ContourSequence" in organ for organ in found.ROIContourSequence)
    assert found.SoftwareVersions == "unknown"
    pytest.importorskip("highdicom")
    write_segmentation(labels, geometry, ORGANS, "", tmp_path / "seg.dcm")
    found = pydicom.dcmread(tmp_path / "seg.dcm")
    assert not found.pixel_array.any()
    assert found.NumberOfFrames == len(ORGANS) - 1  # of one slice, as DICOM has no object without frames
    assert caplog.records == []


def test_names_in_any_script_come_through(tmp_path):
    geometry = axial(tmp_path / "series", SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Zoë")
    labels, organs = np.ones(geometry.shape, np.uint8), ("background", f"肝臓 Leber ü\\{'x' * 80}")
    name = f"肝臓 Leber ü/{'x' * 53}"
    write_structures(labels, geometry, organs, "", tmp_path / "rtstruct.dcm")
    found = pydicom.dcmread(tmp_path / "rtstruct.dcm")
    assert (found.PatientName, found.StructureSetROISequence[0].ROIName) == ("Müller^Zoë", name)
    pytest.importorskip("highdicom")
    write_segmentation(labels, geometry, organs, "", tmp_path / "seg.dcm")
    found = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (found.PatientName, found.SegmentSequence[0].SegmentLabel) == ("Müller^Zoë", name)


@pytest.mark.parametrize("empty", [None, ""])
def test_a_series_without_what_the_objects_refer_to_is_refused(tmp_path, empty):
    missing = "FrameOfReferenceUID"
    geometry = axial(tmp_path / "series", FrameOfReferenceUID=empty)
    labels = np.ones(geometry.shape, np.uint8)
    with pytest.raises(ValueError, match=f"^no DICOM object can refer to .*IM.*dcm: it has no {missing}$"):
        read_sources(geometry.slices)
    with pytest.raises(ValueError, match=missing):
        write_structures(labels, geometry, ORGANS, "", tmp_path / "rtstruct.dcm")
    assert not list(tmp_path.glob("*.dcm"))


def test_slices_of_one_identity_are_refused(tmp_path):
    slices = make_series(5)
    for one in slices:
        one.SOPInstanceUID = "1.2.3.99"
    geometry = load_series(write(tmp_path / "series", slices), warn=lambda _: None)[1]
    with pytest.raises(ValueError, match=r"no DICOM object can refer to the slices in .*two have the same SOPInstance"):
        read_sources(geometry.slices)


def test_what_anonymisation_left_invalid_is_emptied_and_nothing_of_the_patient_is_printed(tmp_path, capsys, recwarn):
    geometry = axial(
        tmp_path / "series",
        PatientName="SECRETNAME",
        PatientBirthDate="1970-01-01",
        PatientSex="male",
        StudyTime="12:30",
    )
    labels = np.ones(geometry.shape, np.uint8)
    write_structures(labels, geometry, ORGANS, "", tmp_path / "rtstruct.dcm")
    pytest.importorskip("highdicom")
    write_segmentation(labels, geometry, ORGANS, "", tmp_path / "seg.dcm")
    for name in ("rtstruct.dcm", "seg.dcm"):
        found = pydicom.dcmread(tmp_path / name)
        assert (found.PatientName, found.PatientBirthDate, found.PatientSex) == ("SECRETNAME", "", "")
    assert "SECRET" not in "".join(capsys.readouterr())
    assert not [one for one in recwarn if "SECRET" in str(one.message)]


def test_a_contour_longer_than_explicit_lengths_can_be_read_back(tmp_path):
    geometry = axial(tmp_path / "series", Rows=1000, Columns=4, PixelData=bytes(2 * 1000 * 4))
    comb = np.zeros(geometry.shape, np.uint8)
    comb[0, :, 2], comb[:, ::2, 2] = 1, 1  # one contour around 500 teeth
    write_structures(comb, geometry, ORGANS, "", tmp_path / "rtstruct.dcm")
    contours = pydicom.dcmread(tmp_path / "rtstruct.dcm").ROIContourSequence[0].ContourSequence
    assert len(contours) == 1
    assert len(contours[0].ContourData) == 3 * contours[0].NumberOfContourPoints
    assert len("\\".join(map(str, contours[0].ContourData))) > 65534
    assert set(contours[0].ContourData[2::3]) == {35}  # mm, of the third slice


def test_what_cannot_be_written_is_said_without_the_patient(tmp_path):
    made = Dataset()
    made.PatientName = "SECRET"  # without the meta information that a file needs
    with pytest.raises(ValueError, match=r"^no DICOM object can hold a value of the series") as refused:
        save(made, tmp_path / "seg.dcm")
    assert "SECRET" not in str(refused.value)


def one_acquisition_of_two(folder: Path) -> Geometry:
    """Write one file with two acquisitions, and PixelMeasures for each frame."""
    path = next(enhanced(folder, 6).glob("*.dcm"))
    one = pydicom.dcmread(path)
    measures = one.SharedFunctionalGroupsSequence[0].pop("PixelMeasuresSequence")
    for k, groups in enumerate(one.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence = [Dataset()]
        groups.FrameContentSequence[0].FrameAcquisitionNumber = 1 + k % 2
        groups.add(measures)
    one.save_as(path)
    return load_series(folder, f"{one.SeriesInstanceUID}:2", warn=lambda _: None)[1]


def two_files_of_frames(folder: Path) -> Geometry:
    """Write a series of two multi-frame files."""
    path = next(enhanced(folder, 6).glob("*.dcm"))
    one = pydicom.dcmread(path)
    frames = list(zip(one.PerFrameFunctionalGroupsSequence, np.split(one.pixel_array, 6), strict=True))
    for number in (0, 1):
        kept = frames[3 * number : 3 * number + 3]
        one.NumberOfFrames, one.PerFrameFunctionalGroupsSequence = len(kept), [groups for groups, _ in kept]
        one.PixelData = b"".join(pixels.tobytes() for _, pixels in kept)
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 7}"
        one.save_as(folder / f"{number}.dcm")
    path.unlink()
    return load_series(folder, warn=lambda _: None)[1]


def without_preamble(folder: Path) -> Geometry:
    """Write a series whose files begin with their elements."""
    axial(folder)
    for path in folder.glob("*.dcm"):
        path.write_bytes(path.read_bytes()[132:])
    return load_series(folder, warn=lambda _: None)[1]


@pytest.mark.parametrize("series", [one_acquisition_of_two, two_files_of_frames, without_preamble])
def test_series_of_all_kinds_have_results_that_refer_to_each_slice(tmp_path, series):
    geometry = series(tmp_path / "series")
    labels = np.ones(geometry.shape, np.uint8)
    identity = {one.path: source.SOPInstanceUID for one, source in zip_sources(geometry)}
    expected = {
        (identity[one.path], one.frame + 1 if one.frames > 1 else None): one.position for one in geometry.slices
    }
    write_structures(labels, geometry, ORGANS, "", tmp_path / "rtstruct.dcm")
    contours = pydicom.dcmread(tmp_path / "rtstruct.dcm").ROIContourSequence[0].ContourSequence
    images = [contour.ContourImageSequence[0] for contour in contours]
    heights = {place_of(image): float(c.ContourData[2]) for image, c in zip(images, contours, strict=True)}
    assert heights == {place: position[2] for place, position in expected.items()}
    pytest.importorskip("highdicom")
    write_segmentation(labels, geometry, ORGANS, "", tmp_path / "seg.dcm")
    found = pydicom.dcmread(tmp_path / "seg.dcm")
    frames = found.PerFrameFunctionalGroupsSequence
    positions = {
        place_of(groups.DerivationImageSequence[0].SourceImageSequence[0]): list(
            map(float, groups.PlanePositionSequence[0].ImagePositionPatient)
        )
        for groups in frames
    }
    assert positions == {place: position.tolist() for place, position in expected.items()}
    referred = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {one.ReferencedSOPInstanceUID for one in referred} == set(identity.values())
    assert len(referred) == len(identity)
    assert found.pixel_array.all()


def zip_sources(geometry: Geometry) -> list[tuple]:
    sources = read_sources(geometry.slices)
    return [(one, sources[one.path]) for one in geometry.slices]


def place_of(reference: Dataset) -> tuple[str, int | None]:
    return reference.ReferencedSOPInstanceUID, reference.get("ReferencedFrameNumber")


def test_japanese_names_come_through(tmp_path):
    name = "Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"  # as PS3.5 H.3.1 writes 山田^太郎
    geometry = axial(tmp_path / "series", SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name)
    write_structures(np.ones(geometry.shape, np.uint8), geometry, ORGANS, "", tmp_path / "rtstruct.dcm")
    assert pydicom.dcmread(tmp_path / "rtstruct.dcm").PatientName == "Yamada^Tarou=山田^太郎"
    pytest.importorskip("highdicom")
    write_segmentation(np.ones(geometry.shape, np.uint8), geometry, ORGANS, "", tmp_path / "seg.dcm")
    assert pydicom.dcmread(tmp_path / "seg.dcm").PatientName == "Yamada^Tarou=山田^太郎"


def test_a_disease_is_no_anatomical_structure():
    categories = {name: category_of(name).meaning for name in ("liver", "liver_tumor", "Kidney Cyst", "massa")}
    disease, organ = "Morphologically Abnormal Structure", "Anatomical Structure"
    assert categories == {"liver": organ, "liver_tumor": disease, "Kidney Cyst": disease, "massa": organ}


def test_codes_of_organs_in_any_spelling_never_collide():
    assert [code.meaning for code in code_of("lung_left")] == ["Lung", "Left"]
    upper = [code_of(f"lung_upper_lobe_{side}")[0] for side in ("left", "right")]
    assert upper[0].value != upper[1].value
    assert all(len(code.value) == 16 and code.scheme_designator == "99ORGANS" for code in upper)
