"""The box of a scan that the network sees: body and organs."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import AFFINE, AXIS_CODES, save_scan
from scipy.spatial.transform import Rotation

from core.inference.restoring import restore_labels
from core.scans.crop import (
    body_box,
    box_of,
    crop_box,
    extent_of,
    located_box,
    organs_box,
    shape_of,
    whole_box,
    widened,
    windows_along_z,
)
from core.scans.geometry import Geometry
from core.scans.volumes import load_labels, load_scan, save_label_map

AIR = -1000.0


def body_in_air(shape=(300, 200, 9), air=AIR) -> np.ndarray:
    """Return an ellipse of 40 HU with lungs in it, X 60 to 239, Y 50 to 149, over a table that it does not touch."""
    x, y, _ = np.ogrid[: shape[0], : shape[1], : shape[2]]
    voxels = np.full(shape, air, np.float32)
    inside = ((x - 149.5) / 90.1) ** 2 + ((y - 99.5) / 50.1) ** 2 <= 1
    voxels[np.broadcast_to(inside, shape)] = 40
    voxels[100:130, 80:120] = air  # a lung
    voxels[20:280, 30:33] = 200  # the table
    return voxels


@pytest.mark.parametrize("air", [AIR, -125.0, -3024.0])
def test_the_bodys_box_leaves_out_air_and_table(air):
    found = body_box(body_in_air(air=air))
    for cut, (first, last) in zip(found, ((60, 240), (50, 150), (0, 9)), strict=True):
        assert first - 2 <= cut.start <= first
        assert last <= cut.stop <= last + 2


def test_a_table_that_touches_the_body_comes_off():
    voxels = body_in_air()
    voxels[140:160, 33:52] = 200  # holds it up, 20 voxels wide: this stays with the body, but the table's sheet goes
    assert body_box(voxels)[0] == body_box(body_in_air())[0]


@pytest.mark.parametrize("shape", [(7, 9, 5), (1, 1, 1), (130, 129, 1), (513, 31, 300)])
def test_a_scan_without_air_stays_as_it_is(shape):
    voxels = np.full(shape, 30, np.float32)
    assert body_box(voxels) == whole_box(shape)
    assert shape_of(crop_box("none", voxels, voxels)) == shape


def test_air_alone_stays_as_it_is():
    assert body_box(np.full((9, 8, 7), AIR, np.float32)) == whole_box((9, 8, 7))


def test_the_organs_box_has_a_tenth_around_it_within_the_scan():
    labels = np.zeros((50, 60, 40), np.uint8)
    labels[20:40, 0:30, 25:39] = 3
    labels[30, 10, 38] = 1
    assert box_of(labels == 3) == (slice(20, 40), slice(0, 30), slice(25, 39))
    voxels = np.full(labels.shape, 30, np.float32)
    assert crop_box("organs", voxels, labels) == (slice(18, 42), slice(0, 33), slice(23, 40))
    assert crop_box("organs", voxels, np.zeros_like(labels)) == whole_box(labels.shape)
    assert widened(whole_box((5, 5, 5)), 0.1, (5, 5, 5)) == whole_box((5, 5, 5))


def test_stray_voxels_do_not_widen_the_organs_box():
    labels = np.zeros((50, 60, 40), np.uint8)
    labels[20:40, 0:30, 25:39] = 3  # 8,400 voxels
    labels[22:24, 40:42, 30:32] = 1  # a small organ, but whole
    box = organs_box(labels)
    assert box == (slice(18, 42), slice(0, 47), slice(23, 40))
    labels[0, 59, 0] = 3
    assert organs_box(labels) == box
    labels[0, 50:60, 0:20] = 3  # 200 voxels are more than 2 % of the organ
    assert organs_box(labels)[0].start == 0
    specks = np.zeros_like(labels)
    specks[10:30:2, 10:30:2, 10:20:2] = 2  # an organ without any large piece counts whole
    assert organs_box(specks) == (slice(8, 31), slice(8, 31), slice(9, 20))


def oblique() -> np.ndarray:
    """Return an affine that turns and shifts, with three spacings."""
    turn = Rotation.from_euler("xyz", [20, -15, 30], degrees=True).as_matrix()
    return nib.affines.from_matvec(turn @ np.diag([0.8, 1.3, 2.5]), [-40, 70, -300])


@pytest.mark.parametrize("crop", ["body", "organs"])
@pytest.mark.parametrize("affine", [AFFINE, oblique()], ids=["straight", "oblique"])
def test_labels_of_a_box_come_back_to_their_voxels_in_every_storage_order(tmp_path, crop, affine):
    """The network's grid is as large as the box here, so that no voxel is interpolated."""
    voxels = body_in_air((61, 53, 11))
    voxels[:] = AIR
    voxels[9:52, 14:41] = 40
    labels = np.zeros(voxels.shape, np.uint8)
    labels[12:30, 20:33, 2:9], labels[31:44, 17:30, 3:10], labels[13, 21, 4] = 1, 2, 2
    for axes in AXIS_CODES:
        scan = save_scan(tmp_path / f"{axes}_scan.nii", voxels.astype(np.int16), axes, affine)
        reference = save_scan(tmp_path / f"{axes}_labels.nii", labels, axes, affine)
        found, geometry = load_scan(scan)
        box = crop_box(crop, found, load_labels(reference)[0])
        assert math.prod(shape_of(box)) < 0.8 * found.size
        small = torch.from_numpy(load_labels(reference)[0][box]).long()
        logits = torch.nn.functional.one_hot(small, 3).movedim(-1, 0).float()
        save_label_map(restore_labels(logits, box, geometry.shape), geometry, tmp_path / "back.nii")
        back, expected = (nib.load(path) for path in (tmp_path / "back.nii", reference))
        assert np.array_equal(np.asarray(back.dataobj), np.asarray(expected.dataobj)), axes
        np.testing.assert_array_equal(back.affine, expected.affine)


