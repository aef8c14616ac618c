"""Which organs of a made label map are trusted, and which scans are taken."""

import math

import numpy as np
import pytest

from core.scans.anatomy import Organ
from data.judging import Limits, judge

ORGANS = ("liver", "spleen", "right kidney", "left kidney")


def organ(ml: float, right_mm: float, *, apart: float = 0.0, cut: tuple[str, ...] = ()) -> Organ:
    box_mm = ((right_mm, right_mm + 60), (0, 60), (0, 60))
    return Organ(ml, right_mm, cut, ((1 - apart) * ml, apart * ml), box_mm)


# Millilitres and places of a healthy adult; +x is the patient's right here.
HEALTHY = {
    "liver": organ(1500, 60),
    "spleen": organ(200, -80),
    "right kidney": organ(160, 50),
    "left kidney": organ(160, -50),
}
AGREED = dict.fromkeys(ORGANS, 0.9)


def test_a_healthy_scan_is_taken_with_its_mean_agreement_as_weight():
    judgement = judge(HEALTHY, AGREED | {"liver": 0.96}, ORGANS, (), Limits())
    assert (judgement.reason, judgement.trusted) == ("", list(ORGANS))
    assert judgement.weight == pytest.approx((0.96 + 3 * 0.9) / 4)


@pytest.mark.parametrize(
    ("found", "agreement", "reason"),
    [
        ({"spleen": None}, {"spleen": math.nan}, "not found"),
        ({}, {"spleen": 0.79}, "agreement 0.79"),
        ({}, {"spleen": math.nan}, "agreement nan"),
        ({"spleen": organ(5, -80)}, {}, "volume of 5 mL"),
        ({"spleen": organ(9000, -80, cut=("top",))}, {}, "volume of 9000 mL"),
        ({"spleen": organ(5, -80, cut=("top",))}, {}, ""),  # cut by the scan's edge, an organ may be small
        ({"spleen": organ(200, -80, apart=0.11)}, {}, "89% in its largest piece"),
        ({"spleen": organ(200, -80, apart=0.09)}, {}, ""),
    ],
)
def test_an_organ_that_cannot_be_trusted_says_why_and_the_scan_is_taken_without_it(found, agreement, reason):
    seen = {name: each for name, each in (HEALTHY | found).items() if each}
    judgement = judge(seen, AGREED | agreement, ORGANS, (), Limits())
    assert judgement.organs["spleen"].reason == reason
    assert ("spleen" in judgement.trusted) == (reason == "")
    assert (judgement.reason, judgement.weight) == ("", pytest.approx(0.9))


def test_an_organ_that_the_box_cuts_is_not_trusted():
    judgement = judge(HEALTHY, AGREED, ORGANS, (), Limits(), {"liver": ("right", "top")})
    assert judgement.organs["liver"].reason == "cut by the right and the top of the box"
    assert judgement.trusted == ["spleen", "right kidney", "left kidney"]


def test_an_organ_that_was_not_taught_is_not_trusted_where_it_is_found():
    judgement = judge(HEALTHY | {"bladder": organ(90, 0)}, AGREED | {"bladder": 0.95}, ORGANS, (), Limits())
    assert judgement.organs["bladder"].reason == "not taught"
    assert (judgement.trusted, judgement.weight) == (list(ORGANS), pytest.approx(0.9))


def test_a_gallbladder_far_from_the_liver_is_not_taught_from():
    organs, agreement = (*ORGANS, "gallbladder"), AGREED | {"gallbladder": 0.9}
    beside = judge(HEALTHY | {"gallbladder": organ(30, 149)}, agreement, organs, (), Limits())  # the liver ends at 120
    assert beside.organs["gallbladder"].reason == ""
    far = judge(HEALTHY | {"gallbladder": organ(30, 151)}, agreement, organs, (), Limits())
    assert (far.organs["gallbladder"].reason, far.reason) == ("31 mm from the liver", "")
    assert far.trusted == list(ORGANS)


def test_scans_that_are_left_out():
    unlike = judge(HEALTHY, AGREED, ORGANS, ["it covers 900 mm along Z (200 to 300)"], Limits())
    assert unlike.reason == "unlike the training cases: it covers 900 mm along Z (200 to 300)"
    mirrored = {name: organ(each.ml, -each.right_mm) for name, each in HEALTHY.items()}
    swapped = judge(mirrored, AGREED, ORGANS, (), Limits())
    assert "right kidney to the left of left kidney" in swapped.reason
    doubtful = judge(HEALTHY, AGREED | {"spleen": 0.1, "liver": 0.1, "left kidney": 0.2}, ORGANS, (), Limits())
    assert doubtful.reason == "1 of 4 organs can be trusted"
    assert {each.weight for each in (unlike, swapped, doubtful)} == {0}
    assert judge(HEALTHY, AGREED | {"spleen": 0.1, "liver": 0.1}, ORGANS, (), Limits(trusted=0.5)).reason == ""
    assert judge({}, dict.fromkeys(ORGANS, math.nan), ORGANS, (), Limits(trusted=0)).reason != ""


def test_without_limits_a_scan_on_which_nothing_agrees_is_left_out():
    nothing = judge(HEALTHY, dict.fromkeys(ORGANS, 0.0), ORGANS, (), Limits(0, 0))
    assert (nothing.reason, nothing.weight) == ("0 of 4 organs can be trusted", 0)
    little = judge(HEALTHY, dict.fromkeys(ORGANS, 0.0) | {"liver": 1e-4}, ORGANS, (), Limits(0, 0))
    assert (little.trusted, little.weight) == (["liver"], pytest.approx(1e-4))


def test_organs_that_the_networks_were_never_taught_are_not_missed():
    seen = {name: HEALTHY[name] for name in ("liver", "spleen")}
    agreement = AGREED | dict.fromkeys(("right kidney", "left kidney"), np.nan)
    judgement = judge(seen, agreement, ("liver", "spleen"), (), Limits(trusted=1))
    assert (judgement.reason, judgement.organs["left kidney"].reason) == ("", "not taught")
