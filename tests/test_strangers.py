"""Odd, broken and hostile files through the scripts as users run them: each is handled rightly or refused in words.

All good scans below hold the same patient, in another form each, so that all their label maps must be the same. The
files are made by bytes (nifti_bytes.py), since libraries repair what they write. A verdict is None where a file must be
read, and rightly; EITHER where it may be refused as well; or else a pattern in the sentence that must refuse it.
"""

import csv
import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from isal import isal_zlib
from nifti_bytes import deflate, gzip_member, gzip_of, nifti, set_field
from warm import Script

from core.checkpoint import save_checkpoint
from core.config import Config, load_config, save_config
from core.network import build_network

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 180  # seconds for a script; a FIFO or a bomb would take longer
MAX_MIB = 900  # of a script's memory, of which torch takes 300; a bomb that goes off takes 2000 and more

# ---- The patient -----------------------------------------------------------------------------------------------------

SHAPE = (20, 18, 12)
STEPS = np.random.default_rng(0).integers(0, 256, (5, 6, 4)).repeat(4, 0).repeat(3, 1).repeat(3, 2)  # (20, 18, 12)
HU = (4 * STEPS - 1000).astype(np.int16)  # in steps of 4, so that every type can hold it with slope and intercept
AFFINE = np.array([[2.0, 0, 0, -30], [0, 1.5, 0, 12], [0, 0, 3.0, 500], [0, 0, 0, 1]])
ORGANS = ("background", "liver", "spleen", "left kidney")
LABELS = (STEPS // 64).astype(np.uint8)  # ids 0 to 3
EITHER = "either"  # the standard says no more than that it should not be so


def scan(array: np.ndarray = HU, affine: np.ndarray = AFFINE, **fields: object) -> bytes:
    return nifti(array, affine, **fields)


def field(content: bytes, name: str, value: object) -> bytes:
    changed = bytearray(content)
    set_field(changed, name, value)
    return bytes(changed)


def typed(kind: str, slope: float, inter: float, **fields: object) -> bytes:
    """Return the patient in a type, with slope and intercept that give its HU again."""
    stored = (HU.astype(np.float64) - inter) / slope
    assert np.array_equal(stored.astype(kind).astype(np.float64), stored)
    return scan(stored.astype(kind), scl_slope=slope, scl_inter=inter, **fields)


def with_value(value: float) -> bytes:
    array = HU.astype(np.float32)
    array[3, 4, 5] = value
    return scan(array)


def oblique(b: float = 0.0, c: float = 0.0, d: float = 0.0, **fields: object) -> bytes:
    """Return the patient placed by a qform alone."""
    return scan(sform_code=0, qform_code=1, quatern=(b, c, d), qoffset=(-30, 12, 500), **fields)


def units(factor: float, unit: int) -> bytes:
    affine = AFFINE.copy()
    affine[:3] *= factor
    return scan(affine=affine, xyzt_units=unit)


def huge(shape: tuple[int, ...], pack: bool) -> bytes:
    """Return a header that claims much, and a few bytes behind it."""
    content = field(scan(), "dim", (3, *shape, 1, 1, 1, 1))[:4000]
    return gzip_member(content) if pack else content


def bomb(declared: bytes, gib: float) -> bytes:
    """Return a good file that goes on with zeros: a MiB of them is a block of a kilobyte, written many times."""
    mib = bytes(2**20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(mib) + packer.flush(zlib.Z_FULL_FLUSH)
    start = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = start.compress(declared) + start.flush(zlib.Z_FULL_FLUSH)
    crc, count = zlib.crc32(declared), int(gib * 1024)
    for _ in range(count):
        crc = isal_zlib.crc32(mib, crc)
    return gzip_of(deflated + block * count + deflate(b""), crc, len(declared) + count * 2**20)


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def no_affine() -> bytes:
    return scan(sform_code=0, qform_code=0)


PACKED = gzip_member(scan())
TWO_MEMBERS = gzip_member(scan()[:5000]) + gzip_member(scan()[5000:])
SINGULAR = AFFINE.copy()
SINGULAR[:3, 1] = SINGULAR[:3, 0]
TILTED = AFFINE.copy()
TILTED[1, 2] = 0.9
NOT_FINITE = AFFINE.copy()
NOT_FINITE[1, 1] = np.nan
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"

# ---- Scans, in one folder through infer.py ---------------------------------------------------------------------------

# By file name: the bytes, and the verdict.
SCANS: dict[str, tuple[bytes, str | None]] = {
    # Good ones
    "plain.nii": (scan(), None),
    "packed.nii.gz": (PACKED, None),
    "uint8.nii": (typed("u1", 4, -1000), None),
    "int8.nii": (typed("i1", 4, -488), None),
    "int16_big_endian.nii": (scan(endian=">"), None),
    "uint16.nii.gz": (gzip_member(typed("u2", 1, -1000)), None),
    "int32.nii": (typed("i4", 1, 0), None),
    "uint32.nii": (typed("u4", 1, -1000), None),
    "int64.nii": (typed("i8", 1, 0), None),
    "uint64.nii": (typed("u8", 4, -1000), None),
    "float32.nii": (typed("f4", 1, 0), None),
    "float64_big_endian.nii": (typed("f8", 0.5, 24, endian=">"), None),
    "nifti2.nii.gz": (gzip_member(scan(version=2)), None),
    "nifti2_big_endian.nii": (scan(version=2, endian=">"), None),
    "negative_slope.nii": (typed("i2", -2, -1000), None),
    "slope_zero.nii": (scan(scl_slope=0, scl_inter=77), None),
    "trailing_ones.nii": (scan(dim=(5, *SHAPE, 1, 1, 0, 0)), None),
    "dims_after_the_last.nii": (scan(dim=(3, *SHAPE, -7, 0, 0, 0)), None),
    "offset_further.nii": (scan(extension=b"\0" * 652), None),
    "extension.nii": (scan(extension=b"\1\0\0\0" + struct.pack("<ii", 32, 6) + b"a comment".ljust(24)), None),
    "metres.nii": (units(0.001, 1), None),
    "microns.nii": (units(1000, 3), None),
    "units_unknown.nii": (units(1, 0), None),
    "millimetres_and_seconds.nii": (units(1, 2 + 8), None),
    "qform_alone.nii": (oblique(), None),
    "qform_qfac_zero.nii": (oblique(pixdim=(0, 2, 1.5, 3, 0, 0, 0, 0)), None),
    "sform_wins.nii": (scan(qform_code=1, quatern=(1, 0, 0), qoffset=(1, 2, 3)), None),
    "sform_zero_qform_wins.nii": (oblique(srow=tuple(SINGULAR[:3].ravel())), None),
    "two_members.nii.gz": (TWO_MEMBERS, None),
    "UPPER.NII": (scan(), None),
    "Capitals.Nii.Gz": (PACKED, None),
    "Bäuche mit Leerzeichen.nii.gz": (PACKED, None),
    "日本語.nii": (scan(), None),
    "dots.in.name.nii": (scan(), None),
    "stored_blocks.nii.gz": (gzip_member(scan(), level=0), None),
    # Cut and damaged
    "empty.nii": (b"", r"(?i)empty"),
    "packed_empty.nii.gz": (b"", r"(?i)empty"),
    "cut_header.nii": (scan()[:200], r"."),
    "cut_at_352.nii": (scan()[:352], r"."),
    "cut_by_one.nii": (scan()[:-1], r"."),
    "cut_half.nii": (scan()[:4700], r"."),
    "cut_gz_header.nii.gz": (PACKED[:7], r"."),
    "cut_gz_tenth.nii.gz": (PACKED[: len(PACKED) // 10], r"."),
    "cut_gz_60_percent.nii.gz": (PACKED[: len(PACKED) * 6 // 10], r"."),
    "cut_gz_crc.nii.gz": (PACKED[:-6], r"."),
    "cut_gz_size.nii.gz": (PACKED[:-1], r"."),
    "gz_of_cut_file.nii.gz": (gzip_member(scan()[:-50]), r"."),
    "second_member_cut.nii.gz": (TWO_MEMBERS[:-40], r"."),
    "flipped_deflate.nii.gz": (flipped(PACKED, len(PACKED) // 2), r"."),
    "flipped_crc.nii.gz": (flipped(PACKED, -7), r"(?i)crc|checksum|damaged"),
    "wrong_crc.nii.gz": (gzip_member(scan(), crc=12345), r"(?i)crc|checksum|damaged"),
    "wrong_size.nii.gz": (gzip_member(scan(), size=9), r"."),
    "one_bit_of_stored.nii.gz": (flipped(gzip_member(scan(), level=0), 4000), r"(?i)crc|checksum|damaged"),
    "trailing_garbage.nii.gz": (PACKED + b"more than there should be", EITHER),
    "trailing_zeros.nii.gz": (PACKED + bytes(512), EITHER),
    "second_member_is_text.nii.gz": (PACKED + b"\x1f\x8b\x08\0 no deflate", r"."),
    # Other kinds of files
    "lfs.nii.gz": (LFS, r"LFS"),
    "lfs.of.plain.nii": (LFS, r"LFS"),
    "text.nii": (b"not a scan at all\n" * 50, r"."),
    "web_page.nii.gz": (b"<!DOCTYPE html><html>404</html>" * 20, r"."),
    "zip.nii.gz": (b"PK\x03\x04" + bytes(600), r"."),
    "wrong_magic.nii": (scan(magic=b"abc\0"), r"."),
    "pair_magic.nii": (scan(magic=b"ni1\0"), r"is one of a pair, \.hdr and \.img"),
    "analyze.nii": (scan(magic=b"\0\0\0\0"), r"lacks NIfTI's mark"),
    "gz_of_text.nii.gz": (gzip_member(b"no scan " * 100), r"."),
    "twice_packed.nii.gz": (gzip_member(PACKED), r"."),
    # Too much
    "bomb.nii.gz": (bomb(scan(), 3), r"."),
    "bomb_with_huge_header.nii.gz": (bomb(huge((2000, 2000, 2000), False), 0.2), r"(?i)GiB|max-gib"),
    "claims_4_gib.nii": (huge((1024, 1024, 1024), False), r"."),
    "claims_4_gib.packed.nii.gz": (huge((1024, 1024, 1024), True), r"."),
    "claims_32767_cubed.nii": (huge((32767, 32767, 32767), False), r"."),
    "claims_32767_cubed.packed.nii.gz": (huge((32767, 32767, 32767), True), r"(?i)GiB|max-gib"),
    "claims_2_to_93.nii": (nifti(HU, AFFINE, version=2, dim=(3, 2**31, 2**31, 2**31, 1, 1, 1, 1)), r"."),
    "claims_wrap.nii": (nifti(HU, AFFINE, version=2, dim=(3, 2**32, 2**32, 1, 1, 1, 1, 1)), r"."),
    # Shape and type
    "zero_extent.nii": (scan(dim=(3, 20, 0, 12, 1, 1, 1, 1)), r"20x0x12|extent|shape"),
    "negative_extent.nii": (scan(dim=(3, 20, -18, 12, 1, 1, 1, 1)), r"20x-18x12"),
    "no_dims.nii": (scan(dim=(0, *SHAPE, 1, 1, 1, 1)), r"."),
    "eight_dims.nii": (scan(dim=(8, *SHAPE, 1, 1, 1, 1)), r"."),
    "two_dims.nii": (scan(dim=(2, 20, 18, 1, 1, 1, 1, 1)), r"20x18|3-D"),
    "series.nii": (scan(dim=(4, 20, 18, 6, 2, 1, 1, 1)), r"20x18x6x2"),
    "five_dims.nii": (scan(dim=(5, 20, 18, 6, 1, 2, 1, 1)), r"20x18x6x1x2"),
    "complex.nii": (scan(HU.astype(np.complex64), datatype=32), r"(?i)complex|type|real"),
    "rgb.nii": (scan(np.zeros((*SHAPE, 3), np.uint8), dim=(3, *SHAPE, 1, 1, 1, 1), datatype=128, bitpix=24), r"."),
    "rgba.nii": (scan(np.zeros(SHAPE, np.uint32), datatype=2304, bitpix=32), r"."),
    "binary.nii": (scan(datatype=1, bitpix=1), r"."),
    "no_type.nii": (scan(datatype=0), r"."),
    "unknown_type.nii": (scan(datatype=777), r"type unknown \(code 777\)"),
    "wrong_bitpix.nii": (scan(bitpix=32), EITHER),
    "offset_negative.nii": (scan(vox_offset=-352), r"."),
    "offset_in_header.nii": (scan(vox_offset=100), r"."),
    "offset_nan.nii": (scan(vox_offset=np.nan), r"."),
    "offset_infinite.nii": (scan(vox_offset=np.inf), r"."),
    "offset_huge.nii": (scan(vox_offset=3e9), r"."),
    "offset_fraction.nii": (scan(vox_offset=352.5), EITHER),
    "slope_nan.nii": (scan(scl_slope=np.nan), EITHER),
    "slope_infinite.nii": (scan(scl_slope=np.inf), EITHER),
    "intercept_nan.nii": (scan(scl_slope=1, scl_inter=np.nan), None),
    "intercept_inf.nii": (scan(scl_inter=np.inf), r"inter"),
    # Place
    "no_affine.nii": (no_affine(), r"assume-ras"),
    "singular.nii": (scan(affine=SINGULAR), r"."),
    "nan_affine.nii": (scan(affine=NOT_FINITE), r"."),
    "long_quaternion.nii": (oblique(0.9, 0.9, 0.9), r"."),
    "nan_quaternion.nii": (oblique(np.nan), r"."),
    "qform_zero_spacing.nii": (oblique(pixdim=(1, 2, 0, 3, 0, 0, 0, 0)), r"."),
    "spacing_0.01.nii": (scan(affine=np.diag([0.01, 1, 1, 1.0])), r"0\.01"),
    "spacing_50.nii": (scan(affine=np.diag([1, 1, 50.0, 1])), r"50"),
    "metres_called_mm.nii": (units(0.001, 2), r"."),
    # Values
    "nan.nii": (with_value(np.nan), r"1 of 4320 voxels"),
    "infinite.nii.gz": (gzip_member(with_value(-np.inf)), r"1 of 4320 voxels"),
    "overflow.nii": (scan(np.full(SHAPE, 1e300)), r"4320 of 4320 voxels"),
    # Header extensions that lie, though the voxels are where vox_offset says
    "extension_negative.nii": (scan(extension=b"\1\0\0\0" + struct.pack("<ii", -16, 6) + bytes(8)), EITHER),
    "extension_huge.nii": (scan(extension=b"\1\0\0\0" + struct.pack("<ii", 2**31 - 16, 6) + bytes(8)), EITHER),
}  # fmt: skip
# Read with a warning that has these words.
WARNED = {
    "sform_wins.nii": r"sform",
}


def tiny_config() -> Config:
    return dataclasses.replace(
        load_config(), size=(32, 32, 16), window_hu=(-1000.0, 20.0), organs=ORGANS, channels=2, down_convs=(1, 1, 1),
        up_convs=(1, 1), cache_dir=None, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an untrained network, said to have been trained on scans like the patient."""
    path = tmp_path_factory.mktemp("training") / "best.pt"
    training_data = {
        "percentiles": [5, 50, 95],
        "extent_mm": {"min": [40.0, 27.0, 36.0], "max": [40.0, 27.0, 36.0]},
        "hu_percentiles": {"min": [-1000.0] * 3, "max": [20.0] * 3},
    }
    torch.manual_seed(1)
    save_checkpoint(path, build_network(tiny_config()), tiny_config(), epoch=1, training_data=training_data)
    return path


@dataclasses.dataclass(frozen=True)
class Done:
    """How a script ended: exit code, its output, and the most memory it took."""

    code: int
    out: str
    err: str
    mib: float

    def errors_about(self, name: str) -> list[str]:
        """Return the error lines that name a file; the last line of infer.py lists all failures."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        whole_name = re.compile(rf"[ /]{re.escape(name)}\b")
        return [line for line in lines if whole_name.search(line) and not line.startswith("error: failed: ")]


def start(*arguments: object, cwd: Path = ROOT) -> Script:
    return Script(*arguments, cwd=cwd)


def finish(process: Script) -> Done:
    """Wait for a script; a traceback is a failure of any test."""
    texts = process.communicate(TIMEOUT)
    assert "Traceback" not in texts[1], texts[1][-3000:]
    return Done(process.poll(), *texts, 0)


def run_measured(folder: Path, *arguments: object) -> Done:
    """Run a script in `folder` and measure its memory, its own and its workers' (wait4)."""
    report = folder / "memory.json"
    code = (
        "import json, resource, subprocess, sys;"
        f"done = subprocess.run(sys.argv[1:], timeout={TIMEOUT});"
        f"json.dump(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, open({str(report)!r}, 'w'));"
        "sys.exit(done.returncode)"
    )
    command = [sys.executable, "-c", code, sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return Done(done.returncode, done.stdout, done.stderr, json.loads(report.read_text()) / 1024)


@pytest.fixture(scope="module")
def segmented(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Run one infer.py on all scans."""
    folder = tmp_path_factory.mktemp("inference")
    (folder / "scans").mkdir()
    for name, (content, _) in SCANS.items():
        (folder / "scans" / name).write_bytes(content)
    arguments = ("scans", "--checkpoint", checkpoint, "--output", "out", "--device", "cpu")
    return folder, run_measured(folder, ROOT / "infer.py", *arguments)


def case_of(name: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)


def with_verdict(*kinds: object) -> list[str]:
    """Return the scans of these verdicts; `str` stands for all patterns."""
    found = {name: verdict if verdict in (None, EITHER) else str for name, (_, verdict) in SCANS.items()}
    return [name for name, kind in found.items() if kind in kinds]


def test_there_are_enough_strangers():
    assert len(SCANS) + len(MAPS) + len(CHECKPOINTS) + len(SETTINGS) >= 60
    assert len({case_of(name).lower() for name in SCANS}) == len(SCANS)


def test_the_batch_goes_on_and_ends_with_1(segmented):
    folder, done = segmented
    good = len(list((folder / "out").glob("*.nii.gz")))
    assert done.code == 1
    assert f"{good} of {len(SCANS)} scans segmented into out" in done.out
    last = done.err.splitlines()[-1]
    assert last.startswith("error: failed: ")
    assert all(case_of(name) in last for name in with_verdict(str))


def test_no_scan_takes_memory(segmented):
    assert segmented[1].mib < MAX_MIB


@pytest.mark.parametrize("name", with_verdict(None, EITHER))
def test_good_scans_are_segmented_rightly(segmented, name):
    folder, done = segmented
    if SCANS[name][1] == EITHER and not (folder / "out" / f"{case_of(name)}.nii.gz").exists():
        assert len(done.errors_about(name)) == 1
        return
    assert done.errors_about(name) == []
    file = nib.load(folder / "out" / f"{case_of(name)}.nii.gz")
    expected = nib.load(folder / "out" / "plain.nii.gz")
    labels = np.asarray(expected.dataobj)
    assert len(np.unique(labels)) > 1  # else all would be the same whatever the reader does
    assert np.array_equal(np.asarray(file.dataobj).reshape(labels.shape), labels)
    volumes = volumes_ml(folder / "out" / "volumes.csv")
    assert volumes[case_of(name)] == pytest.approx(volumes["plain"], rel=1e-3)  # which tells units apart
    assert sum(volumes["plain"]) == pytest.approx((labels > 0).sum() * 2 * 1.5 * 3 / 1000, abs=0.01)


def volumes_ml(path: Path) -> dict[str, list[float]]:
    """Return the organs' volumes by case."""
    volumes = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            volumes.setdefault(row["case"], []).append(float(row["ml"]))
    return volumes


@pytest.mark.parametrize("name", with_verdict(str))
def test_bad_scans_are_refused_in_words(segmented, name):
    folder, done = segmented
    errors = done.errors_about(name)
    assert len(errors) == 1, errors
    assert re.search(SCANS[name][1], errors[0].partition(name)[2]), errors[0]
    assert not (folder / "out" / f"{case_of(name)}.nii.gz").exists()


@pytest.mark.parametrize("name", WARNED)
def test_odd_scans_are_warned_about(segmented, name):
    warnings = [
        line for line in segmented[1].err.splitlines() if line.startswith("warning: ") and case_of(name) in line
    ]
    assert len(warnings) == 1
    assert re.search(WARNED[name], warnings[0])


def test_what_is_no_file_is_named_and_the_others_go_on(checkpoint, tmp_path):
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nowhere.nii")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    os.mkfifo(tmp_path / "fifo.nii")
    (tmp_path / "dicom.nii").write_bytes(bytes(128) + b"DICM" + bytes(600))
    (tmp_path / "good.nii").write_bytes(scan())
    (tmp_path / "link.nii").symlink_to(tmp_path / "good.nii")
    names = ("folder.nii.gz", "dangling.nii", "loop.nii", "fifo.nii", "missing.nii", "dicom.nii")
    done = finish(
        start(ROOT / "infer.py", *names, "link.nii", "--checkpoint", checkpoint, "--output", "out", cwd=tmp_path)
    )
    assert done.code == 1
    for name in names:
        assert len(done.errors_about(name)) == 1, (name, done.err)
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["link.nii.gz"]


def test_two_files_of_one_case_are_an_error(checkpoint, tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii").write_bytes(scan())
    (tmp_path / "scans" / "a_0000.nii.gz").write_bytes(PACKED)
    done = finish(start(ROOT / "infer.py", "scans", "--checkpoint", checkpoint, "--output", "out", cwd=tmp_path))
    assert done.code in (1, 2)
    assert "a_0000.nii.gz both mean it" in done.err


# ---- Label maps, in one folder through evaluate.py -------------------------------------------------------------------


def label_map(kind: str = "u1", slope: float = 1, inter: float = 0, shift: float = 0.0, **fields: object) -> bytes:
    stored = ((LABELS.astype(np.float64) - inter) / slope + shift).astype(kind)
    return nifti(stored, AFFINE, scl_slope=slope, scl_inter=inter, **fields)


def with_id(value: float, kind: str) -> bytes:
    array = LABELS.astype(kind)
    array[0, 0, 0] = value
    return nifti(array, AFFINE)


def moved(mm: float) -> bytes:
    affine = AFFINE.copy()
    affine[2, 3] += mm
    return nifti(LABELS, affine)


def other_order() -> bytes:
    """Return the same label map of the same places with its X axis stored backwards."""
    affine = AFFINE.copy()
    affine[:, 0] *= -1
    affine[0, 3] = AFFINE[0, 3] + AFFINE[0, 0] * (SHAPE[0] - 1)
    return nifti(LABELS[::-1], affine)


def mirrored() -> bytes:
    """Return a label map whose places are the mirror image of the scan's."""
    affine = AFFINE.copy()
    affine[:, 0] *= -1
    return nifti(LABELS, affine)


MAPS: dict[str, tuple[bytes, str | None]] = {
    "plain": (label_map(), None),
    "int8": (label_map("i1"), None),
    "int16_big_endian": (label_map("i2", endian=">"), None),
    "int32": (label_map("i4"), None),
    "int64": (label_map("i8"), None),
    "uint64": (label_map("u8"), None),
    "float32": (label_map("f4"), None),
    "float64": (label_map("f8"), None),
    "scaled": (label_map("u1", slope=0.5), None),
    "shifted": (label_map("i2", slope=1, inter=-3), None),
    "scaled_float": (label_map("f4", slope=0.25, inter=1), None),
    "nearly_whole": (label_map("f4", shift=0.04), None),
    "nifti2": (label_map(version=2), None),
    "other_storage_order": (other_order(), None),
    "a_hair_away": (moved(0.1), None),
    "slope_zero": (nifti(LABELS, AFFINE, scl_slope=0, scl_inter=9), None),
    "halves": (label_map("f4", shift=0.5), r"4320 of 4320 voxels"),
    "tenths": (label_map("f4", shift=0.1), r"4320 of 4320 voxels"),
    "one_fraction": (with_id(1.4, "f4"), r"1 of 4320 voxels"),
    "one_nan": (with_id(np.nan, "f4"), r"1 of 4320 voxels"),
    "one_infinite": (with_id(np.inf, "f8"), r"1 of 4320 voxels"),
    "id_4": (with_id(4, "u1"), r"4 \(1 voxel"),
    "id_255": (with_id(255, "u1"), r"255 \(1 voxel"),
    "negative": (with_id(-1, "i2"), r"-1 \(1 voxel"),
    "wraps_257": (with_id(257, "i2"), r"257 \(1 voxel"),
    "wraps_int64": (with_id(2**40 + 1, "i8"), r"1099511627777 \(1 voxel"),
    "wraps_uint64": (with_id(2**63, "u8"), r"9223372036854775808 \(1 voxel"),
    "float_id_99": (with_id(99, "f4"), r"99 \(1 voxel"),
    "float_id_1e30": (with_id(1e30, "f8"), r"."),
    "scaled_out_of_range": (nifti(LABELS, AFFINE, scl_slope=100), r"300 \("),
    "other_shape": (nifti(LABELS[:, :, :-1], AFFINE), r"20x18x11"),
    "swapped_shape": (nifti(LABELS.transpose(1, 0, 2), AFFINE), r"18x20x12"),
    "moved_12_mm": (moved(12), r"(?i)expected the same voxels|grid"),
    "moved_a_voxel": (moved(3), r"(?i)expected the same voxels|grid"),
    "mirrored": (mirrored(), r"(?i)expected the same voxels|grid"),
    "complex": (nifti(LABELS.astype(np.complex64), AFFINE, datatype=32), r"(?i)complex|type|real"),
    "cut": (label_map()[:-9], r"."),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Run one evaluate.py on all label maps, as predictions of the plain one."""
    folder = tmp_path_factory.mktemp("scoring")
    (folder / "labels").mkdir()
    (folder / "predictions").mkdir()
    for name, (content, _) in MAPS.items():
        (folder / "labels" / f"{name}.nii").write_bytes(label_map())
        (folder / "predictions" / f"{name}.nii.gz").write_bytes(gzip_member(content))
    save_config(dataclasses.replace(load_config(), organs=ORGANS), folder / "config.yaml")
    arguments = ("--predictions", "predictions", "--labels", "labels", "--config", "config.yaml", "--output", "out")
    return folder, run_measured(folder, ROOT / "evaluate.py", *arguments, "--workers", 1)


def test_all_label_maps_are_scored_or_refused(scored):
    folder, done = scored
    assert done.code == 1
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert sorted(summary["cases"]) == sorted(name for name, (_, verdict) in MAPS.items() if verdict is None)
    assert sorted(summary["refused"]) == sorted(name for name, (_, verdict) in MAPS.items() if verdict is not None)
    assert done.mib < MAX_MIB


@pytest.mark.parametrize("name", [name for name, (_, verdict) in MAPS.items() if verdict is None])
def test_good_label_maps_are_the_same_as_the_reference(scored, name):
    with open(scored[0] / "out" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == name]
    assert len(rows) == len(ORGANS) - 1
    assert all(float(row["dice"]) == 1 for row in rows)


@pytest.mark.parametrize("name", [name for name, (_, verdict) in MAPS.items() if verdict is not None])
def test_bad_label_maps_are_refused_in_words(scored, name):
    errors = [
        line for line in scored[1].err.splitlines() if line.startswith("error: ") and re.search(rf"\b{name}\b", line)
    ]
    assert len(errors) == 1, errors
    assert re.search(MAPS[name][1], errors[0]), errors[0]


def test_a_pair_that_does_not_fit_is_not_trained_on(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for case, labels in (("a", label_map()), ("b", moved(12))):
        (tmp_path / "data" / "images" / f"{case}_0000.nii").write_bytes(scan())
        (tmp_path / "data" / "labels" / f"{case}.nii").write_bytes(labels)
    done = finish(start(ROOT / "train.py", "--data-dir", "data", "--run-dir", "run", "--device", "cpu", cwd=tmp_path))
    assert done.code == 1
    assert "case b: " in done.err
    assert not (tmp_path / "run" / "last.pt").exists()


# ---- Checkpoints and settings, a process each (more of them in test_checkpoint.py and test_config.py) --------


class Harmful:
    """What a pickle may hold: a call of anything."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def harmful(path: Path, good: Path) -> None:
    content = torch.load(good, weights_only=True)
    torch.save(content | {"epoch": Harmful(f"touch '{path.parent}/it ran'")}, path)


def cut(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:-2000])


def flipped_bit(path: Path, good: Path) -> None:
    path.write_bytes(flipped(good.read_bytes(), good.stat().st_size // 2))


def not_finite(path: Path, good: Path) -> None:
    content = torch.load(good, weights_only=True)
    content["network"]["classify.bias"][1] = np.nan
    torch.save(content, path)


CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "harmful": (harmful, r"nothing in it was run"),
    "cut": (cut, r"cut short, damaged"),
    "flipped_bit": (flipped_bit, r"cut short, damaged"),
    "not_finite": (not_finite, r"classify\.bias holds NaN"),
}
SETTINGS: dict[str, tuple[str, str]] = {
    "deep": ("epochs: " + "[" * 50000, r"cannot be read as YAML \(maximum recursion depth"),
    "code": ("data_dir: !!python/object/apply:os.system ['touch ran']\n", r"line 1: could not determine a constructor"),
}


def test_checkpoints_and_settings_of_strangers_are_refused_in_words(checkpoint, tmp_path):
    """The scripts run side by side, since each takes seconds to start."""
    (tmp_path / "scan.nii").write_bytes(scan())
    running = {}
    for name, (make, words) in CHECKPOINTS.items():
        make(tmp_path / f"{name}.pt", checkpoint)
        arguments = ("scan.nii", "--checkpoint", f"{name}.pt", "--output", f"out_{name}")
        running[f"{name}.pt"] = (start(ROOT / "infer.py", *arguments, cwd=tmp_path), words)
    for name, (content, words) in SETTINGS.items():
        (tmp_path / f"{name}.yaml").write_text(content)
        running[f"{name}.yaml"] = (start(ROOT / "train.py", "--config", f"{name}.yaml", cwd=tmp_path), words)
    for name, (process, words) in running.items():
        done = finish(process)
        assert done.code == 2, (name, done.err)
        lines = done.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"error: {name}: ")
        assert re.search(words, lines[0]), lines[0]
        assert not list(tmp_path.glob(f"out_{case_of(name)}*/*.nii.gz"))
    assert not (tmp_path / "it ran").exists()
    assert not (tmp_path / "ran").exists()


def test_training_does_not_start_from_what_a_stranger_sent(checkpoint, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    (run / "last.pt").write_bytes(checkpoint.read_bytes())  # which has no optimizer
    harmful(tmp_path / "harmful.pt", checkpoint)
    config = tiny_config()
    network = ["--size", *config.size, "--channels", 2, "--down-convs", 1, 1, 1, "--up-convs", 1, 1]
    network += ["--organs", *config.organs, "--window-hu", *config.window_hu, "--cache-dir", "null", "--device", "cpu"]
    resumed = start(ROOT / "train.py", "--run-dir", run, "--resume", *network, cwd=tmp_path)
    begun = start(ROOT / "train.py", "--run-dir", other, "--init-from", "harmful.pt", *network, cwd=tmp_path)
    done = finish(resumed)
    assert done.code == 2
    assert "last.pt: lacks optimizer, scaler, cases, so that training cannot go on from it; take last.pt" in done.err
    done = finish(begun)
    assert done.code == 2
    assert "harmful.pt: cannot be read as a checkpoint: it holds other things than tensors" in done.err
    assert not other.exists()
    assert not (tmp_path / "it ran").exists()
