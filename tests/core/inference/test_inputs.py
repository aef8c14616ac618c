"""Which scans the inputs are: NIfTI files, folders, DICOM series; which inputs are refused."""

from pathlib import Path

import numpy as np
import pytest
from dicom_files import make_series, write
from helpers import make_voxels, save_scan

from core.inference.inputs import choose_scans, find_inputs, named_case, read_scan
from core.scans.nifti import Reading

SHAPE = (8, 6, 4)


@pytest.fixture
def scans(tmp_path) -> Path:
    """Return a folder of three scans: one, three, two."""
    for seed, case in enumerate(("one", "two", "three")):
        save_scan(tmp_path / "scans" / f"{case}_0000.nii.gz", make_voxels(SHAPE, seed))
    return tmp_path / "scans"


@pytest.fixture
def series(tmp_path) -> Path:
    """Return the folder of a DICOM series of 8 x 6 x 4 voxels."""
    return write(tmp_path / "patients" / "p1", make_series())


def test_files_folders_and_series_are_cases_in_order(scans, series):
    found, refused = choose_scans([f"{series}/", str(scans)], None, None)
    names = {case: scans / f"{case}_0000.nii.gz" for case in ("one", "three", "two")}
    assert list(found.items()) == [*sorted((names | {"p1": series}).items())]
    assert refused == []
    assert choose_scans([str(scans)], ["two"], None) == ({"two": names["two"]}, [])


def test_one_scan_named_twice_is_one_case(scans, monkeypatch):
    monkeypatch.chdir(scans)
    found, refused = find_inputs(["one_0000.nii.gz", str(scans / "one_0000.nii.gz"), str(scans)])
    assert (list(found), refused) == (["one", "three", "two"], [])


def test_two_scans_of_one_case_are_refused(scans, series, tmp_path):
    more = save_scan(tmp_path / "more" / "one.nii", make_voxels(SHAPE))
    with pytest.raises(ValueError, match=f"^case one: {scans / 'one_0000.nii.gz'} and {more} both mean it"):
        find_inputs([str(scans), str(more.parent)])
    other = write(tmp_path / "p1", make_series())
    with pytest.raises(ValueError, match=f"^case p1: {series} and {other} both mean it"):
        find_inputs([str(series), str(other)])


@pytest.mark.parametrize("show", [True, False])
def test_a_missing_input_is_named_where_asked_for_and_the_others_are_found(scans, tmp_path, capsys, show):
    (tmp_path / "empty").mkdir()
    inputs = [scans / "two_0000.nii.gz", tmp_path / "none.nii.gz", tmp_path / "empty"]
    found, refused = choose_scans(list(map(str, inputs)), None, None, show)
    assert (list(found), refused) == (["two"], inputs[1:])
    err = capsys.readouterr().err
    if show:
        missing, empty = err.splitlines()
        assert missing == f"error: {inputs[1]}: no such file or folder"
        assert empty.startswith(f"error: {inputs[2]}: no scan in this folder")
    else:
        assert err == ""


def test_nothing_but_missing_inputs(tmp_path):
    nowhere = tmp_path / "nowhere"
    assert choose_scans([str(nowhere)], ["two"], "1.2.3") == ({}, [nowhere])


def test_folders_with_both_kinds_and_folders_of_series_are_refused(series, capsys):
    both = save_scan(series / "converted.nii.gz", make_voxels(SHAPE)).parent
    assert find_inputs([str(both)]) == ({}, [both])
    message = f"error: {both}: holds DICOM and NIfTI files; give the NIfTI file, or move one kind away\n"
    assert capsys.readouterr().err == message
    assert list(find_inputs([str(both / "converted.nii.gz")])[0]) == ["converted"]
    (both / "converted.nii.gz").unlink()
    assert find_inputs([str(series.parent)]) == ({}, [series.parent])
    assert capsys.readouterr().err == (
        f"error: {series.parent}: its DICOM series are in folders within it; give those, say {series.parent}/*\n"
    )
    write(series.parent / "p2", make_series(5))
    assert list(find_inputs(list(map(str, series.parent.iterdir())))[0]) == ["p1", "p2"]


def test_a_series_can_be_asked_for_only_where_there_is_one(scans, series):
    inputs = [str(scans), str(series)]
    assert "p1" in choose_scans(inputs, None, "1.2.3.4")[0]
    for cases in (["two"], ["one", "three"]):
        with pytest.raises(ValueError, match=r"^--series: none of the scans is DICOM, expected the folder of a series"):
            choose_scans(inputs, cases, "1.2.3.4")


def test_the_case_of_an_input_that_cannot_be_read(tmp_path, monkeypatch):
    assert named_case(Path("nowhere/FLARE22_Tr_0001_0000.nii.gz")) == "FLARE22_Tr_0001"
    (tmp_path / "p1").mkdir()
    monkeypatch.chdir(tmp_path / "p1")
    assert named_case(Path(".")) == "p1"


def test_a_series_and_a_file_are_read_alike(series, tmp_path):
    voxels, geometry = read_scan(series, Reading())
    assert (voxels.shape, voxels.dtype, geometry.shape) == (SHAPE, np.float32, SHAPE)
    file = save_scan(tmp_path / "same.nii.gz", voxels.astype(np.int16), affine=np.diag([0.8, 0.5, 2.5, 1]))
    again, other = read_scan(file, Reading())
    np.testing.assert_array_equal(again, voxels)
    assert other.spacing_mm == pytest.approx(geometry.spacing_mm)
