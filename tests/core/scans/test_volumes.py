"""Scans on disk, the network's grid, and the way back."""

import gzip
import itertools
import re
import time
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from core.scans import resample
from core.scans import volumes as preprocess
from core.scans.crop import whole_box
from core.scans.geometry import Geometry, check_same_grid
from core.scans.resample import axis_weights, logits_to_labels, resize_image, resize_labels
from core.scans.volumes import (
    DEFAULT_READING,
    load_labels,
    load_scan,
    prepare_image,
    read_geometry,
    read_nifti,
    save_label_map,
    save_probabilities,
    window_hu,
)
from core.system.files import whole_file

LABELLED = Path(__file__).parents[3] / ".." / "shared" / "data" / "labelled"
ODD = LABELLED.parent / "odd"
real_scans = pytest.mark.skipif(not LABELLED.is_dir(), reason="the real scans in ../shared/data/labelled are missing")

# A scan without any symmetry: odd and unequal extents and spacings, HU that tell every voxel from every other.
SHAPE, SPACING_MM = (5, 7, 4), (0.7, 1.5, 3.0)
HU = (np.arange(5 * 7 * 4).reshape(SHAPE) * 7 - 400).astype(np.int16)
NOISE = np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20)).astype(np.int16)
ORDERS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))  # all 48


