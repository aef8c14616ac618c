"""Anatomy of a data set: most cases odd in the same organ."""

import nibabel as nib
import numpy as np
import pytest

from core.scans.anatomy import Organ, comparable_ml, cut_by_box, far_apart, odd_organs, organs_in, remarks, volume_text
from core.scans.volumes import load_labels

HERE = ((0.0, 50.0),) * 3  # a box in mm


def test_most_cases_odd_in_the_same_organ_are_ids_of_another_list():
    cases = [{"liver": 1500.0, "aorta": 1300.0 + 100 * case, "spleen": 200.0} for case in range(3)]
    cases += [{"liver": 1500.0, "aorta": 100.0, "spleen": 200.0}] * 2
    assert odd_organs(cases) == (
        "ids of another list? aorta is of 1300 to 1500 mL in 3 of 5 cases, expected 10 to 600; "
        "python -m data.convert remaps ids by name"
    )
    assert odd_organs(cases[1:]) is not None  # 2 of 4
    assert odd_organs(cases[2:]) is None  # 1 of 3
    assert odd_organs(cases[:1]) is None
    assert odd_organs([{}, {}]) is None


def test_the_organ_that_is_odd_in_most_cases_is_named_and_the_others_too():
    cases = [{"aorta": 1500.0, "Kidney_Left": 4.0}, {"aorta": 1500.0, "Kidney_Left": 5.0}, {"Kidney_Left": 6.0}]
    said = odd_organs(cases)
    assert "Kidney_Left is of 4 to 6 mL in 3 of 3 cases, expected 30 to 700 (odd as well: aorta);" in said


def test_unknown_organs_are_never_odd():
    assert odd_organs([{"lung": 5000.0}] * 4) is None


def test_an_organ_cut_by_the_scan_is_not_too_small():
    found = {
        name: Organ(ml, 0.0, ("top",), (ml,), HERE) for name, ml in (("liver", 50.0), ("aorta", 900.0), ("lung", 1.0))
    }
    assert comparable_ml(found) == {"aorta": 900.0, "lung": 1.0}
    assert odd_organs([comparable_ml({"liver": found["liver"]})] * 3) is None


def test_neighbours_that_are_far_apart_are_named_with_their_distance(tmp_path):
    labels = np.zeros((20, 12, 16), np.uint8)
    labels[14:, 3:, :5] = 1  # stored from right to left: the patient's right is the first voxel
    labels[1:4, 2:4, 13:15] = 2
    nib.save(nib.Nifti1Image(labels, np.diag([-5.0, 3.0, 2.0, 1.0])), tmp_path / "labels.nii.gz")
    organs = ["background", "Liver", "gall_bladder"]
    found = organs_in(*load_labels(tmp_path / "labels.nii.gz"), organs)
    # Ten voxels of 5 mm lie between them along X, none along Y, eight of 2 mm along Z.
    gap = (50**2 + 16**2) ** 0.5
    assert far_apart(found) == [("gall_bladder", "Liver", pytest.approx(gap))]
    assert "gall_bladder 52 mm from the Liver, expected beside it" in remarks(found, organs)
    labels[4:10, 2:4, 13:15] = 2
    nib.save(nib.Nifti1Image(labels, np.diag([-5.0, 3.0, 2.0, 1.0])), tmp_path / "labels.nii.gz")
    assert far_apart(organs_in(*load_labels(tmp_path / "labels.nii.gz"), organs)) == []


def test_organs_that_a_box_cuts_inside_of_the_scan():
    labels = np.zeros((10, 12, 14), np.uint8)
    box = (slice(2, 8), slice(0, 12), slice(5, 14))
    labels[2:4, 3:5, 6:8] = 1  # at the left end of the box, which is inside of the scan
    labels[7, 0:3, 5] = 2  # at the right end and the bottom of the box, and at the back of the scan
    labels[4:6, 6:8, 10:14] = 3  # at the top of the scan
    labels[5, 8, 5:8] = 4  # at the bottom of the box, as is usual for a vessel
    labels[7, 5, 5:8] = 5  # and at its right end
    organs = ("background", "liver", "spleen", "pancreas", "aorta", "inferior vena cava")
    assert cut_by_box(labels, box, organs) == {
        "liver": ("left",), "spleen": ("right", "bottom"), "inferior vena cava": ("right",)
    }  # fmt: skip
    assert cut_by_box(labels, (slice(0, 10), slice(0, 12), slice(0, 14)), organs) == {}


def test_a_small_volume_is_not_shown_as_0():
    assert [volume_text(ml) for ml in (0, 0.027, 0.099, 0.1, 1627.46)] == ["0.0", "0.027", "0.099", "0.1", "1,627.5"]
