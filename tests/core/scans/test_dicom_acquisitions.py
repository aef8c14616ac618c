"""Several acquisitions under one SeriesInstanceUID: refused by name, chosen by --series UID:N; volumes that are one."""

import itertools
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import COLUMNS, REAL, ROWS, make_series, make_slice, write
from pydicom.dataset import Dataset
from test_dicom_series import make_enhanced

from core.scans.dicom_series import load_series

COUNT = 10  # slices of an acquisition
HU = (46, 76)  # of the first and the second acquisition


def make_acquisition(index: int, count: int = COUNT, offset_mm: float = 0, hu: float | None = None) -> list[Dataset]:
    """Return slices 5 mm apart, all voxels of one value."""
    stored = np.full((ROWS, COLUMNS), (HU[index] if hu is None else hu) + 1024, np.uint16)
    slices = [make_slice(k, PixelData=stored.tobytes()) for k in range(count)]
    for k, one in enumerate(slices):
        one.ImagePositionPatient = [-10, -20, 5 * k + offset_mm]
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{index}.{k + 1}"
    return slices


def marked(index: int, offset_mm: float = 0, count: int = COUNT, **marks: object) -> list[Dataset]:
    slices = make_acquisition(index, count, offset_mm)
    for k, one in enumerate(slices):
        for keyword, value in marks.items():
            setattr(one, keyword, value(k) if callable(value) else value)
    return slices


def write_both(folder: Path, first: list[Dataset], second: list[Dataset]) -> Path:
    write(folder, first, "A")
    return write(folder, second, "B")


def refusal(folder: Path, series: str | None = None) -> str:
    with pytest.raises(ValueError, match="^" + str(folder)) as caught:
        load_series(folder, series, warn=lambda _: None)
    return str(caught.value)


def clock(start: int, each: float = 0.5):
    """Return a function that gives the time of slice k, HHMMSS.FFF."""
    return lambda k: f"1403{start + each * k:06.3f}"


# By what the acquisitions differ: attribute of the first, of the second.
DIFFERENT = {
    "AcquisitionNumber": (1, 2),
    "ConvolutionKernel": ("B30f", "B70f"),
    "AcquisitionTime": ("140300", "140345"),
    "ContentTime": (clock(0), clock(30)),
    "InstanceCreationTime": (lambda k: clock(0)(7 * k % 10), lambda k: clock(30)(3 * k % 10)),  # not in order
    "AcquisitionDateTime": (lambda k: f"20221208{clock(0)(k)}+0100", lambda k: f"20221208{clock(30)(k)}+0100"),
    "TemporalPositionIdentifier": (1, 2),
    "TriggerTime": (300, 620),
    "ContrastBolusAgent": ("", "APPLIED"),
    "ImageType": (["DERIVED", "SECONDARY", "AXIAL"], ["ORIGINAL", "PRIMARY", "AXIAL"]),
    "KVP": (80, 140),
    "SeriesNumber": (3, 4),
}


@pytest.mark.parametrize(
    ("keyword", "offset_mm"),
    [*((keyword, 2.5) for keyword in DIFFERENT), *itertools.product(("AcquisitionNumber", "ContentTime"), (0, 1))],
)
def test_acquisitions_are_named_and_chosen(tmp_path, keyword, offset_mm):
    first, second = ({keyword: value} for value in DIFFERENT[keyword])
    folder = write_both(tmp_path / "scan", marked(0, **first), marked(1, offset_mm, **second))
    message = refusal(folder)
    assert "holds 2 acquisitions under one series UID" in message
    assert "choose by --series UID:N: 1.2.3.4:1 (" in message
    assert message.count(f"{keyword} ") == message.count(f", {COUNT} slices") == 2
    assert "20221208" not in message
    for i, hu in enumerate(HU):
        voxels, geometry = load_series(folder, f"1.2.3.4:{i + 1}")
        assert voxels.shape == (COLUMNS, ROWS, COUNT)
        assert (voxels == hu).all()
        assert geometry.spacing_mm[2] == 5
    assert "holds 2 acquisitions" in refusal(folder, "1.2.3.4")
    assert "holds 2 acquisitions" in refusal(folder, "1.2.3.4:3")


