"""Read NIfTI files with mutated headers: each is refused in one sentence, or read as the standard says.

The seed and the number name a case: `mutated(seed)` makes it again.
"""

import signal
import struct
from pathlib import Path

import numpy as np
from nifti_bytes import FIELDS, HEADER_BYTES, TYPES, Found, gzip_member, nifti, parse, set_field

from core.scans.volumes import Reading, load_labels, load_scan, read_geometry

MAX_GIB = 0.01  # of float32 voxels: 2.7 million
SECONDS = 20  # after which a case counts as hanging
CLASSES = 6
SHAPE = (4, 5, 3)
EDGES = {
    "h": (-32768, -1, 0, 1, 2, 3, 4, 7, 8, 16, 127, 128, 256, 348, 512, 768, 1024, 1280, 1536, 2304, 32767),
    "i": (-(2**31), -1, 0, 1, 2, 3, 4, 77, 348, 540, 2**31 - 1),
    "q": (-(2**63), -1, 0, 1, 2, 3, 4, 5, 352, 544, 2**31, 2**40, 2**63 - 1),
    "B": (0, 1, 2, 3, 4, 7, 10, 255),
    "f": (np.nan, np.inf, -np.inf, -1, -0.0, 0, 1e-40, 1e-6, 0.05, 0.1, 0.5, 1, 1.5, 2, 20, 25, 352, 352.5, 1e10, 3e38),
    "s": (b"", b"n+1\0", b"ni1\0", b"n+2\0\r\n\x1a\n", b"N+1\0"),
}
EDGES["d"] = (*EDGES["f"], 1e300, -1e300)


def base_of(rng: np.random.Generator) -> tuple[bytearray, int, str]:
    """Return a good file of one of all types, versions and byte orders; version and byte order."""
    version, endian = int(rng.integers(1, 3)), "<>"[rng.integers(2)]
    kind = list(TYPES.values())[rng.integers(len(TYPES))]
    stored = rng.integers(0, CLASSES, SHAPE).astype(kind)
    affine = np.diag([*rng.uniform(0.5, 5, 3), 1.0])[:, [*rng.permutation(3), 3]]
    affine[:3, 3] = rng.uniform(-500, 500, 3)
    quatern = rng.uniform(-0.5, 0.5, 3)
    fields = {"quatern": tuple(quatern), "qoffset": tuple(affine[:3, 3]), "qform_code": int(rng.integers(0, 3))}
    if rng.random() < 0.3:
        fields |= {"sform_code": 0, "qform_code": 1, "pixdim": (rng.choice([-1, 1]), 1.5, 0.75, 3, 0, 0, 0, 0)}
    if rng.random() < 0.3:
        fields |= {"scl_slope": 0.5, "scl_inter": rng.choice([0, 1])}
    if rng.random() < 0.2 and "sform_code" not in fields:
        unit, factor = [(1, 1e-3), (3, 1e3)][rng.integers(2)]
        scaled = affine.copy()
        scaled[:3] *= factor
        fields |= {"xyzt_units": unit, "srow": tuple(scaled[:3].ravel())}
    if rng.random() < 0.2:
        fields |= {"dim": (5, *SHAPE, 1, 1, 1, 1)}
    return bytearray(nifti(stored, affine, version, endian, **fields)), version, endian


def mutate(content: bytearray, version: int, endian: str, rng: np.random.Generator) -> bytearray:
    """One change: a bit or a byte of the header, a field at an edge, or the file's length."""
    header = min(HEADER_BYTES[version] + 4, len(content))
    how = rng.random()
    if how < 0.35 and header:
        content[rng.integers(header)] ^= 1 << rng.integers(8)
    elif how < 0.4 and header:
        content[rng.integers(header)] = rng.integers(256)
    elif how < 0.9 and len(content) >= HEADER_BYTES[version]:
        name = list(FIELDS[version])[rng.integers(len(FIELDS[version]))]
        offset, form = FIELDS[version][name]
        count = 1 if form.endswith("s") else int(form[:-1] or 1)
        values = list(np.array(read_field(content, offset, form, endian), dtype=object))
        edges = EDGES[form[-1]]
        values[rng.integers(count)] = edges[rng.integers(len(edges))]
        set_field(content, name, tuple(values), version, endian)
    elif how < 0.95:
        del content[rng.integers(len(content) + 1) :]
    else:
        content += bytes(rng.integers(0, 256, rng.integers(1, 64)).tolist())
    return content


def read_field(content: bytearray, offset: int, form: str, endian: str) -> tuple:
    return struct.unpack_from(endian + form, content, offset)


def mutated(seed: int) -> tuple[bytes, bool]:
    """Return the unpacked file of a seed, and whether it is to be packed."""
    rng = np.random.default_rng(seed)
    content, version, endian = base_of(rng)
    for _ in range(rng.integers(0, 4)):
        content = mutate(content, version, endian, rng)
    return bytes(content), bool(rng.integers(2))


