"""NIfTI and gzip files by bytes, and what the standard says of them: libraries repair what they write and read.

Sources: nifti1.h and nifti2.h (https://nifti.nimh.nih.gov), RFC 1951 and RFC 1952.
"""

import math
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

# Where the fields that matter stand: offset and struct format.
FIELDS = {
    1: {
        "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "intent_code": (68, "h"), "datatype": (70, "h"),
        "bitpix": (72, "h"), "pixdim": (76, "8f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"),
        "scl_inter": (116, "f"), "xyzt_units": (123, "B"), "cal_max": (124, "f"), "toffset": (136, "f"),
        "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "3f"), "qoffset": (268, "3f"),
        "srow": (280, "12f"), "magic": (344, "4s"),
    },
    2: {
        "sizeof_hdr": (0, "i"), "magic": (4, "8s"), "datatype": (12, "h"), "bitpix": (14, "h"), "dim": (16, "8q"),
        "pixdim": (104, "8d"), "vox_offset": (168, "q"), "scl_slope": (176, "d"), "scl_inter": (184, "d"),
        "cal_max": (192, "d"), "toffset": (216, "d"), "qform_code": (344, "i"), "sform_code": (348, "i"),
        "quatern": (352, "3d"), "qoffset": (376, "3d"), "srow": (400, "12d"), "xyzt_units": (500, "i"),
        "intent_code": (504, "i"),
    },
}  # fmt: skip
HEADER_BYTES = {1: 348, 2: 540}
MAGIC = {1: b"n+1\0", 2: b"n+2\0\r\n\x1a\n"}
TYPES = {  # datatype codes of real scalars
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
CODES = {name: code for code, name in TYPES.items()}
MM_OF_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micron


# ---- Writing ---------------------------------------------------------------------------------------------------------


def set_field(header: bytearray, name: str, value: object, version: int = 1, endian: str = "<") -> None:
    offset, form = FIELDS[version][name]
    values = value if isinstance(value, tuple | list) else (value,)
    struct.pack_into(endian + form, header, offset, *values)


def nifti(
    array: np.ndarray,
    affine: np.ndarray,
    version: int = 1,
    endian: str = "<",
    extension: bytes = b"\0\0\0\0",
    **fields: object,
) -> bytes:
    """Return a whole file: the array's own type and shape, an sform of code 1, mm; `fields` override all that."""
    header = bytearray(HEADER_BYTES[version])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    usual = {
        "sizeof_hdr": HEADER_BYTES[version],
        "magic": MAGIC[version],
        "dim": (array.ndim, *array.shape, *[1] * (7 - array.ndim)),
        "datatype": CODES.get(array.dtype.str[1:], 0),
        "bitpix": array.dtype.itemsize * 8,
        "pixdim": (1, *spacing, 0, 0, 0, 0),
        "vox_offset": HEADER_BYTES[version] + len(extension),
        "scl_slope": 1,
        "scl_inter": 0,
        "xyzt_units": 2,
        "sform_code": 1,
        "srow": tuple(affine[:3].ravel()),
    }
    for name, value in (usual | fields).items():
        set_field(header, name, value, version, endian)
    voxels = array.astype(array.dtype.newbyteorder(endian)).tobytes(order="F")
    return bytes(header) + extension + voxels


def gzip_member(content: bytes, crc: int | None = None, size: int | None = None, level: int = 1) -> bytes:
    """Make a member as in RFC 1952: header, raw deflate data, CRC-32 and size, wrong ones where they are given."""
    return gzip_of(deflate(content, level), zlib.crc32(content) if crc is None else crc, size or len(content))


def deflate(content: bytes, level: int = 1) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def gzip_of(deflated: bytes, crc: int, size: int) -> bytes:
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + deflated + struct.pack("<II", crc, size % 2**32)


# ---- Reading, by the standard alone ----------------------------------------------------------------------------------


@dataclass
class Found:
    """What a file holds.

    Attributes:
        refuse: why a reader must refuse it.
        either: why it may refuse it as well as not.
        stored: the stored values in the file's own axes.
        scaled: them with slope and intercept, float64.
        affine: (4, 4), from the file's voxel indices to mm.
    """

    refuse: list[str] = field(default_factory=list)
    either: list[str] = field(default_factory=list)
    stored: np.ndarray | None = None
    scaled: np.ndarray | None = None
    affine: np.ndarray | None = None


def parse(content: bytes) -> Found:
    """Read an unpacked file."""
    found = Found()
    guess = guess_kind(content, found)
    if guess is None:
        return found
    version, endian = guess
    header = {
        name: struct.unpack_from(endian + form, content, offset) for name, (offset, form) in FIELDS[version].items()
    }
    shape = parse_shape(header["dim"], found)
    parse_affine(header, found)
    if shape is None:
        return found
    parse_voxels(header, content, shape, endian, version, found)
    return found


def guess_kind(content: bytes, found: Found) -> tuple[int, str] | None:
    """Return version and byte order, by the header's size first and dim[0] next."""
    if len(content) < 352:
        found.refuse.append("shorter than a header")
        return None
    for version, length in HEADER_BYTES.items():
        offset, form = FIELDS[version]["magic"]
        magic = content[offset : offset + struct.calcsize(form)]
        if magic != MAGIC[version] or len(content) < length + 4:
            continue
        orders = [e for e in "<>" if struct.unpack_from(e + "i", content)[0] == length]
        dim_form = FIELDS[version]["dim"][1][-1]
        by_dim = [e for e in "<>" if 1 <= struct.unpack_from(e + dim_form, content, FIELDS[version]["dim"][0])[0] <= 7]
        if not orders or not by_dim:
            found.either.append("sizeof_hdr or dim[0] is wrong")
        if not (orders or by_dim):
            found.refuse.append("neither sizeof_hdr nor dim[0] can be")
            return None
        if orders and by_dim and orders != by_dim:
            found.refuse.append("sizeof_hdr and dim[0] contradict each other")
            return None
        return version, (by_dim or orders)[0]
    found.refuse.append("magic")
    return None


def parse_shape(dim: tuple[int, ...], found: Found) -> tuple[int, ...] | None:
    """Return the extents without trailing ones, which must be three of 1 or more."""
    if not 1 <= dim[0] <= 7:
        found.refuse.append(f"dim[0] is {dim[0]}")
        return None
    shape = list(dim[1 : dim[0] + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3 or min(shape) < 1:
        found.refuse.append(f"shape {shape}")
        return None
    return tuple(shape)


def parse_affine(header: dict, found: Found) -> None:
    """Find the affine: from sform if its code is above 0, else from qform if its code is."""
    (sform_code,), (qform_code,) = header["sform_code"], header["qform_code"]
    if not (0 <= sform_code <= 5 and 0 <= qform_code <= 5):
        found.either.append("a code that the standard does not know")
    broken = not np.isfinite(header["srow"]).all() and qform_code > 0
    if broken:
        found.either.append("an sform that is not finite, beside a qform")
    qform = parse_qform(header, found if (sform_code <= 0 or broken) and qform_code > 0 else Found())
    if sform_code > 0 and not broken:
        affine = np.vstack([np.reshape(header["srow"], (3, 4)), [0, 0, 0, 1]]).astype(np.float64)
        if qform_code > 0 and qform is None:
            found.either.append("a second form that is broken")
    elif qform_code > 0:
        affine = qform
    else:
        found.refuse.append("neither sform nor qform")
        return
    if affine is None:
        return
    unit = header["xyzt_units"][0] & 7
    if unit not in MM_OF_UNIT:
        found.either.append(f"unit {unit}")
    affine[:3] *= MM_OF_UNIT.get(unit, 1.0)
    found.affine = affine
    if not np.isfinite(affine).all():
        found.refuse.append("affine not finite")
        return
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < 0.1 * 0.999 or spacing.max() > 20 * 1.001:
        found.refuse.append(f"spacing {spacing}")
        return
    if spacing.min() < 0.1 * 1.001 or spacing.max() > 20 * 0.999 or np.abs(affine[:3, 3]).max() > 1e5:
        found.either.append("at the edge")
    volume = abs(np.linalg.det(affine[:3, :3])) / spacing.prod()
    if volume < 1e-6:
        found.refuse.append("singular")
    elif volume < 0.5:
        found.either.append("sheared beyond any scanner")


def parse_qform(header: dict, found: Found) -> np.ndarray | None:
    """Return the matrix of nifti1.h's method 2, None where there is none."""
    b, c, d = header["quatern"]
    qfac, *spacing = header["pixdim"][:4]
    squares = b * b + c * c + d * d
    if not math.isfinite(squares) or squares > 1 + 1e-3:
        found.refuse.append("no unit quaternion")
        return None
    if squares > 1 + 1e-7:
        found.either.append("hardly a unit quaternion")
    if not all(math.isfinite(mm) and mm != 0 for mm in spacing):
        found.refuse.append("pixdim")
        return None
    if min(spacing) < 0 or qfac not in (-1, 1):
        found.either.append("pixdim")
    a = math.sqrt(max(0.0, 1 - squares))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    if squares > 1:
        turn /= squares
    affine = np.eye(4)
    affine[:3, :3] = turn * np.abs(spacing) * [1, 1, -1 if qfac < 0 else 1]
    affine[:3, 3] = header["qoffset"]
    return affine


def parse_voxels(header: dict, content: bytes, shape: tuple, endian: str, version: int, found: Found) -> None:
    """Return the stored values and what they mean."""
    (code,), (bitpix,), (offset,) = header["datatype"], header["bitpix"], header["vox_offset"]
    if code == 1536:
        found.either.append("long double")
        return
    if code not in TYPES:
        found.refuse.append(f"datatype {code}")
        return
    kind = np.dtype(endian + TYPES[code])
    if bitpix != kind.itemsize * 8:
        found.either.append("bitpix")
    if offset == 0:
        found.either.append("vox_offset 0, which some writers mean as right behind the header")
        offset = HEADER_BYTES[version] + 4
    if not math.isfinite(offset) or not HEADER_BYTES[version] + 4 <= offset <= len(content):
        found.refuse.append(f"vox_offset {offset}")
        return
    if offset != int(offset):
        found.either.append("vox_offset")
    voxels = math.prod(shape)
    if int(offset) + voxels * kind.itemsize > len(content):
        found.refuse.append("voxels are missing")
        return
    if any(content[HEADER_BYTES[version] : HEADER_BYTES[version] + 4]):
        found.either.append("header extension")
    found.stored = np.frombuffer(content, kind, voxels, int(offset)).reshape(shape, order="F")
    (slope,), (inter,) = header["scl_slope"], header["scl_inter"]
    if slope == 0:
        slope, inter = 1.0, 0.0
    elif not math.isfinite(slope):
        found.either.append("scl_slope")
        slope, inter = 1.0, 0.0
    elif math.isnan(inter):
        found.either.append("scl_inter")
        inter = 0.0
    elif not math.isfinite(inter):
        found.refuse.append("scl_inter")
        return
    with np.errstate(all="ignore"):
        found.scaled = found.stored.astype(np.float64) * slope + inter
        largest = np.abs(found.scaled).max()
    if not np.isfinite(found.scaled).all() or largest > 3.5e38:
        found.refuse.append("values that are not finite")
    elif largest > 1e38 or (slope != 1 and not 1e-30 < abs(slope) < 1e30):
        found.either.append("values at the edge of float32")
