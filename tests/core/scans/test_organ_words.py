"""Organ names by their words: sides, pairs and the standard names, however they are spelled."""

import numpy as np
import pytest

from core.config import load_config
from core.scans.anatomy import Organ, plausible_ml, swapped_sides
from core.scans.organ_words import STANDARD_NAMES, mirrored_ids, standard_name
from core.scoring.flare22 import TOLERANCES_MM, compared_box, tolerance_mm

RIGHT = ("right kidney", "kidney_right", "Right-Kidney", "kidney (right)", "RIGHT KIDNEY", "right_kidney")


@pytest.mark.parametrize("right", RIGHT)
def test_sides_are_found_however_a_name_is_spelled(right):
    left = right.replace("right", "left").replace("Right", "Left").replace("RIGHT", "LEFT")
    assert standard_name(right) == "right kidney"
    assert mirrored_ids(["background", right, "liver", left]) == [0, 3, 2, 1]
    assert plausible_ml(left) == plausible_ml("left kidney") == (30, 700)
    found = {right: Organ(150, -40, (), (150,)), left: Organ(150, 40, (), (150,))}  # mirrored
    assert swapped_sides(found) == [(right, left)]


def test_a_side_without_a_partner_is_refused():
    with pytest.raises(ValueError, match="augment_flip: organs holds 'lung_right' but no left lung"):
        mirrored_ids(["background", "liver", "lung_right"])


def test_standard_names_are_the_default_organs_and_those_of_the_protocol():
    assert load_config().organs[1:] == STANDARD_NAMES == tuple(TOLERANCES_MM)


def test_the_protocols_rules_hold_for_other_spellings():
    assert tolerance_mm("inferior_vena_cava", 9) == 2
    assert tolerance_mm("lung", 9) == 9
    box = (slice(0, 2), slice(0, 2), slice(3, 8))
    wider = (slice(0, 3), slice(0, 2), slice(0, 9))
    for name in ("aorta", "Inferior_Vena_Cava"):
        assert compared_box(name, box, wider) == (slice(0, 3), slice(0, 2), slice(3, 7))
    assert compared_box("liver", box, wider)[2] == slice(0, 9)
    assert np.isfinite(tolerance_mm("Esophagus", 9))
