"""A NIfTI file from anywhere, opened with care: its header is checked before any memory is taken for its voxels.

    open_nifti(path, reading) -> NiftiFile, whose `stream()` stands at the first voxel

What a file is, packed or not, is read from its content and not from its name. "The standard" is nifti1.h and nifti2.h.
"""

import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.spatialimages import HeaderDataError

from core.scans.placement import affine_of
from core.system.exits import one_line, print_warning

MAX_GIB = 8.0  # of voxels as float32; 1024x1024x1500 take 6
HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}  # by their length in bytes, which they begin with
MAGIC_AT = {348: slice(344, 348), 540: slice(4, 12)}
SINGLE_MAGIC = {348: b"n+1\0", 540: b"n+2\0\r\n\x1a\n"}
PAIR_MAGIC = {348: b"ni1\0", 540: b"ni2\0\r\n\x1a\n"}
EXTENSION_FLAG = 4  # bytes behind the header
MAX_EXTENSIONS = 64 * 2**20  # bytes between header and voxels
MAX_BEHIND = 64 * 2**20  # bytes that may follow the voxels
MAX_DEFLATE_RATIO = 1032  # no deflated byte gives more
# By the standard's codes; of its other types no scan is made (bits, complex numbers, colours, 128-bit numbers).
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
SMALLEST_SLOPE = float(np.finfo(np.float32).tiny)  # smaller numbers lose digits, and scale no scan
# What else comes under the name of a scan, by its first bytes.
OTHER_KINDS = {
    b"version https://git-lfs": "is a Git LFS pointer and not the file itself; run git lfs pull",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"NRRD": "is an NRRD file; convert it to NIfTI",
    b"\x89PNG": "is a PNG picture, expected NIfTI",
    b"BZh": "is packed with bzip2; unpack it",
    b"\xfd7zXZ": "is packed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it",
    b"<": "is a web page or XML, expected NIfTI; was the download refused?",
}
DICOM_MAGIC_AT, DICOM_MAGIC = 128, b"DICM"
# What reading raises on damaged files; OverflowError where gzip's own header is larger than ISA-L's buffer.
READ_ERRORS = (EOFError, OSError, zlib.error, isal_zlib.error, ValueError, MemoryError, OverflowError)


@dataclass(frozen=True)
class Reading:
    """What is accepted of files that are read.

    Attributes:
        max_gib: of voxels as float32; larger files are refused before memory is taken.
        assume_ras: whether a file that does not say where its voxels lie is taken to be in RAS+ order.
        replace_nonfinite: whether NaN and infinite voxels of a scan become air, instead of refusing it.
        warn: is given what the user should know, a sentence each.
    """

    max_gib: float = MAX_GIB
    assume_ras: bool = False
    replace_nonfinite: bool = False
    warn: Callable[[str], None] = print_warning


@dataclass(frozen=True, eq=False)
class NiftiFile:
    """What a file's header says of its voxels, once it has been checked.

    Attributes:
        path: the file.
        packed: whether it is gzip.
        header: as it stands in the file, but for trailing extents of 1.
        shape: three extents in voxels.
        dtype: of the stored values, with the file's byte order.
        offset: bytes before the first voxel.
        slope: what stored values are multiplied by.
        intercept: what is added to them then.
        affine: (4, 4), from the file's voxel indices to mm in the patient.
    """

    path: Path
    packed: bool
    header: nib.Nifti1Header
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float
    affine: np.ndarray

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """Return the file, unpacked, from its first voxel on."""
        with unpacked(self.path, self.packed) as stream:
            stream.seek(self.offset)
            yield stream


def open_nifti(path: str | Path, reading: Reading, warn: Callable[[str], None]) -> NiftiFile:
    """Read and check the header of a 3-D NIfTI file.

    Args:
        path: the file.
        reading: what is accepted.
        warn: is given what the user should know of the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file and what is wrong with it.
    """
    path = Path(path)
    size = size_of(path)
    try:
        head, packed, order = read_header(path)
        length = int(np.frombuffer(head[:4], order + "i4")[0])
        header = HEADERS[length](head[:length], endianness=order, check=False)
        check_magic(head[MAGIC_AT[length]], length)
        shape, dtype = shape_of(header), type_of(header)
        offset = offset_of(header, length)
        check_size(shape, dtype, offset, size, packed, reading)
        slope, intercept = scaling_of(header)
        affine = affine_of(header, shape, reading.assume_ras, warn)
    except (ValueError, HeaderDataError) as error:
        raise ValueError(f"{path}: {error}") from error
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error
    header.set_data_shape(shape)
    header["vox_offset"] = 0  # nibabel then finds the place for what is written under this header
    return NiftiFile(path, packed, header, shape, dtype, offset, slope, intercept, affine)