def attempt(read, path: Path, *arguments: object) -> tuple | None:
    """Return what a reader gives, None when it refuses; anything but one sentence that names the file is a failure."""
    warnings = []
    try:
        return read(path, *arguments, Reading(max_gib=MAX_GIB, warn=warnings.append))
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(path) in message, message
        assert message.count("\n") == 0, message
        assert len(message) < 1000
        return None
    finally:
        assert all("\n" not in warning for warning in warnings)


def complaint(content: bytes, path: Path) -> str | None:
    """Return what is wrong about the way the reader takes a file; None where nothing is."""
    found = parse(content)
    scan, labels = attempt(load_scan, path), attempt(load_labels, path, CLASSES)
    geometry = attempt(read_geometry, path)
    if scan is None:
        surely_fine = not found.refuse and not found.either
        return f"refused, but is fine: {attempt_message(path)}" if surely_fine else None
    if found.refuse:
        return f"accepted in spite of {found.refuse}"
    if geometry is None:
        return "read_geometry refuses what load_scan accepts"
    voxels, geometry = scan
    if geometry.stored_shape != found.scaled.shape:
        return f"shape {geometry.stored_shape}, not {found.scaled.shape}"
    wrong = np.abs(geometry.affine - found.affine).max() / max(1, np.abs(found.affine).max())
    if not wrong < 1e-5:
        return f"affine {geometry.affine.tolist()}, not {found.affine.tolist()}"
    expected = found.scaled.astype(np.float32)
    if not np.allclose(geometry.from_ras(voxels), expected, rtol=2e-6, atol=np.abs(expected).max() * 1e-6):
        return "values"
    return complaint_about_labels(labels, found)


def attempt_message(path: Path) -> str:
    try:
        load_scan(path, Reading(max_gib=MAX_GIB, warn=lambda message: None))
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def complaint_about_labels(labels: tuple | None, found: Found) -> str | None:
    """Return the same of a file read as a label map."""
    whole = np.rint(found.scaled)
    far = np.abs(found.scaled - whole).max()
    fine = far < 0.049 and whole.min() >= 0 and whole.max() < CLASSES
    if labels is None:
        return "refused as labels, but is fine" if fine and not found.either else None
    if not (far < 0.051 and whole.min() >= 0 and whole.max() < CLASSES):
        return f"accepted as labels with values {np.unique(found.scaled)[[0, -1]]}, {far} from whole numbers"
    return None if np.array_equal(labels[1].from_ras(labels[0]), whole) else "wrong labels"


def run(seeds: range, folder: Path) -> dict[str, int]:
    """Try the cases; how many were accepted and refused."""

    def hangs(*_):
        raise AssertionError(f"case {seed} hangs")

    outcomes = {"accepted": 0, "refused": 0}
    wrong = {}
    old = signal.signal(signal.SIGALRM, hangs)
    try:
        for seed in seeds:
            signal.alarm(SECONDS)
            content, packed = mutated(seed)
            path = folder / ("case.nii.gz" if packed else "case.nii")
            path.write_bytes(gzip_member(content) if packed else content)
            try:
                trouble = complaint(content, path)
            except Exception as error:  # all of them are noted, so that one run shows every kind
                trouble = f"{type(error).__name__}: {error}"
            if trouble:
                wrong[seed] = trouble
            outcomes["refused" if parse(content).refuse else "accepted"] += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert not wrong, f"{len(wrong)} cases: {dict(list(wrong.items())[:12])}"
    return outcomes


def test_untouched_files_are_all_read(tmp_path):
    for seed in range(60):
        content, _, _ = base_of(np.random.default_rng(seed))
        (tmp_path / "case.nii").write_bytes(content)
        assert not parse(bytes(content)).refuse
        assert not complaint(bytes(content), tmp_path / "case.nii")


def test_mutated_headers(tmp_path):
    outcomes = run(range(400), tmp_path)
    assert min(outcomes.values()) > 80, outcomes


def test_flipped_bits_of_packed_files(tmp_path):
    """Every bit of a gzip file, one after the other: refused, or the values are the same."""
    rng = np.random.default_rng(0)
    stored = rng.integers(0, CLASSES, SHAPE).astype(np.int16)
    packed = gzip_member(nifti(stored, np.diag([2.0, 2, 2, 1])), level=9)
    path = tmp_path / "case.nii.gz"
    accepted = []
    for bit in range(0, len(packed) * 8, 3):
        changed = bytearray(packed)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        labels = attempt(load_labels, path, CLASSES)
        if labels is not None:
            accepted.append(bit // 8)
            assert np.array_equal(labels[1].from_ras(labels[0]), stored), bit
    # Of the gzip header only time, flags and system may change; deflate has a few bits that mean nothing.
    assert len([byte for byte in accepted if byte >= 10]) < 8, accepted


def test_every_length_of_a_packed_file_but_the_whole_is_refused(tmp_path):
    stored = np.random.default_rng(0).integers(0, CLASSES, SHAPE).astype(np.int16)
    packed = gzip_member(nifti(stored, np.diag([2.0, 2, 2, 1])))
    path = tmp_path / "case.nii.gz"
    for length in range(len(packed)):
        path.write_bytes(packed[:length])
        assert attempt(load_scan, path) is None, length
    path.write_bytes(packed)
    assert attempt(load_scan, path) is not None
