"""Organ names by their words: sides, pairs and the standard names, however they are spelled."""

import numpy as np
import pytest

from core.config import load_config
from core.scans.anatomy import Organ, plausible_ml, swapped_sides
from core.scans.organ_words import STANDARD_NAMES, mirrored_ids, same_name, standard_name
from core.scoring.flare22 import TOLERANCES_MM, compared_box, tolerance_mm

RIGHT = ("right kidney", "kidney_right", "Right-Kidney", "kidney (right)", "RIGHT KIDNEY", "right_kidney")

HERE = ((0.0, 50.0),) * 3  # a box in mm


@pytest.mark.parametrize("right", RIGHT)
def test_sides_are_found_however_a_name_is_spelled(right):
    left = right.replace("right", "left").replace("Right", "Left").replace("RIGHT", "LEFT")
    assert standard_name(right) == "right kidney"
    assert mirrored_ids(["background", right, "liver", left]) == [0, 3, 2, 1]
    assert plausible_ml(left) == plausible_ml("left kidney") == (30, 700)
    found = {right: Organ(150, -40, (), (150,), HERE), left: Organ(150, 40, (), (150,), HERE)}  # mirrored
    assert swapped_sides(found) == [(right, left)]


@pytest.mark.parametrize("right", ["RightKidney", "kidneyRight", "rightkidney", "kidney_right2", "Kidney2Right"])
def test_sides_are_found_in_words_that_are_glued(right):
    left = right.replace("right", "left").replace("Right", "Left")
    assert mirrored_ids(["background", right, "liver", left]) == [0, 3, 2, 1]


@pytest.mark.parametrize(
    "name", ["Kidney (R)", "kidney_L", "rt kidney", "R. kidney", "rightlung", "lungright", "kidneyL", "KidneyRt", "LK"]
)
def test_a_side_that_cannot_be_told_is_refused(name):
    with pytest.raises(ValueError, match="of organs may hold a side; expected right or left as a word of its own"):
        mirrored_ids(["background", "liver", name])


def test_a_vertebra_has_no_side():
    organs = ["background", "vertebrae_L1", "vertebrae_T12", "rib_left_1", "rib_right_1", "LIVER", "RECTUM", "L1"]
    assert mirrored_ids(organs) == [0, 1, 2, 4, 3, 5, 6, 7]


def test_names_that_differ_only_in_blanks_are_the_same():
    assert standard_name("GallBladder") == standard_name("gall_bladder") == "gallbladder"
    assert standard_name("inferiorVenaCava") == "inferior vena cava"
    assert [standard_name(name) for name in ("postcava", "Oesophagus", "adrenal_left")] == [
        "inferior vena cava", "esophagus", "left adrenal gland",
    ]  # fmt: skip
    assert not same_name("left kidney", "right kidney")
    assert not same_name("肝", "脾")
    assert not same_name("-", "+")


def test_a_side_without_a_partner_is_refused():
    with pytest.raises(ValueError, match="augment_flip: organs holds 'lung_right' but no left lung"):
        mirrored_ids(["background", "liver", "lung_right"])


def test_standard_names_are_the_default_organs_and_those_of_the_protocol():
    assert load_config().organs[1:] == STANDARD_NAMES == tuple(TOLERANCES_MM)


def test_the_protocols_rules_hold_for_other_spellings():
    assert tolerance_mm("inferior_vena_cava", 9) == tolerance_mm("IVC", 9) == 2
    assert tolerance_mm("lung", 9) == 9
    box = (slice(0, 2), slice(0, 2), slice(3, 8))
    wider = (slice(0, 3), slice(0, 2), slice(0, 9))
    for name in ("aorta", "Inferior_Vena_Cava"):
        assert compared_box(name, box, wider) == (slice(0, 3), slice(0, 2), slice(3, 7))
    assert compared_box("liver", box, wider)[2] == slice(0, 9)
    assert np.isfinite(tolerance_mm("Esophagus", 9))