def test_instance_numbers_tell_acquisitions_at_the_same_places(tmp_path):
    folder = write_both(tmp_path / "scan", marked(0), marked(1))
    for name, after in (("A", 0), ("B", COUNT)):
        for path in folder.glob(f"{name}*"):
            one = pydicom.dcmread(path)
            one.InstanceNumber = int(one.ImagePositionPatient[2] / 5) + after + 1
            one.save_as(path)
    assert f"1.2.3.4:2 (InstanceNumber {COUNT + 1} to {2 * COUNT}, {COUNT} slices)" in refusal(folder)
    assert (load_series(folder, "1.2.3.4:2")[0] == HU[1]).all()


@pytest.mark.parametrize(
    ("group", "keyword", "values"),
    [
        ("FrameContentSequence", "FrameAcquisitionNumber", (1, 2)),
        ("CTReconstructionSequence", "ConvolutionKernel", ("B30f", "B70f")),
    ],
)
def test_frames_of_an_enhanced_file(tmp_path, group, keyword, values):
    one = make_enhanced()
    for groups in one.PerFrameFunctionalGroupsSequence:
        k = round((groups.PlanePositionSequence[0].ImagePositionPatient[2] - 30) / 2.5)
        mark = Dataset()
        setattr(mark, keyword, values[k % 2])
        setattr(groups, group, [mark])
    folder = write(tmp_path / "scan", [one])
    assert f"1.2.3.4:2 ({keyword} {values[1]}, 2 slices)" in refusal(folder)
    voxels, geometry = load_series(folder, "1.2.3.4:2")
    assert geometry.spacing_mm[2] == 5
    np.testing.assert_array_equal(geometry.from_ras(voxels)[0, 0], [1100 - 1024 - 1, 1300 - 1024 - 3])


def test_phases_of_two_kernels_each_are_four(tmp_path):
    folder = tmp_path / "scan"
    for i, (number, kernel) in enumerate(((1, "B30f"), (1, "B70f"), (2, "B30f"), (2, "B70f"))):
        write(folder, marked(number - 1, AcquisitionNumber=number, ConvolutionKernel=kernel), f"IM{i}")
    assert "1.2.3.4:4 (AcquisitionNumber 2, ConvolutionKernel B70f, 10 slices)" in refusal(folder)
    assert (load_series(folder, "1.2.3.4:3")[0] == HU[1]).all()


def test_blocks_that_overlap_are_two_acquisitions(tmp_path):
    for name, offset_mm in (("same", 5 * (COUNT - 2)), ("between", 5 * (COUNT - 2) + 2.5)):
        folder = write_both(
            tmp_path / name, marked(0, AcquisitionNumber=3), marked(1, offset_mm, count=7, AcquisitionNumber=4)
        )
        assert "1.2.3.4:2 (AcquisitionNumber 4, 7 slices)" in refusal(folder)
        assert load_series(folder, "1.2.3.4:2")[0].shape == (COLUMNS, ROWS, 7)


@pytest.mark.parametrize("keyword", ["XRayTubeCurrent", "SliceThickness", "Exposure", "InstanceCreationTime"])
def test_minor_marks_tell_acquisitions_only_where_the_image_alternates_too(tmp_path, keyword):
    marks = {keyword: lambda k: ("140300", "140301")[k % 2] if keyword.endswith("Time") else 200 + k % 2}
    one_volume = write(tmp_path / "one", marked(0, count=20, **marks))
    assert load_series(one_volume)[0].shape == (COLUMNS, ROWS, 20)
    first, second = (marked(i, 2.5 * i, **{keyword: "140300" if i else "140330"}) for i in (0, 1))
    message = refusal(write_both(tmp_path / "two", first, second))
    assert "holds 2 acquisitions under one series UID, as neighbouring slices alternate; choose by" in message
    assert f"1.2.3.4:1 ({keyword} 140300, 10 slices)" in message


@pytest.mark.parametrize("period", [2, 3])
def test_slices_that_alternate_without_a_header_that_says_so(tmp_path, period):
    slices = make_series(24)
    for k, one in enumerate(slices):
        rng = np.random.default_rng(k)
        one.PixelData = (rng.normal(1070, 4, (ROWS, COLUMNS)) + 30 * (k % period)).astype(np.uint16).tobytes()
    folder = write(tmp_path / "scan", slices)
    message = refusal(folder)
    assert f"holds {period} acquisitions under one series UID, as neighbouring slices alternate; choose by" in message
    voxels, geometry = load_series(folder, "1.2.3.4:2")
    assert voxels.shape[2] == 24 // period
    assert voxels.mean() == pytest.approx(76, abs=2)
    assert geometry.spacing_mm[2] == 2.5 * period
    assert message.endswith("; 1.2.3.4:0 (all slices as one volume)")
    assert load_series(folder, "1.2.3.4:0")[0].shape[2] == 24


