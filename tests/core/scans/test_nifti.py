"""What is accepted of NIfTI files, and where their voxels come to lie; the odd and broken ones: test_strangers.py."""

import os
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_bytes import gzip_member, nifti

from core.scans.nifti import Reading
from core.scans.volumes import load_labels, load_scan, read_geometry, save_label_map

SHAPE = (6, 5, 4)
HU = (np.arange(120).reshape(SHAPE) * 10 - 1000).astype(np.int16)
AFFINE = np.array([[2.0, 0, 0, -30], [0, 1.5, 0, 12], [0, 0, 3.0, 500], [0, 0, 0, 1]])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path, **accepted: object) -> tuple:
    """Voxels, geometry and the warnings of a scan."""
    warnings = []
    return *load_scan(path, Reading(warn=warnings.append, **accepted)), warnings


def test_a_scan_without_a_place_needs_leave(tmp_path):
    path = write(
        tmp_path / "scan.nii", nifti(HU, AFFINE, sform_code=0, qform_code=0, pixdim=(1, 2, 1.5, 3, 0, 0, 0, 0))
    )
    for refused in (load_scan, load_labels, read_geometry):
        with pytest.raises(ValueError, match=r"does not say where its voxels lie .*assume-ras"):
            refused(path)
    voxels, geometry, warnings = read(path, assume_ras=True)
    np.testing.assert_array_equal(voxels, HU)
    np.testing.assert_array_equal(geometry.affine, np.diag([2, 1.5, 3, 1]))
    assert warnings == [f"{path}: does not say where its voxels lie; taken to be in RAS+ order"]