def test_what_is_found_on_the_coarse_grid_is_scaled_into_the_searched_box():
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:6, 3:5, 4:9] = 2
    labels[9, 9, 9] = 1  # a stray voxel, 1 of 41, would widen the box; it is a small piece only among many
    searched, shape = (slice(100, 200), slice(0, 50), slice(7, 22)), (300, 50, 30)
    # X: 100 + 10 (2 to 6) = 120 to 160, and 4 more; Y: 5 (3 to 5) = 15 to 25, and 1; Z: 7 + 1.5 (4 to 9) = 13 to 20.5.
    labels[2:6, 3:5, 4:9] = 2
    expected = (slice(116, 164), slice(14, 26), slice(12, 22))
    labels[9, 9, 9] = 0
    assert located_box(labels, searched, shape) == expected
    big = np.zeros((100, 100, 100), np.uint8)
    big[20:60, 30:50, 40:90] = 2
    big[99, 99, 99] = 1
    assert located_box(big, searched, shape) == expected
    assert located_box(np.zeros_like(big), searched, shape) is None


def test_a_boxs_extent_is_in_mm():
    geometry = Geometry((10, 20, 30), np.diag([2.0, 3.0, 5.0, 1.0]), nib.Nifti1Header())
    assert extent_of((slice(2, 7), slice(0, 20), slice(29, 30)), geometry) == (10.0, 60.0, 5.0)


def test_a_long_box_is_cut_into_windows_that_overlap():
    box = (slice(2, 9), slice(0, 5), slice(10, 110))
    assert windows_along_z(box, 80) == [box]  # 100 slices are 1.25 times 80
    assert windows_along_z(box, math.inf) == [box]
    # 40 slices, 10 apart: from 10 to 70.
    assert [cut[2] for cut in windows_along_z(box, 40)] == [slice(start, start + 40) for start in range(10, 71, 10)]
    assert all(cut[:2] == box[:2] for cut in windows_along_z(box, 40))
