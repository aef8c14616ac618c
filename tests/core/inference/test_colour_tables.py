"""organs.ctbl and organs.label, read as 3D Slicer and ITK-SNAP read them."""

import re

from core.inference.colour_tables import colour_tables

ORGANS = ("background", "liver", 'the "right"\tkidney', "spleen")


def test_each_organ_has_its_name_and_colour():
    tables = colour_tables(ORGANS)
    slicer = [line.split() for line in tables["organs.ctbl"].splitlines() if line[0] != "#"]
    # Of ORGAN_COLOURS: #9d4300, #d8df06, #944882.
    assert slicer == [
        ["0", "background", "0", "0", "0", "0"],
        ["1", "liver", "157", "67", "0", "255"],
        ["2", 'the_"right"_kidney', "216", "223", "6", "255"],
        ["3", "spleen", "148", "72", "130", "255"],
    ]
    line = re.compile(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+"([^"]*)"')
    itk_snap = [line.fullmatch(each).groups() for each in tables["organs.label"].splitlines()[1:]]
    assert itk_snap == [
        ("0", "0", "0", "0", "0", "0", "0", "Clear Label"),
        ("1", "157", "67", "0", "1", "1", "1", "liver"),
        ("2", "216", "223", "6", "1", "1", "1", "the 'right' kidney"),
        ("3", "148", "72", "130", "1", "1", "1", "spleen"),
    ]