def test_without_a_place_a_minus_in_pixdim_flips_nothing(tmp_path):
    none = {"sform_code": 0, "qform_code": 0, "pixdim": (1, -2, -1.5, 3, 0, 0, 0, 0)}
    voxels, geometry, _ = read(write(tmp_path / "scan.nii", nifti(HU, AFFINE, **none)), assume_ras=True)
    np.testing.assert_array_equal(voxels, HU)
    np.testing.assert_array_equal(geometry.affine, np.diag([2, 1.5, 3, 1]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_become_air_on_request(tmp_path, value):
    array = HU.astype(np.float32)
    array[1, 2, 3] = array[5, 4, 0] = value
    path = write(tmp_path / "scan.nii.gz", gzip_member(nifti(array, AFFINE)))
    with pytest.raises(ValueError, match="2 of 120 voxels are NaN or infinite, expected finite HU"):
        load_scan(path)
    voxels, _, warnings = read(path, replace_nonfinite=True)
    array[1, 2, 3] = array[5, 4, 0] = -1024
    np.testing.assert_array_equal(voxels, array)
    assert warnings == [f"{path}: 2 of 120 voxels are NaN or infinite; they become air (-1024 HU)"]


@pytest.mark.parametrize(("code", "factor"), [(0, 1), (2, 1), (1, 0.001), (3, 1000), (2 + 8, 1), (1 + 16, 0.001)])
def test_units_become_millimetres_and_the_header_stays(tmp_path, code, factor):
    affine = AFFINE.copy()
    affine[:3] *= factor
    path = write(tmp_path / "scan.nii", nifti(HU, affine, xyzt_units=code))
    _, geometry, warnings = read(path)
    np.testing.assert_allclose(geometry.affine, AFFINE, rtol=1e-6)
    np.testing.assert_allclose(geometry.spacing_mm, (2, 1.5, 3), rtol=1e-6)
    assert geometry.voxel_ml == pytest.approx(0.009)
    np.testing.assert_allclose(geometry.header.get_sform(), affine, rtol=1e-6)
    assert not warnings


def test_an_intercept_of_nan_is_none_and_that_said(tmp_path):
    path = write(tmp_path / "scan.nii", nifti(HU, AFFINE, scl_slope=2, scl_inter=np.nan))
    voxels, _, warnings = read(path)
    np.testing.assert_array_equal(voxels, 2.0 * HU)
    assert warnings[0] == f"{path}: has scl_inter nan; read with an intercept of 0, so check its HU"
    with pytest.raises(ValueError, match="scl_inter inf, expected finite numbers"):
        read(write(path, nifti(HU, AFFINE, scl_slope=2, scl_inter=np.inf)))


@pytest.mark.parametrize(("value", "what"), [(np.nan, "has numbers that are not finite"), (0.0, "is all zeros")])
def test_an_sform_without_a_place_leaves_it_to_the_qform(tmp_path, value, what):
    rows = np.eye(3, 4).ravel() if np.isnan(value) else np.zeros(12)
    rows[5] = value
    placed = {"qform_code": 1, "quatern": (0, 0, 0), "qoffset": (-30, 12, 500), "srow": tuple(rows)}
    path = write(tmp_path / "scan.nii", nifti(HU, AFFINE, **placed))
    _, geometry, warnings = read(path)
    np.testing.assert_array_equal(geometry.affine, AFFINE)
    assert warnings == [f"{path}: its sform {what}; the qform is used"]
    save_label_map(np.zeros(SHAPE, np.uint8), geometry, tmp_path / "labels.nii")
    np.testing.assert_array_equal(nib.load(tmp_path / "labels.nii").affine, AFFINE)


def test_of_two_places_the_sform_is_used_and_that_said(tmp_path):
    place = {"qform_code": 1, "quatern": (0, 0, 0), "pixdim": (1, 2, 1.5, 3, 0, 0, 0, 0)}
    path = write(tmp_path / "scan.nii", nifti(HU, AFFINE, **place, qoffset=(-30, 12, 507)))
    _, geometry, warnings = read(path)
    np.testing.assert_array_equal(geometry.affine, AFFINE)
    assert warnings == [f"{path}: its sform and qform put it in places 7 mm apart; the sform is used"]
    # 0.29 mm along slices 3 mm apart are less than a tenth of a voxel, though more than that in the slice.
    near = write(tmp_path / "near.nii", nifti(HU, AFFINE, **place, qoffset=(-30, 12, 500.29)))
    assert not read(near)[2]
    near = write(tmp_path / "near.nii", nifti(HU, AFFINE, **place, qoffset=(-30, 12, 500.1)))  # 0.1 mm of 1.5
    assert not read(near)[2]


@pytest.mark.parametrize(
    ("diagonal", "origin", "turned"),
    [
        ((1, 1, 1), (0, 0, 0), ""),
        ((-1, -1, 1), (0, 0, 0), " with axes turned round"),  # what SimpleITK writes of an array
        ((1, 1, 1), (0, 0, 0.5), None),
        ((1, 1, 1.001), (0, 0, 0), None),
        ((-1, -1, 1), (-120, 80, -400), None),
    ],
)
@pytest.mark.parametrize("by", ["sform", "qform"])
def test_an_identity_affine_is_doubted(tmp_path, diagonal, origin, turned, by):
    affine = nib.affines.from_matvec(np.diag(diagonal).astype(float), origin)
    file = nib.Nifti1Image(HU, affine)
    file.set_sform(affine, 2 if by == "sform" else 0)
    file.set_qform(affine, 2 if by == "qform" else 0)
    nib.save(file, tmp_path / "scan.nii")
    _, geometry, warnings = read(tmp_path / "scan.nii")
    np.testing.assert_allclose(geometry.affine, affine, atol=1e-6)
    expected = f"{tmp_path}/scan.nii: its affine is the identity{turned} (voxels of 1 mm, the first at 0, 0, 0): "
    assert [warning.startswith(expected) for warning in warnings] == ([] if turned is None else [True])
    if turned is not None:
        assert "right and left, sizes and volumes cannot be trusted" in warnings[0]


def test_shear_is_said_and_kept(tmp_path):
    for mm, degrees in ((0.9, 16.7), (3.0, 45.0)):  # of every 3 mm along Z, towards Y
        affine = AFFINE.copy()
        affine[1, 2] = mm
        path = write(tmp_path / "scan.nii", nifti(HU, affine))
        _, geometry, warnings = read(path)
        np.testing.assert_allclose(geometry.affine, affine, rtol=1e-6)
        sheared = f"its slices are sheared by {degrees} degrees (tilted gantry); the affine keeps that"
        assert warnings == [f"{path}: {sheared}"]
    turned = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, 0.2, 0.1) @ np.diag([2, 1.5, 3]), (1, 2, 3))
    assert not read(write(tmp_path / "oblique.nii", nifti(HU, turned)))[2]


