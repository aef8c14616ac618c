"""What volumes.csv says of each organ, by hand."""

import math

import numpy as np

from core.inference.measures import Measures, measure_organs
from core.inference.stages import Segmentation
from core.scans.crop import whole_box

ORGANS = ("background", "liver", "spleen", "aorta")


class Grid:
    """In place of a geometry: voxels of 2 mL."""

    voxel_ml = 2.0


def test_organs_by_hand():
    labels, hu = np.zeros((6, 5, 4), np.uint8), np.zeros((6, 5, 4), np.float32)
    labels[0, 1, 1:3], hu[0, 1, 1:3] = 1, (10, 20)  # at the left end
    labels[1, 2, 3], hu[1, 2, 3] = 1, 60  # at the top; it hangs on by a corner
    labels[4, 4, 0], hu[4, 4, 0] = 1, 70  # apart, at the front and the bottom
    labels[3, 2, 2], hu[3, 2, 2] = 3, -5
    liver, spleen, aorta = measure_organs(labels, hu, whole_box(labels.shape), Grid(), ORGANS)
    # Mean 160 / 4; the squares of 30, 20, 20, 30 sum to 2600, of which a quarter is 650.
    assert liver == Measures(8.0, 40.0, math.sqrt(650), 40.0, 2, ("left", "front", "bottom", "top"))
    assert repr(spleen) == repr(Measures(0.0, math.nan, math.nan, math.nan, 0, ()))
    assert aorta == Measures(2.0, -5.0, 0.0, -5.0, 1, ())


def test_an_organ_may_be_cut_by_the_box_as_by_the_scan():
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[2:4, 0:2, 1:3] = 2
    box = (slice(2, 4), slice(0, 3), slice(1, 3))
    hu = np.arange(12).reshape(2, 3, 2)  # of the box: 0, 1, 2, 3, (4, 5), 6, 7, 8, 9, (10, 11)
    found = measure_organs(labels, hu, box, Grid(), ORGANS)[1]
    assert (found.ml, found.hu_mean, found.hu_median, found.touches_edge) == (
        16.0,
        4.5,
        4.5,
        ("left", "right", "back", "bottom", "top"),
    )


def test_hu_are_kept_rounded_and_in_range():
    scan = Segmentation("one", "file")
    scan.keep_hu(np.array([[[-1024.4, 0.6], [3e5, -4e4]]], np.float32))
    assert scan.hu.tolist() == [[[-1024, 1], [32767, -32768]]]
    assert scan.hu.dtype == np.int16