def affine_of(oblique: bool = False) -> np.ndarray:
    """(4, 4): SPACING_MM and an origin; `oblique` turns it by 20 degrees about Z and 10 about X, and shears it."""
    matrix = np.diag(SPACING_MM)
    if oblique:
        a, b = np.radians(20), np.radians(10)
        about_z = [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]
        about_x = [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
        matrix = np.array(about_z) @ about_x @ matrix @ [[1, 0, 0], [0, 1, 0.2], [0, 0, 1]]
    return nib.affines.from_matvec(matrix, (-31.5, 12.25, 100))


def store_as(order: tuple, array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy with permuted and flipped axes, its voxels at the same places, by hand: array and affine."""
    permutation, signs = order
    to_first = np.zeros((4, 4))  # from the copy's indices to those of `array`
    to_first[3, 3] = 1
    for new, old in enumerate(permutation):
        to_first[old, new] = signs[new]
        to_first[old, 3] = 0 if signs[new] == 1 else array.shape[old] - 1
    copy = array.transpose(permutation)[tuple(slice(None, None, sign) for sign in signs)]
    return np.ascontiguousarray(copy), affine @ to_first


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None, slope: float = 1, inter: float = 0) -> Path:
    """Write a NIfTI file whose stored values are `array`."""
    file = nib.Nifti1Image(array, affine_of() if affine is None else affine)
    file.header.set_slope_inter(slope, inter)
    nib.save(file, path)
    return path


def values_by_place(path: Path) -> dict:
    """Return what nibabel alone finds: the value of every voxel by its place in mm, rounded to 0.01 mm."""
    file = nib.load(path)
    array = np.asarray(file.dataobj)
    indices = np.stack(np.meshgrid(*map(range, array.shape), indexing="ij"), axis=-1)
    places = nib.affines.apply_affine(file.affine, indices).round(2) + 0.0  # no -0.0
    return dict(zip(map(tuple, places.reshape(-1, 3).tolist()), array.ravel().tolist(), strict=True))


# ---- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oblique", [False, True])
def test_every_axis_order_gives_the_same_voxels_and_is_written_back_to_its_places(tmp_path, oblique):
    affine = affine_of(oblique)
    labels = (HU // 7 % 14).astype(np.uint8)
    places = values_by_place(write(tmp_path / "labels.nii", labels, affine))
    assert len(places) == HU.size
    geometries = []
    for i, order in enumerate(ORDERS):
        stored, stored_affine = store_as(order, HU, affine)
        voxels, geometry = load_scan(write(tmp_path / f"{i}.nii", stored, stored_affine))
        assert voxels.dtype == np.float32
        assert voxels.flags.c_contiguous
        np.testing.assert_array_equal(voxels, HU, err_msg=str(order))
        assert geometry.shape == SHAPE
        np.testing.assert_allclose(geometry.extent_mm, np.multiply(SHAPE, nib.affines.voxel_sizes(affine)), rtol=1e-6)
        np.testing.assert_allclose(geometry.spacing_mm, nib.affines.voxel_sizes(affine), rtol=1e-6)
        assert geometry.voxel_ml == pytest.approx(0.7 * 1.5 * 3.0 / 1000, rel=1e-5)  # shearing keeps volumes
        check_same_grid(geometry, read_geometry(tmp_path / "labels.nii"), "case a")

        save_label_map(labels, geometry, tmp_path / f"{i}_labels.nii")
        written = nib.load(tmp_path / f"{i}_labels.nii")
        assert written.shape == stored.shape
        np.testing.assert_array_equal(written.affine, nib.load(tmp_path / f"{i}.nii").affine)
        assert values_by_place(tmp_path / f"{i}_labels.nii") == places, order
        np.testing.assert_array_equal(load_labels(tmp_path / f"{i}_labels.nii")[0], labels)
        np.testing.assert_array_equal(geometry.to_ras(geometry.from_ras(labels)), labels)
        geometries.append(geometry)
    assert len({(g.stored_shape, tuple(g.orientation.ravel())) for g in geometries}) == 48


def test_corners_are_where_nibabel_has_them():
    stored, affine = store_as(((2, 0, 1), (-1, 1, -1)), HU, affine_of(oblique=True))
    geometry = Geometry(stored.shape, affine, nib.Nifti1Header())
    first = nib.affines.apply_affine(affine_of(oblique=True), [[0, 0, 0], [0, 0, 3], [4, 6, 3]])
    np.testing.assert_allclose(geometry.corners_mm[[0, 1, 7]], first)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, ">i2", ">f4"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_stored_types_and_byte_orders(tmp_path, kind, suffix):
    array = np.abs(HU).clip(0, 255).astype(kind)
    header = nib.Nifti1Header(endianness=">" if isinstance(kind, str) else "<")
    header.set_data_dtype(kind)
    path = tmp_path / f"scan{suffix}"
    nib.save(nib.Nifti1Image(array, affine_of(), header), path)
    assert nib.load(path).header.endianness == header.endianness
    voxels, geometry = load_scan(path)
    assert voxels.dtype == np.float32
    assert voxels.dtype.isnative
    np.testing.assert_array_equal(voxels, array)
    labels, _ = load_labels(path)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, array)
    save_label_map(labels, geometry, tmp_path / f"labels{suffix}")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / f"labels{suffix}").dataobj), array)


def test_slope_and_intercept_scale_once(tmp_path):
    # 2 * 7 - 1024 = -1010 for the voxel that stores 7.
    path = write(tmp_path / "scan.nii.gz", HU, slope=2, inter=-1024)
    voxels, geometry = load_scan(path)
    assert HU[0, 2, 2] == -330
    assert voxels[0, 2, 2] == 2 * -330 - 1024
    np.testing.assert_array_equal(voxels, np.asarray(nib.load(path).dataobj))
    # The scan's scaling must not scale what is written for it.
    labels = (HU % 14).astype(np.uint8)
    save_label_map(labels, geometry, tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "labels.nii.gz").dataobj), labels)


def test_labels_that_are_scaled_or_stored_as_floats(tmp_path):
    ids = (HU // 7 % 14).astype(np.uint8)
    scaled = write(tmp_path / "scaled.nii", ids.astype(np.int16) * 2, slope=0.5)
    shifted = write(tmp_path / "float.nii", ids + np.float32(0.04))
    for path in (scaled, shifted):
        np.testing.assert_array_equal(load_labels(path, 14)[0], ids)


def test_a_fourth_axis_of_one_is_passed_over(tmp_path):
    path = write(tmp_path / "scan.nii", HU[..., None])
    voxels, geometry = load_scan(path)
    np.testing.assert_array_equal(voxels, HU)
    save_label_map(np.zeros(SHAPE, np.uint8), geometry, tmp_path / "labels.nii")
    assert nib.load(tmp_path / "labels.nii").shape == SHAPE


def test_reading_holds_one_volume(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "READ_BYTES", 2**16)
    stored = np.zeros((128, 128, 96), np.int16)
    scan = write(tmp_path / "scan.nii.gz", stored, slope=1.5, inter=-1024)
    labels = write(tmp_path / "labels.nii.gz", stored.astype(np.uint8))
    scaled = write(tmp_path / "scaled.nii.gz", stored, slope=2)
    # In bytes a voxel: float32; uint8; int16 stored, float32 scaled and rounded, what is between them, and a mask.
    for read, path, most in ((load_scan, scan, 4), (load_labels, labels, 1), (load_labels, scaled, 2 + 3 * 4 + 1)):
        read(path)
        tracemalloc.start()
        read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (most + 0.6) * stored.size, path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("read_bytes", [1, 5 * 7 * 2 * 3, 10**6])
def test_a_scan_read_in_pieces_is_the_same(tmp_path, monkeypatch, suffix, read_bytes):
    monkeypatch.setattr(preprocess, "READ_BYTES", read_bytes)
    for i, order in enumerate(ORDERS[::5]):
        stored, affine = store_as(order, HU, affine_of())
        path = write(tmp_path / f"{i}{suffix}", stored, affine, slope=2, inter=-1024)
        np.testing.assert_array_equal(load_scan(path)[0], HU * 2.0 - 1024)
        voxels, slope, intercept, _ = read_nifti(path, DEFAULT_READING)
        assert (voxels.dtype, slope, intercept) == (np.int16, 2, -1024)
        np.testing.assert_array_equal(voxels, HU)


def test_gzip_in_several_members_is_read_to_the_end(tmp_path):
    path = write(tmp_path / "scan.nii.gz", NOISE)
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    np.testing.assert_array_equal(load_scan(path)[0], NOISE)
    path.write_bytes(gzip.compress(content) + bytes(512))  # padded, as tapes and some copies leave it
    np.testing.assert_array_equal(load_scan(path)[0], NOISE)


def test_every_damage_to_a_gzipped_scan_is_found(tmp_path):
    rng = np.random.default_rng(0)
    # With its 352 bytes of header a multiple of 8192: who stops at the last voxel has not met the checksum then.
    noise = rng.integers(0, 255, (8, 4, (4 * 8192 - 352) // 32)).astype(np.uint8)
    path = write(tmp_path / "scan.nii.gz", noise)
    # More than the voxels may stand in front of the checksum.
    longer = gzip.compress(gzip.decompress(path.read_bytes()) + rng.bytes(10**5))
    content = path.read_bytes()
    damaged = [longer[:-1], longer[:-9], longer[:-5] + bytes([longer[-5] ^ 1]) + longer[-4:]]
    damaged += [content[:length] for length in rng.integers(0, len(content), 40)]
    damaged += [content[:-cut] for cut in range(1, 10)]
    # Behind gzip's first ten bytes, of which some mean nothing; the last eight are the checksum and the length.
    for place in [*rng.integers(10, len(content), 200), *range(len(content) - 8, len(content))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for wrong in damaged:
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
            load_scan(path)
    for whole in (content, longer):
        path.write_bytes(whole)
        np.testing.assert_array_equal(load_scan(path)[0], noise)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def cut_short(path: Path) -> Path:
    """Return a gzipped scan that lacks its last third."""
    write(path, NOISE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def cut_short_plain(path: Path) -> Path:
    """Return a scan, not compressed, that lacks its last ten bytes."""
    write(path.with_suffix(""), HU)
    path.with_suffix("").write_bytes(path.with_suffix("").read_bytes()[:-10])
    return path.with_suffix("")


def one_bit_wrong(path: Path) -> Path:
    """Return a gzipped scan with one bit of one voxel changed, so that only gzip's checksum tells."""
    write(path, NOISE)
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    content[content.index(NOISE.tobytes(order="F")[9000:9040])] ^= 1  # level 0: the voxels stand there as they are
    path.write_bytes(content)
    return path


def too_large(path: Path) -> Path:
    """Return a file whose header promises 32767 voxels along each axis."""
    write(path, HU)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.full(3, 32767, "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))
    return path


def not_nifti(path: Path) -> Path:
    """Text under a scan's name."""
    path.write_text("no scan\n" * 100)
    return path


def another_format(path: Path) -> Path:
    """Return a volume that nibabel reads but that is no NIfTI."""
    path = path.with_name("scan.mgz")
    nib.save(nib.MGHImage(HU.astype(np.float32), affine_of()), path)
    return path


def with_holes(path: Path) -> Path:
    """Two voxels NaN, one infinite, one beyond float32."""
    array = HU.astype(np.float64)
    array[0, 0, 0] = array[1, 2, 3] = np.nan
    array[2, 0, 0], array[3, 0, 0] = -np.inf, 1e300
    return write(path, array)


def singular(path: Path) -> Path:
    """Return an affine that lays all of Z into one plane."""
    file = nib.Nifti1Image(HU, None)
    file.header.set_sform(np.diag([1, 1, 0, 1]), code=1)
    nib.save(file, path)
    return path


REFUSED = [
    (lambda path: path, "no such file"),
    (lambda path: path.parent, "is a folder"),
    (not_nifti, "is no NIfTI file"),
    (another_format, "is no NIfTI file"),
    (cut_short, "cannot be read to its end"),
    (cut_short_plain, "has 622 bytes, too few for the 632 that its header declares"),
    (one_bit_wrong, "CRC check failed"),
    (too_large, r"32767x32767x32767 voxels, 1.31e\+05 GiB as float32, expected at most 8"),
    (lambda path: write(path, np.zeros((4, 4, 4, 2), np.int16)), "4x4x4x2, expected one 3-D"),
    (lambda path: write(path, np.zeros((4, 4), np.int16)), "4x4, expected one 3-D"),
    (lambda path: write(path, np.zeros((2, 2, 2), np.complex64)), "type complex64 .code 32., expected real"),
    (singular, "1 x 1 x 0 mm, expected 0.1 to 20"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_files_that_are_refused_by_name(tmp_path, make, message):
    path = make(tmp_path / "scan.nii.gz")
    for read in (load_scan, load_labels):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
                read(path)
        text = str(caught.value)
        assert text.startswith(f"{path}: ")
        assert "\n" not in text


def test_voxels_that_are_not_finite_are_counted(tmp_path):
    path = with_holes(tmp_path / "scan.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=rf"scan.nii.gz: 4 of {HU.size} voxels are NaN or infinite"):
            load_scan(path)
        with pytest.raises(ValueError, match=f"of {HU.size} voxels are no whole numbers"):
            load_labels(path)


@pytest.mark.parametrize(
    ("array", "classes", "message"),
    [
        (np.array([0, 13, 14, 14]), 14, r"14 \(2 voxels\); expected 0 to 13"),
        (np.array([0, -1, -1, -1]), 14, r"-1 \(3 voxels\); expected 0 to 13"),
        (np.array([0, 255, 256, 1]), None, r"256 \(1 voxels\); expected 0 to 255"),
        (np.array([0, 1, 2.5, 3]), 14, "1 of 4 voxels are no whole numbers"),
        (np.array([0, 1, 2.06, 3]), 14, "1 of 4 voxels are no whole numbers"),
    ],
)
def test_ids_out_of_range_and_no_integers(tmp_path, array, classes, message):
    array = array.astype(np.float32 if array.dtype == np.float64 else np.int16).reshape(2, 2, 1)
    path = write(tmp_path / "labels.nii.gz", array)
    with pytest.raises(ValueError, match=message) as caught:
        load_labels(path, classes)
    assert str(caught.value).startswith(f"{path}: ")


def test_another_grid_is_refused_by_case():
    def geometry(shape=SHAPE, shift_mm=(0, 0, 0), turn=0.0) -> Geometry:
        affine = affine_of()
        affine[0, 1] += turn
        affine[:3, 3] += shift_mm
        return Geometry(shape, affine, nib.Nifti1Header())

    # A tenth of a voxel is allowed, along each axis of its own spacing: 0.07, 0.15 and 0.3 mm.
    for near in ((0.06, 0, 0), (0, 0.14, 0), (0, 0, 0.28)):
        check_same_grid(geometry(), geometry(shift_mm=near), "case a")
    far = [geometry(shift_mm=mm) for mm in ((0.08, 0, 0), (0, 0.16, 0), (0, 0, 0.32), (0, 0, 12))]
    for other in (*far, geometry(shape=(5, 7, 5)), geometry(turn=0.1)):
        with pytest.raises(ValueError, match=r"case a: the scan has 5x7x4 voxels of 0\.7x1\.5x3 mm") as caught:
            check_same_grid(geometry(), other, "case a")
        scan, label_map = str(caught.value).split(", the label map ")
        assert scan.removeprefix("case a: the scan has ") != label_map.removesuffix("; expected the same voxels")


# ---- Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (1, 0)])
def test_a_label_map_keeps_the_scans_header(tmp_path, codes):
    file = nib.Nifti1Image(HU, None)
    file.header.set_qform(affine_of(), code=codes[0])
    file.header.set_sform(affine_of(oblique=codes[0] == 0), code=codes[1])
    file.header["pixdim"][1:4] = SPACING_MM
    file.header.set_xyzt_units("mm", "sec")
    file.header["cal_max"] = 240
    file.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of the scan"))
    nib.save(file, tmp_path / "scan.nii.gz")
    _, geometry = load_scan(tmp_path / "scan.nii.gz")
    save_label_map(geometry.to_ras(np.full(SHAPE, 13, np.uint8)), geometry, tmp_path / "labels.nii.gz")
    scan, written = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "labels.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert written.shape == SHAPE
    np.testing.assert_array_equal(written.affine, scan.affine)
    for key in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units", "qoffset_x"):
        np.testing.assert_array_equal(written.header[key], scan.header[key], err_msg=key)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == codes
    assert written.header.get_xyzt_units() == ("mm", "sec")
    assert written.header.get_intent()[0] == "label"
    assert written.header["cal_max"] == 0
    assert (np.asarray(written.dataobj) == 13).all()


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_the_same_labels_give_the_same_bytes(tmp_path, monkeypatch, suffix):
    path = write(tmp_path / "scan.nii.gz", HU)
    _, geometry = load_scan(path)
    written = []
    for name, clock in (("a", 1.6e9), ("b", 1.7e9)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        save_label_map((HU // 7 % 14).astype(np.uint8), geometry, tmp_path / f"{name}{suffix}")
        written.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert written[0] == written[1]
    content = written[0]
    if suffix != ".nii":
        assert content[:4] == b"\x1f\x8b\x08\x00"  # gzip, deflate, and neither name nor comment follows
        assert content[4:8] == bytes(4)  # no time
        content = gzip.decompress(content)
    assert len(content) == 352 + HU.size


def test_probabilities_lie_in_the_scans_geometry_and_agree_with_the_labels(tmp_path, monkeypatch):
    monkeypatch.setitem(resample.SLAB_BYTES, "cpu", 4 * 3 * 7 * 4 * 2)  # two slices of three classes
    stored, affine = store_as(((1, 2, 0), (1, -1, -1)), HU, affine_of())
    geometry = read_geometry(write(tmp_path / "scan.nii.gz", stored, affine, slope=3, inter=-1000))
    logits = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    save_probabilities(logits, geometry, whole_box(geometry.shape), tmp_path / "a_probabilities.nii.gz")
    save_label_map(logits_to_labels(logits, geometry.shape), geometry, tmp_path / "a.nii.gz")
    written, labels = nib.load(tmp_path / "a_probabilities.nii.gz"), nib.load(tmp_path / "a.nii.gz")
    assert written.shape == (*stored.shape, 3)
    np.testing.assert_array_equal(written.affine, labels.affine)
    probabilities = np.asarray(written.dataobj)
    np.testing.assert_allclose(probabilities.sum(axis=3), 1, atol=3 * 0.5 / 65535 + 1e-6)
    np.testing.assert_array_equal(probabilities.argmax(axis=3), np.asarray(labels.dataobj))
    expected = F.interpolate(logits[None], size=SHAPE, mode="trilinear")[0].softmax(dim=0).numpy()
    for k in range(3):
        np.testing.assert_allclose(probabilities[..., k], store_as(((1, 2, 0), (1, -1, -1)), expected[k], affine)[0],
                                   atol=1e-5)  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "a_probabilities.nii.gz", "scan.nii.gz"]


def smooth_logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(6, 24, 20, 16): logits as a network gives them, so that most cells have one winner."""
    coarse = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse[None], size=(24, 20, 16), mode="trilinear")[0].contiguous().to(dtype)


@pytest.mark.parametrize("shape", [(45, 31, 17), (12, 40, 9), (24, 20, 16), (7, 5, 33), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense_above", [-1, 1.1])
def test_only_boundaries_are_interpolated_and_nothing_changes(shape, dtype, dense_above, monkeypatch):
    logits = smooth_logits(dtype)
    winners = logits.argmax(dim=0).to(torch.uint8).numpy()
    assert 0 < resample.cells_with_boundary(winners).mean() < 0.5
    monkeypatch.setattr(resample, "DENSE_ABOVE", dense_above)
    plain = F.interpolate(logits[None].float(), size=shape, mode="trilinear", align_corners=False)[0]
    for lying in (logits, logits[None].to(memory_format=torch.channels_last_3d)[0], logits.clone().requires_grad_()):
        labels = logits_to_labels(lying, shape)
        # Different only where two classes tie but for rounding.
        chosen = plain.gather(0, torch.from_numpy(labels.astype(np.int64))[None])[0]
        assert (plain.max(dim=0).values - chosen).max() <= 1e-6
        assert (labels != plain.argmax(dim=0).numpy()).mean() < 0.001


@pytest.mark.parametrize("dense_above", [-1, 1.1])
def test_a_class_that_wins_at_no_corner_may_win_between_them(monkeypatch, dense_above):
    monkeypatch.setattr(resample, "DENSE_ABOVE", dense_above)
    # Along X from 0 to 1: class 0 falls from 2 to 0, class 1 rises from 0 to 2, class 2 stays 1.5 and wins at 0.5.
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.5, 1.5]]).reshape(3, 2, 1, 1)
    # Five voxels in place of two have their centres at -0.3, 0.1, 0.5, 0.9 and 1.3; at 0.1 class 0 is 1.8.
    assert logits_to_labels(logits, (5, 1, 1)).ravel().tolist() == [0, 0, 2, 1, 1]


def test_the_largest_class_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0, -5.0], [1.0, 3.0, 2.0, -4.0], [0.0, 3.0, 3.0, -3.0]])
    assert resample.largest_class(scores).tolist() == [0, 1, 0, 2]  # ties go to the lower id
    many = torch.arange(256.0).reshape(256, 1)
    assert resample.largest_class(many).tolist() == [255]
    assert resample.largest_class(many.flip(0)).tolist() == [0]
    assert resample.largest_class(many[:1]).tolist() == [0]


def test_restoring_needs_no_memory_that_grows_with_the_classes(monkeypatch):
    def peak(classes: int) -> int:
        logits = torch.zeros(classes, 48, 48, 48)
        logits[1, 10:20, 10:20, 10:20] = 1
        tracemalloc.start()
        labels = logits_to_labels(logits, (96, 96, 96))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert labels.any()
        return size

    # uint8 labels, winners and which cells are mixed; the boundary of one layer at a time is small beside them.
    volumes = 96**3 + 2 * 48**3
    assert volumes < peak(4) < 1.3 * volumes
    assert peak(64) < peak(4) + 4 * 64 * 48**2  # bytes of one layer of all classes
    monkeypatch.setattr(resample, "DENSE_ABOVE", 1.1)
    logits = smooth_logits(torch.bfloat16)
    with LargestTensor() as largest:
        logits_to_labels(logits, (45, 31, 17))
    assert largest.elements == logits[:, 0].numel()


def test_cells_with_boundary_by_hand():
    winners = np.zeros((3, 3, 3), np.uint8)
    winners[1, 1, 1] = 5
    mixed = resample.cells_with_boundary(winners)
    # The eight cells that touch the middle voxel; the last layers, each its own neighbour, touch nothing.
    expected = np.zeros((3, 3, 3), bool)
    expected[:2, :2, :2] = True
    np.testing.assert_array_equal(mixed, expected)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write(tmp_path / "scan.nii", HU)
    _, geometry = load_scan(path)
    labels = tmp_path / "labels.nii"
    save_label_map(np.ones(SHAPE, np.uint8), geometry, labels)
    before = labels.read_bytes()

    def write_half(file: nib.Nifti1Image, to: dict, **kwargs: object) -> None:
        with to["image"].get_prepare_fileobj("wb") as stream:
            stream.write(before[: len(before) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(nib.Nifti1Image, "to_file_map", write_half)
        with pytest.raises(OSError, match="disk full"):
            save_label_map(np.zeros(SHAPE, np.uint8), geometry, labels)
    assert labels.read_bytes() == before
    with pytest.raises(RuntimeError), whole_file(labels):
        raise RuntimeError("before anything was written")
    assert labels.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.nii", "scan.nii"]
    save_label_map(np.zeros(SHAPE, np.uint8), geometry, labels)
    assert labels.read_bytes() != before


# ---- Values ----------------------------------------------------------------------------------------------------------


def test_the_window_by_hand():
    hu = np.array([-3024, -160, -60, 40, 240, 2000], np.float32)
    image = window_hu(hu, (-160, 240))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, [0, 0, 0.25, 0.5, 1, 1], atol=1e-7)
    assert hu[0] == -3024  # the voxels stay as they were
    for window in itertools.combinations([-1000.3, -160, -33.3, 0.1, 7, 240.7], 2):
        image = window_hu(np.linspace(*window, 50, dtype=np.float32), window)
        assert (image.min(), image.max()) == (0, 1), window


def test_what_the_network_sees_is_rounded_to_the_nearest_step():
    voxels = np.full((4, 4, 4), 40, np.float32)  # 0.5 of the window: 127.5, to the even 128
    voxels[2:] = -60  # 0.25: 63.75, to 64
    image = prepare_image(voxels, (4, 4, 4), (-160, 240))
    assert image.dtype == np.uint8
    assert (image[:2] == 128).all()
    assert (image[2:] == 64).all()


# ---- Resampling ------------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    # From 4 to 2 voxels each output lies between two inputs; from 2 to 4 a quarter of a voxel off, the ends go on.
    np.testing.assert_allclose(axis_weights(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(axis_weights(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    # From 3 to 1 the triangle is 3 wide to each side of the middle: 2/3, 1, 2/3, over their sum.
    np.testing.assert_allclose(axis_weights(3, 1, antialias=True), [[2 / 7, 3 / 7, 2 / 7]], rtol=1e-6)
    np.testing.assert_allclose(axis_weights(3, 1), [[0, 1, 0]])
    resized = resize_image(np.array([7, 14, 35], np.float32).reshape(1, 3, 1), (1, 1, 1))
    np.testing.assert_allclose(resized, [[[2 + 6 + 10]]])
    # To half, every voxel is touched without widening: the mean of two.
    resized = resize_image(np.array([1, 3, 8, 4], np.float32).reshape(1, 1, 4), (1, 1, 2))
    np.testing.assert_allclose(resized, [[[2, 6]]])


@pytest.mark.parametrize(
    ("shape", "size"),
    [((5, 7, 9), (8, 8, 8)), ((9, 11, 6), (5, 11, 7)), ((1, 2, 3), (4, 1, 16)), ((16, 8, 10), (8, 4, 5))],
)
def test_images_are_resized_as_torch_does_up_to_half(shape, size):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    resized = resize_image(image, size)
    assert resized.dtype == np.float32
    expected = F.interpolate(torch.from_numpy(image)[None, None], size=size, mode="trilinear", align_corners=False)
    np.testing.assert_allclose(resized, expected[0, 0], atol=1e-6)
    back = resize_image(resized, shape)
    assert back.shape == shape


@pytest.mark.parametrize(
    ("shape", "size"), [((23, 31, 1), (8, 8, 1)), ((1, 40, 37), (1, 9, 16)), ((30, 6, 4), (7, 6, 4))]
)
def test_shrinking_by_more_averages_as_torch_does_in_two_dimensions(shape, size):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    flat = shape.index(min(shape))  # the axis that is not resized
    slices = torch.from_numpy(np.moveaxis(image, flat, 0))[:, None]
    size_2d = [n for axis, n in enumerate(size) if axis != flat]
    expected = F.interpolate(slices, size=size_2d, mode="bilinear", antialias=True)[:, 0]
    np.testing.assert_allclose(np.moveaxis(resize_image(image, size), flat, 0), expected, atol=1e-6)


def test_a_ramp_stays_a_ramp_at_the_same_places():
    # Linear interpolation keeps a linear function of the place: voxel i of n has its centre at (i + 1/2) / n.
    def ramp(n: int) -> np.ndarray:
        x, y, z = np.meshgrid(*[(np.arange(m) + 0.5) / m for m in (n, n + 1, n + 2)], indexing="ij")
        return (x + 2 * y + 4 * z).astype(np.float32)

    for n, m in ((9, 14), (14, 9)):
        resized = resize_image(ramp(n), (m, m + 1, m + 2))
        inside = (slice(1, -1),) * 3  # beyond the outermost centres the value stays
        np.testing.assert_allclose(resized[inside], ramp(m)[inside], atol=1e-5)


def test_an_edge_from_0_to_13_never_gives_a_6():
    labels = np.zeros((7, 5, 6), np.uint8)
    labels[3:] = 13
    for size in ((16, 9, 3), (4, 4, 4), (7, 5, 6), (3, 2, 1)):
        resized = resize_labels(labels, size)
        assert resized.dtype == np.uint8
        assert resized.shape == size
        assert set(np.unique(resized)) == {0, 13}, size
    rng = np.random.default_rng(0)
    mixed = rng.choice(np.array([2, 7, 13, 255], np.uint8), (9, 8, 7))  # no background at all
    for size in ((16, 16, 16), (5, 4, 3), (9, 8, 7), (2, 2, 2)):
        assert set(np.unique(resize_labels(mixed, size))) <= {2, 7, 13, 255}, size


@pytest.mark.parametrize("size", [(16, 12, 5), (6, 6, 6), (12, 10, 8), (4, 3, 2)])
def test_labels_are_the_largest_share_of_a_linear_interpolation(size):
    blobs = ndimage.zoom(np.random.default_rng(1).integers(0, 5, (4, 4, 3)), 3, order=0)[:12, :10, :8]
    labels = blobs.astype(np.uint8)
    shares = F.one_hot(torch.from_numpy(labels).long(), 5).movedim(-1, 0)[None].double()
    shares = F.interpolate(shares, size=size, mode="trilinear", align_corners=False)[0]
    best, second = shares.topk(2, dim=0).values
    clear = (best - second > 1e-5).numpy()
    resized = resize_labels(labels, size)
    assert clear.mean() > 0.2
    np.testing.assert_array_equal(resized[clear], shares.argmax(dim=0).numpy()[clear])


def test_a_tie_goes_to_the_lower_id():
    labels = np.zeros((2, 1, 1), np.uint8)
    labels[1] = 5
    assert resize_labels(labels, (1, 1, 1)) == 0
    labels[0] = 9
    assert resize_labels(labels, (1, 1, 1)) == 5


def test_labels_are_taken_at_the_place_and_not_averaged_around_it():
    # From 3 voxels to 1 the middle one counts alone; a triangle over all three would give 1 four sevenths.
    labels = np.array([1, 2, 1], np.uint8).reshape(3, 1, 1)
    assert resize_labels(labels, (1, 1, 1)) == 2
    # An organ that lies between the places that are looked at is lost, and nothing comes instead of it.
    labels = np.array([0, 0, 0, 0, 7, 0, 0, 0, 0], np.uint8).reshape(1, 9, 1)
    assert resize_labels(labels, (1, 2, 1)).tolist() == [[[0], [0]]]


def test_a_label_map_comes_back_from_a_finer_grid():
    labels = np.random.default_rng(2).integers(0, 14, (6, 5, 4)).astype(np.uint8)
    for size in ((12, 15, 8), (7, 9, 11), (16, 16, 16)):
        finer = resize_labels(labels, size)
        assert finer.shape == size
    # Three times as fine, the middle one of three voxels lies where the coarse one was.
    np.testing.assert_array_equal(resize_labels(labels, (18, 15, 12))[1::3, 1::3, 1::3], labels)
    np.testing.assert_array_equal(resize_labels(resize_labels(labels, (18, 15, 12)), (6, 5, 4)), labels)


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest floating tensor that any operation makes; views are none."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and look at what came out."""
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().data_ptr() in given:
                continue
            if tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("grid", "shape"), [((8, 8, 6), (31, 29, 11)), ((16, 12, 10), (7, 5, 3)), ((6, 8, 10), (1, 40, 2))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_to_labels_is_interpolation_and_argmax_without_the_volumes(monkeypatch, grid, shape, dtype):
    classes = 5
    logits = torch.randn(classes, *grid, generator=torch.Generator().manual_seed(0)).to(dtype)
    full = F.interpolate(logits[None].float(), size=shape, mode="trilinear", align_corners=False)[0]
    best, second = full.topk(2, dim=0).values
    clear = (best - second > 1e-5).numpy()
    for slices in (1, 3, 1000):
        monkeypatch.setitem(resample.SLAB_BYTES, "cpu", slices * classes * shape[1] * shape[2] * 4)
        with LargestTensor() as largest:
            labels = logits_to_labels(logits, shape)
        assert labels.dtype == np.uint8
        assert labels.shape == shape
        np.testing.assert_array_equal(labels[clear], full.argmax(dim=0).numpy()[clear])
        # A slab of the result or, where the grid is larger, of the grid's slices that it is made of.
        of_grid = min(grid[0], int(np.ceil(slices * grid[0] / shape[0])) + 2) * grid[1] * grid[2]
        assert largest.elements <= classes * max(slices * shape[1] * shape[2], of_grid)
    assert clear.mean() > 0.95


def test_default_slabs_of_a_large_scan_stay_small():
    shape = (512, 512, 600)
    cuts = resample.slabs(torch.empty(14, 1, 1, 1), shape)
    assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
    assert (cuts[0].start, cuts[-1].stop) == (0, 512)
    assert max(cut.stop - cut.start for cut in cuts) * 14 * 512 * 600 * 4 <= 32 * 2**20


# ---- Real scans ------------------------------------------------------------------------------------------------------


@real_scans
@pytest.mark.parametrize("case", ["ts_example", "amos_0013"])
def test_copies_of_a_real_scan_in_other_storage_give_the_same_voxels(tmp_path, case):
    path = LABELLED / "images" / f"{case}_0000.nii.gz"
    file = nib.load(path)
    expected = np.asarray(nib.as_closest_canonical(file).dataobj, dtype=np.float32)
    np.testing.assert_array_equal(load_scan(path)[0], expected)
    stored, affine = file.dataobj.get_unscaled(), file.affine.copy()
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    for order in (((0, 1, 2), (-1, 1, 1)), ((2, 0, 1), (1, -1, -1))):
        copy, copy_affine = store_as(order, stored, turn @ affine)
        write(tmp_path / "copy.nii", copy, copy_affine, file.dataobj.slope, file.dataobj.inter)
        np.testing.assert_array_equal(load_scan(tmp_path / "copy.nii")[0], expected)


@real_scans
@pytest.mark.parametrize("case", ["ts_example", "amos_0001", "amos_0013"])
def test_real_label_maps_survive_the_networks_grid(case):
    labels, geometry = load_labels(LABELLED / "labels" / f"{case}.nii.gz", 14)
    check_same_grid(read_geometry(LABELLED / "images" / f"{case}_0000.nii.gz"), geometry, f"case {case}")
    back = resize_labels(resize_labels(labels, (256, 256, 128)), labels.shape)
    dice = []
    for organ in np.unique(labels)[1:]:
        both = np.count_nonzero((labels == organ) & (back == organ))
        dice.append(2 * both / (np.count_nonzero(labels == organ) + np.count_nonzero(back == organ)))
    assert len(dice) >= 11
    assert np.mean(dice) >= 0.95


@pytest.mark.skipif(not ODD.is_dir(), reason="the real scans in ../shared/data/odd are missing")
def test_odd_real_files(tmp_path):
    for path in sorted(ODD.iterdir()):
        if path.name.startswith("nibabel_example4d"):
            with pytest.raises(ValueError, match="expected one 3-D volume"):
                load_scan(path)
            continue
        voxels, geometry = load_scan(path)
        file = nib.load(path)
        expected = nib.as_closest_canonical(nib.Nifti1Image(np.squeeze(file.dataobj), file.affine))
        np.testing.assert_allclose(voxels, np.asarray(expected.dataobj, np.float32), atol=1e-4, err_msg=path.name)
        labels = (voxels > voxels.mean()).astype(np.uint8)
        save_label_map(labels, geometry, tmp_path / "labels.nii.gz")
        written = nib.load(tmp_path / "labels.nii.gz")
        np.testing.assert_array_equal(written.affine, file.affine, err_msg=path.name)
        np.testing.assert_array_equal(nib.as_closest_canonical(written).dataobj, labels, err_msg=path.name)


@pytest.mark.parametrize("padding", [None, -1024, -2000, -3024])
def test_values_that_are_1024_too_high_are_said_with_and_without_padding(padding):
    hu = np.full((16, 16, 16), -1000.0, np.float32)  # air
    hu[4:12, 4:12, 4:12] = 40  # soft tissue
    right, wrong = hu.copy(), hu + 1024
    for voxels in (right, wrong):
        if padding is not None:
            voxels[:2] = padding
    said = []
    preprocess.warn_of_values(right, said.append)
    assert said == []
    preprocess.warn_of_values(wrong, said.append)
    assert said == ["its values go from 24 to 1064 and look 1024 too high; subtract that, or is it MR?"]