def test_values_unlike_a_ct_are_warned_about(tmp_path):
    rng = np.random.default_rng(0)
    shape = (24, 24, 24)
    cases = {
        "all its voxels are -1000": np.full(shape, -1000),
        "its values go from .* without the fat and air": rng.integers(0, 800, shape),
        "0.0% of its voxels are soft tissue": np.where(rng.random(shape) < 0.5, -1000, 1500),
    }
    for words, array in cases.items():
        path = write(tmp_path / "scan.nii", nifti(array.astype(np.int16), AFFINE))
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(" ".join(read(path)[2]))
    body = np.where(rng.random(shape) < 0.1, rng.integers(-100, 200, shape), -1000)
    assert not read(write(tmp_path / "scan.nii", nifti(body.astype(np.int16), AFFINE)))[2]


def test_the_size_is_limited_before_memory_is_taken(tmp_path):
    claims = nifti(HU, AFFINE, dim=(3, 1024, 1024, 256, 1, 1, 1, 1))  # 1 GiB as float32
    for path in (write(tmp_path / "a.nii", claims), write(tmp_path / "a.nii.gz", gzip_member(claims))):
        for limit, words in ((0.5, "1024x1024x256 voxels, 1 GiB as float32, expected at most 0.5"), (8, "too few for")):
            tracemalloc.start()
            with pytest.raises(ValueError, match=words):
                load_scan(path, Reading(max_gib=limit))
            assert tracemalloc.get_traced_memory()[1] < 2**20
            tracemalloc.stop()


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    (tmp_path / "nowhere.nii").symlink_to("gone.nii")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.nii")
    words = {
        "missing.nii": "no such file",
        "nowhere.nii": "is a link to gone.nii, which does not exist",
        "loop.nii": "cannot be opened",
        "folder.nii": "is a folder, expected a NIfTI file",
        "pipe.nii": "is a pipe or a device, expected a NIfTI file",
    }
    for name, text in words.items():
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{tmp_path / name}: {text}"):
            load_scan(tmp_path / name)


def test_content_decides_what_is_packed_and_not_the_name(tmp_path):
    plain = nifti(HU, AFFINE)
    for name, content in (("plain.nii.gz", plain), ("packed.nii", gzip_member(plain)), ("no_suffix", plain)):
        np.testing.assert_array_equal(load_scan(write(tmp_path / name, content))[0], HU)


def test_a_gzip_header_without_end_is_refused(tmp_path):
    with_name = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff"  # RFC 1952: FNAME is set, and its zero byte never comes
    path = write(tmp_path / "scan.nii.gz", with_name + b"a" * 2**20)
    for refused in (load_scan, load_labels, read_geometry):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read"):
            refused(path)


def test_a_little_may_follow_the_voxels_but_not_without_end(tmp_path):
    plain = nifti(HU, AFFINE)
    np.testing.assert_array_equal(load_scan(write(tmp_path / "scan.nii", plain + bytes(1000)))[0], HU)
    packed = write(tmp_path / "scan.nii.gz", gzip_member(plain + bytes(65 * 2**20)))
    with pytest.raises(ValueError, match="more than 64 MiB follow its voxels"):
        load_scan(packed)


@pytest.mark.parametrize(("sform", "qform"), [(6, 6), (0, 99), (6, 0), (2, 7)])
def test_an_unknown_code_leaves_label_maps_their_place(tmp_path, sform, qform):
    """Nibabel would write 0 for it, and a file of two zeros does not say where it lies."""
    path = write(tmp_path / "scan.nii", nifti(HU, AFFINE, sform_code=sform, qform_code=qform))
    _, geometry, warnings = read(path)
    codes = {"sform_code": sform, "qform_code": qform}
    assert [line for line in warnings if "has the unknown" in line] == [
        f"{path}: has the unknown {name} {code}; taken as 1 (scanner)" for name, code in codes.items() if code > 5
    ]
    labels = tmp_path / "labels.nii.gz"
    save_label_map(np.zeros(SHAPE, np.uint8), geometry, labels)
    header = nib.load(labels).header
    assert {name: int(header[name]) for name in codes} == {name: 1 if c > 5 else c for name, c in codes.items()}
    np.testing.assert_array_equal(read_geometry(labels).affine, geometry.affine)
