"""The doctor as users run it: a healthy data set is left alone, and every illness is found with its code."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from dicom_files import make_series, write

from core.config import load_organs
from core.scans.anatomy import organs_in, swapped_sides
from core.scans.geometry import Geometry
from core.scans.volumes import load_labels
from data.doctor import main
from data.make_phantom import write_phantom

ROOT = Path(__file__).resolve().parents[2]
LABELLED = ROOT / ".." / "shared" / "data" / "labelled"
SERIES = ROOT / ".." / "shared" / "data" / "dicom" / "pelvis_jpeg2000"
ORGANS = load_organs()
RIGHT_KIDNEY, LEFT_KIDNEY = ORGANS.index("right kidney"), ORGANS.index("left kidney")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    write_phantom(folder, cases=6, shape=(96, 96, 64), seed=0)
    return folder


@pytest.fixture
def data(healthy, tmp_path) -> Path:
    """Return a copy to make ill."""
    return Path(shutil.copytree(healthy, tmp_path / "data"))


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_doctor(*arguments: object) -> Ended:
    """Run the doctor's main in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
    return Ended(code, out.getvalue(), err.getvalue())


def doctor(data_dir: Path, *flags: object) -> tuple[int, list[tuple[str, str, str]], Ended]:
    """Exit code, the findings as (case, severity, code), and how the command ended."""
    done = run_doctor(data_dir, *flags)
    assert "Traceback" not in done.stderr, done.stderr
    report = data_dir / "doctor" / "doctor.json"
    found = json.loads(report.read_text())["findings"] if report.is_file() else []
    assert all(finding["message"] and finding["what_to_do"] for finding in found)
    return done.returncode, [(f["case"], f["severity"], f["code"]) for f in found], done


def scan_of(data_dir: Path, number: int) -> Path:
    return data_dir / "images" / f"phantom_{number:04d}_0000.nii.gz"


def labels_of(data_dir: Path, number: int) -> Path:
    return data_dir / "labels" / f"phantom_{number:04d}.nii.gz"


def rewrite(path: Path, change, affine: np.ndarray | None = None, to: Path | None = None) -> None:
    """Return the same file with other voxels, or another affine, or both."""
    file = nib.load(path)
    array = change(np.asanyarray(file.dataobj))
    nib.save(nib.Nifti1Image(array, file.affine if affine is None else affine), to or path)


def test_a_healthy_data_set_has_no_findings(healthy):
    code, findings, done = doctor(healthy)
    assert (code, findings) == (0, [])
    assert "6 cases, 0 errors, 0 warnings" in done.stdout
    assert (healthy / "doctor" / "doctor.png").read_bytes().startswith(b"\x89PNG")
    cases = json.loads((healthy / "doctor" / "doctor.json").read_text())["cases"]
    assert len(cases) == 6
    labels, geometry = load_labels(labels_of(healthy, 1))
    liver_ml = np.count_nonzero(labels == 1) * geometry.voxel_ml
    assert cases["phantom_0001"]["volumes_ml"]["liver"] == pytest.approx(liver_ml)


def mirrored(path: Path) -> None:
    """Return the file's voxels the other way round along the axis nearest to X, under the same affine."""
    axis = int(np.argmax(np.abs(nib.load(path).affine[0, :3])))
    rewrite(path, lambda array: np.flip(array, axis))