def test_four_phases_in_turn_are_not_taken_for_two(tmp_path):
    slices = [make_slice(k, PixelData=np.full((ROWS, COLUMNS), hu, np.uint16).tobytes())
              for k, hu in enumerate([1064, 1094, 1079, 1109] * 7)]  # fmt: skip
    folder = write(tmp_path / "scan", slices)
    assert "1.2.3.4:2 (every 2nd slice from number 2, 14 slices)" in refusal(folder)
    assert "neighbouring slices of this acquisition alternate, expected one volume" in refusal(folder, "1.2.3.4:2")


def test_one_volume_has_no_second_acquisition(tmp_path):
    folder = write(tmp_path / "scan", make_series(12))
    assert "series 1.2.3.4 has one acquisition, expected --series UID without :2" in refusal(folder, "1.2.3.4:2")


ONE_VOLUME = {
    "breath-holds": {"AcquisitionNumber": lambda k: 1 + (k >= 7)},
    "breath-holds, the second first": {"AcquisitionTime": lambda k: f"14{10 - 5 * (k >= 7):02d}{k:02d}"},
    "rotations": {"AcquisitionNumber": lambda k: k // 4, "AcquisitionTime": lambda k: f"1403{k // 4:02d}"},
    "one number each": {"AcquisitionNumber": lambda k: k, "TriggerTime": lambda k: 13 * k},
    "times up": {"AcquisitionTime": clock(0), "ContentTime": clock(7)},
    "times down": {"AcquisitionTime": clock(50, -0.5), "AcquisitionDateTime": lambda k: f"20221208{clock(50, -2)(k)}"},
    "made in another order": {"ContentTime": lambda k: f"1403{np.random.default_rng(1).permutation(20)[k]:02d}"},
    "two at a time, in seconds": {"ContentTime": lambda k: f"1403{(k + 3 * (k % 2)) // 2:02d}"},
    "one slice made again": {
        "ContentTime": lambda k: "140359" if k == 8 else "140300",
        "KVP": lambda k: 120 + (k == 8),
    },
    "no numbers": {"AcquisitionTime": lambda k: "at noon", "SeriesNumber": lambda k: ""},
}


@pytest.mark.parametrize("marks", ONE_VOLUME.values(), ids=ONE_VOLUME)
def test_values_that_vary_within_one_volume(tmp_path, marks):
    folder = write(tmp_path / "scan", marked(0, count=20, **marks))
    assert load_series(folder)[0].shape == (COLUMNS, ROWS, 20)


@pytest.mark.parametrize("keyword", ["AcquisitionNumber", "KVP", "TriggerTime"])
def test_a_damaged_mark_is_no_reason_to_refuse(tmp_path, keyword):
    folder = write(tmp_path / "scan", marked(0, **{keyword: 77}))
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"77", b"x\xff"))
    assert load_series(folder)[0].shape == (COLUMNS, ROWS, COUNT)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans, which are not part of the repository")
def test_a_real_series_with_a_second_phase_between_its_slices(tmp_path):
    folder = tmp_path / "scan"
    folder.mkdir()
    for path in REAL.glob("*.dcm"):
        one = pydicom.dcmread(path)
        k = round((one.ImagePositionPatient[2] + 804.5) / 2)
        # Every second slice is said to be of another phase, 30 HU brighter.
        if k % 2:
            one.RescaleIntercept, one.AcquisitionTime = -994, "140500.000"
            one.AcquisitionDateTime = "20221208140500.000"
        one.save_as(folder / path.name)
    message = refusal(folder)
    assert (
        "holds 2 acquisitions under one series UID; choose by --series UID:N: :1 (AcquisitionDateTime 1403" in message
    )
    whole = load_series(REAL)[0]
    np.testing.assert_array_equal(load_series(folder, ":1")[0], whole[:, :, ::2])
    np.testing.assert_array_equal(load_series(folder, ":2")[0], whole[:, :, 1::2] + 30)