def size_of(path: Path) -> int:
    """Return the size of a regular file in bytes; refuse folders, pipes and broken links without waiting for them.

    Raises:
        FileNotFoundError, ValueError: naming what it is instead.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        leads = f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "no such file"
        raise FileNotFoundError(f"{path}: {leads}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error.strerror})") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path}: is a folder, expected a NIfTI file")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: is a pipe or a device, expected a NIfTI file")
    if not status.st_size:
        raise ValueError(f"{path}: is empty; was it copied while the disk was full?")
    return status.st_size


@contextmanager
def unpacked(path: Path, packed: bool) -> Iterator[IO[bytes]]:
    """Open a file's content as a stream, unpacked by ISA-L where it is gzip (half of zlib's time)."""
    with open(path, "rb") as file:
        if not packed:
            yield file
            return
        with igzip.IGzipFile(fileobj=file) as stream:
            yield stream


def read_header(path: Path) -> tuple[bytes, bool, str]:
    """Return the bytes of a NIfTI header and more, whether the file is gzip, and the byte order, "<" or ">".

    Raises:
        ValueError: when it is another kind of file, said in words where they are known.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with unpacked(path, packed) as stream:
        head = stream.read(max(HEADERS))
    for order in "<>":
        length = int.from_bytes(head[:4], "little" if order == "<" else "big")
        if length in HEADERS:
            if len(head) < length:
                raise ValueError(f"ends after {len(head)} bytes, within its header; copy it again")
            return head, packed, order
    for start, what in OTHER_KINDS.items():
        if head.startswith(start):
            raise ValueError(what)
    if head[DICOM_MAGIC_AT:].startswith(DICOM_MAGIC):
        raise ValueError("is a DICOM file; give the folder of its series")
    raise ValueError("is no NIfTI file: it does not begin with the length of its header")


def check_magic(magic: bytes, length: int) -> None:
    """Check that header and voxels are said to be in one file.

    Raises:
        ValueError: when they are not.
    """
    if magic == PAIR_MAGIC[length]:
        raise ValueError("is one of a pair, .hdr and .img; convert them into one .nii file")
    if magic != SINGLE_MAGIC[length]:
        raise ValueError("lacks NIfTI's mark in its header; an Analyze 7.5 file does not say where its voxels lie")


def shape_of(header: nib.Nifti1Header) -> tuple[int, int, int]:
    """Return the three extents of a volume; further ones of 1 are dropped.

    Raises:
        ValueError: when it is no 3-D volume.
    """
    count = int(header["dim"][0])
    if not 1 <= count <= 7:
        raise ValueError(f"has {count} axes by its header, expected one 3-D volume")
    extents = [int(n) for n in header["dim"][1 : count + 1]]
    shape = extents.copy()
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"has the shape {'x'.join(map(str, extents))}, expected one 3-D volume")
    return tuple(shape)


def type_of(header: nib.Nifti1Header) -> np.dtype:
    """Return the type of the stored values.

    Raises:
        ValueError: when it is not one of real numbers, or its size is said to be another.
    """
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in TYPES:
        try:
            what = nib.nifti1.data_type_codes.label[code]
        except KeyError:
            what = "unknown"
        raise ValueError(f"has voxels of type {what} (code {code}), expected real numbers")
    dtype = np.dtype(TYPES[code]).newbyteorder(header.endianness)
    if bits not in (0, 8 * dtype.itemsize):  # some writers leave bitpix 0
        raise ValueError(f"has bitpix {bits} but a type of {8 * dtype.itemsize} bits, so that its header is damaged")
    return dtype


def offset_of(header: nib.Nifti1Header, length: int) -> int:
    """Bytes before the first voxel.

    Raises:
        ValueError: when it is nowhere behind the header.
    """
    offset, least = float(header["vox_offset"]), length + EXTENSION_FLAG
    if not (least <= offset <= least + MAX_EXTENSIONS and offset == int(offset)):
        raise ValueError(f"has vox_offset {offset:g}, expected a whole number from {least} to {least + MAX_EXTENSIONS}")
    return int(offset)


def check_size(
    shape: tuple[int, int, int], dtype: np.dtype, offset: int, size: int, packed: bool, reading: Reading
) -> None:
    """Check the size that a header declares, before anybody believes it.

    Raises:
        ValueError: when it is above the limit, or more than the file can hold.
    """
    voxels = math.prod(shape)
    gib = 4 * voxels / 2**30
    if gib > reading.max_gib:
        raise ValueError(
            f"has {'x'.join(map(str, shape))} voxels, {gib:.3g} GiB as float32, expected at most {reading.max_gib:g} "
            "(--max-gib)"
        )
    needed = offset + voxels * dtype.itemsize
    if size * (MAX_DEFLATE_RATIO if packed else 1) < needed:
        raise ValueError(f"has {size} bytes, too few for the {needed} that its header declares; copy it again")


def scaling_of(header: nib.Nifti1Header) -> tuple[float, float]:
    """Return slope and intercept; a slope of 0 (the standard) or NaN (nibabel, nifti_clib) means "not scaled".

    Raises:
        ValueError: when they are not finite.
    """
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept) and abs(slope) >= SMALLEST_SLOPE):
        raise ValueError(
            f"has scl_slope {slope:g} and scl_inter {intercept:g}, expected finite numbers that float32 holds in full"
        )
    return slope, intercept