def test_every_illness_is_found_and_nothing_else(data):
    mirrored(scan_of(data, 1))
    mirrored(labels_of(data, 1))
    swap = np.arange(256, dtype=np.uint8)
    swap[[RIGHT_KIDNEY, LEFT_KIDNEY]] = LEFT_KIDNEY, RIGHT_KIDNEY
    rewrite(labels_of(data, 2), lambda array: swap[array.astype(np.uint8)])
    packed = scan_of(data, 3).read_bytes()
    scan_of(data, 3).write_bytes(packed[: len(packed) * 6 // 10])
    labels = nib.load(labels_of(data, 4))
    moved = labels.affine.copy()
    moved[2, 3] += 12
    rewrite(labels_of(data, 4), lambda array: array, moved)
    rewrite(labels_of(data, 5), lambda array: np.where(array == 3, 14, array).astype(np.uint8))
    # The same patient again under another name, stored the other way round with the affine that belongs to it.
    file = nib.load(scan_of(data, 6))
    turned = file.affine @ np.diag([-1, 1, 1, 1.0])
    turned[:3, 3] = file.affine[:3, 3] + file.affine[:3, 0] * (file.shape[0] - 1)
    for path, copy in (
        (scan_of(data, 6), scan_of(data, 7)),
        (labels_of(data, 6), labels_of(data, 7)),
    ):
        rewrite(path, lambda array: np.flip(array, 0), turned, copy)
    shutil.copy(scan_of(data, 6), data / "images" / "lonely_0000.nii.gz")
    rewrite(scan_of(data, 6), lambda array: array + np.int16(1), to=data / "images" / "lonely_0000.nii.gz")

    code, findings, done = doctor(data)
    assert code == 1
    assert sorted(findings) == [
        ("lonely", "error", "no_partner"),
        ("phantom_0001", "error", "sides_swapped"),
        ("phantom_0001", "error", "sides_swapped"),
        ("phantom_0001", "error", "sides_swapped"),
        ("phantom_0002", "error", "sides_swapped"),
        ("phantom_0003", "error", "unreadable"),
        ("phantom_0004", "error", "grid_mismatch"),
        ("phantom_0005", "error", "bad_labels"),
        ("phantom_0006", "warning", "near_copy"),  # of lonely, one HU apart
        ("phantom_0007", "error", "duplicate"),
    ]
    assert "the right kidney lies" in done.stdout
    assert "its scan is that of phantom_0006" in done.stdout


def test_a_pair_of_which_one_is_mirrored_or_from_elsewhere_is_found(data):
    mirrored(scan_of(data, 1))
    turned = nib.load(scan_of(data, 2))
    vertical = int(np.argmax(np.abs(turned.affine[2, :3])))
    rewrite(scan_of(data, 2), lambda array: np.flip(array, vertical))
    rewrite(labels_of(data, 3), lambda array: np.roll(array, 20, axis=0))
    code, findings, done = doctor(data)
    assert code == 1
    codes = {
        case: {code for name, _, code in findings if name == case} for case in dict.fromkeys(f[0] for f in findings)
    }
    assert codes["phantom_0001"] == {"mirrored"}
    assert codes["phantom_0002"] == {"mirrored"}
    assert "misplaced" in codes["phantom_0003"]
    assert codes.keys() == {"phantom_0001", "phantom_0002", "phantom_0003"}
    assert "left and right mirrored" in done.stdout
    assert "bottom and top mirrored" in done.stdout


def test_copies_that_are_not_the_same_voxels_are_found(data):
    rng = np.random.default_rng(0)
    noisy = data / "images" / "noisy_0000.nii.gz"
    rewrite(scan_of(data, 1), lambda array: array + rng.integers(-20, 21, array.shape).astype(np.int16), to=noisy)
    shutil.copy(labels_of(data, 1), data / "labels" / "noisy.nii.gz")
    small = nib.load(scan_of(data, 2))
    nib.save(small.slicer[::2, ::2, ::2], data / "images" / "small_0000.nii.gz")
    nib.save(nib.load(labels_of(data, 2)).slicer[::2, ::2, ::2], data / "labels" / "small.nii.gz")
    code, findings, done = doctor(data)
    assert code == 0
    assert ("phantom_0001", "warning", "near_copy") in findings or ("noisy", "warning", "near_copy") in findings
    assert ("small", "warning", "near_copy") in findings
    assert [finding[2] for finding in findings].count("near_copy") == 2
    assert "its scan looks like that of phantom_0002 (correlation 0.9" in done.stdout


def test_two_files_of_a_case_are_a_finding(data):
    shutil.copy(labels_of(data, 1), data / "labels" / "phantom_0001_0000.nii.gz")
    (data / "labels" / "phantom_0002.nii.gz").unlink()
    (data / "labels" / "phantom_0002.nii").mkdir()
    code, findings, _ = doctor(data)
    assert code == 1
    assert findings == [("phantom_0001", "error", "two_files"), ("phantom_0002", "error", "unreadable")]


@pytest.mark.skipif(not SERIES.is_dir(), reason="the real series in ../shared/data/dicom is missing")
def test_a_dicom_series_is_read(tmp_path):
    code, findings, done = doctor(SERIES, "--output", tmp_path / "out")
    assert code == 0
    assert {finding[0] for finding in findings} <= {SERIES.name}
    assert f"{SERIES.name} " in done.stdout
    assert not (SERIES / "doctor").exists()
    data = tmp_path / "data"
    shutil.copytree(SERIES, data / "images" / "patient")
    (data / "labels").mkdir()
    code, findings, _ = doctor(data)
    assert code == 1
    assert {("patient", "warning", "dicom"), ("patient", "error", "no_partner")} <= set(findings)
    assert ("patient", "error", "unreadable") not in findings


def test_values_of_a_dicom_series_are_looked_at(tmp_path):
    write(tmp_path / "series", make_series(RescaleIntercept=0))
    done = run_doctor(tmp_path / "series", "--output", tmp_path / "out")
    assert "warning: series: its values go from 1011 to 1047 and look 1024 too high" in done.stdout


def test_ranges_over_the_cases_are_printed(healthy):
    _, _, done = doctor(healthy)
    rows = {line.split("  ")[0].strip(): line.split() for line in done.stdout.splitlines()}
    liver = [
        np.count_nonzero(labels == 1) * geometry.voxel_ml
        for labels, geometry in (load_labels(labels_of(healthy, number)) for number in range(1, 7))
    ]
    expected = [f"{value:.4g}" for value in (min(liver), np.median(liver), max(liver))]
    assert rows["liver, mL (6)"][-3:] == expected


def test_what_is_odd_is_a_warning(data):
    rewrite(labels_of(data, 1), lambda array: np.zeros_like(array))
    rewrite(labels_of(data, 2), lambda array: np.where(array == 4, 0, array).astype(np.uint8))
    # A spleen of one voxel in the middle of its place.
    labels, _ = load_labels(labels_of(data, 3))
    assert (labels == 3).any()

    def shrink(array: np.ndarray) -> np.ndarray:
        places = np.argwhere(array == 3)
        array = np.where(array == 3, 0, array).astype(np.uint8)
        array[tuple(places[len(places) // 2])] = 3
        return array

    rewrite(labels_of(data, 3), shrink)
    rewrite(scan_of(data, 4), lambda array: (array.astype(np.int32) + 700).astype(np.int16))
    code, findings, done = doctor(data)
    assert code == 0
    assert [finding for finding in findings if finding[0] != "phantom_0004"] == [
        ("phantom_0001", "warning", "no_organs"),
        ("phantom_0002", "warning", "organ_absent"),
        ("phantom_0003", "warning", "odd_volume"),
    ]
    assert ("phantom_0004", "warning", "outlier") in findings
    assert "without pancreas" in done.stdout


def test_wrong_usage(tmp_path, healthy):
    assert doctor(tmp_path)[0] == 2
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    code, _, done = doctor(tmp_path)
    assert code == 2
    assert "neither images nor labels has a file" in done.stderr
    assert doctor(healthy, "--workers", "0")[0] == 2


def test_sides_in_world_coordinates_by_hand():
    organs = ("background", "right kidney", "left kidney")
    for first, expected in ((1, []), (2, [("right kidney", "left kidney")])):
        # In RAS+ order X grows to the right: the larger index is the patient's right.
        labels = np.zeros((20, 6, 6), np.uint8)
        labels[14:18, 2:4, 2:4] = first
        labels[2:6, 2:4, 2:4] = 3 - first
        for affine in (np.diag([2.0, 2, 2, 1]), np.diag([-2.0, 2, 2, 1])):
            header = nib.Nifti1Header()
            geometry = Geometry((20, 6, 6), affine, header)
            found = organs_in(labels, geometry, organs)
            assert swapped_sides(found) == expected
            assert found["right kidney"].ml == pytest.approx(4 * 2 * 2 * 8 / 1000)
            apart = abs(found["right kidney"].right_mm - found["left kidney"].right_mm)
            assert apart == pytest.approx(24)
            assert not found["right kidney"].cut


@pytest.mark.skipif(not LABELLED.is_dir(), reason="the real scans in ../shared/data/labelled are missing")
def test_real_scans_have_their_organs_on_the_right_side(tmp_path):
    code, findings, _ = doctor(LABELLED, "--output", tmp_path / "out")
    assert code == 0
    found = json.loads((tmp_path / "out" / "doctor.json").read_text())["findings"]
    assert findings == []  # none is written into the data
    assert [(f["case"], f["code"], f["message"]) for f in found] == [
        ("amos_0001", "organ_absent", "without right adrenal gland, esophagus"),
        ("amos_0013", "organ_absent", "without esophagus"),
        ("ts_example", "organ_absent", "without esophagus"),
    ]


def test_organs_are_missed_where_annotated_csv_says_so_in_whatever_spelling(data, tmp_path):
    gone = [RIGHT_KIDNEY, ORGANS.index("duodenum")]
    rewrite(labels_of(data, 1), lambda array: np.where(np.isin(array, gone), 0, array))
    folder = tmp_path / "parent" / "FLARE22Train"  # the doctor is given the folder above, as train.py may be
    folder.parent.mkdir()
    data.rename(folder)
    (folder / "annotated.csv").write_text("case,organs\nphantom_0001,Liver;Right_Kidney;lever\nphantom_1,liver\n")
    code, findings, done = doctor(folder.parent, "--workers", "1")
    assert (code, findings) == (0, [("phantom_0001", "warning", "organ_absent")])
    assert "phantom_0001: without right kidney; " in done.stdout
    assert "annotated.csv: lever is none of organs" in done.stderr
    assert "lists phantom_1, expected ids of the 6 cases" in done.stderr
    (folder / "weights.csv").write_text("case,weight\nphantom_0001,2\n")
    code, _, done = doctor(folder.parent, "--workers", "1")
    assert code == 2
    assert "the weight of phantom_0001 is 2, expected a number above 0 and at most 1" in done.stderr


def test_values_stored_too_high_are_said_and_the_label_map_is_not_blamed(data):
    def too_high(array: np.ndarray, padding: int) -> np.ndarray:
        array = array.astype(np.int16) + np.int16(1024)
        array[:6, :6], array[:6, :3] = padding, padding + 9
        return array

    rewrite(scan_of(data, 1), lambda array: too_high(array, -2000))
    rewrite(scan_of(data, 2), lambda array: too_high(array, -1024))  # which fat and air of a scan could have
    _, findings, done = doctor(data, "--workers", "1")
    found = {case: {code for name, _, code in findings if name == case} for case in ("phantom_0001", "phantom_0002")}
    assert "odd_file" in found["phantom_0001"]
    assert "too_high" in found["phantom_0002"]
    assert not {"misplaced", "mirrored"} & (found["phantom_0001"] | found["phantom_0002"])
    for case in found:
        assert [line for line in done.stdout.splitlines() if case in line and "look 1024 too high" in line]


def test_ids_of_another_list_are_said_once_for_the_data_set(data):
    for number in range(1, 5):
        rewrite(labels_of(data, number), lambda array: np.choose(array, [0, 5, 2, 3, 4, 1, *range(6, 14)]).astype("u1"))
    _, findings, done = doctor(data, "--workers", "1")
    assert [finding for finding in findings if finding[2] == "other_ids"] == [("all cases", "warning", "other_ids")]
    (said,) = (line for line in done.stdout.splitlines() if "ids of another list?" in line)
    assert " mL in 4 of 6 cases, expected " in said
    assert "python -m data.convert remaps ids by name" in said


@pytest.mark.slow
def test_a_case_name_that_is_not_utf8(data):
    for path in (scan_of(data, 1), labels_of(data, 1)):
        path.rename(path.with_name(path.name.replace("phantom_0001", "M\udcfcller")))
    command = [sys.executable, "-m", "data.doctor", data, "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0)
    assert b"M\xfcller" in done.stdout
    assert "M\udcfcller" in json.loads((data / "doctor" / "doctor.json").read_text())["cases"]
    assert (data / "doctor" / "doctor.png").is_file()
