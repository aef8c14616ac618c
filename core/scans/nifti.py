"""Open a NIfTI file and check its header before its voxels are read.

    open_nifti(path, reading) -> NiftiFile; its `stream()` starts at the first voxel

nibabel parses the header. The content of a file decides whether it is gzip, its name does not. "The standard" is
nifti1.h and nifti2.h.
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

from core.scans.dicom_pixels import dataset_start
from core.scans.geometry import Geometry
from core.scans.placement import affine_of
from core.system.exits import one_line, print_warning

MAX_GIB = 8.0  # of voxels as float32; 1024x1024x1500 take 6
HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}  # by length in bytes, the first number in the file
MAGIC = {348: (344, b"n+1\0"), 540: (4, b"n+2\0\r\n\x1a\n")}  # position in the header, and value in a single file
EXTENSION_FLAG = 4  # bytes after the header
MAX_BEHIND = 64 * 2**20  # bytes that may follow the voxels
MAX_DEFLATE_RATIO = 1032  # no deflated byte gives more
# nibabel's names of the types that a scan can have; the standard's others are bits, complex, colours, 128-bit floats.
REAL_TYPES = (*(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float32", "float64")
SMALLEST_SLOPE = float(np.finfo(np.float32).tiny)  # smaller numbers lose digits, and scale no scan
# Other files that are named like a scan, by their first bytes.
OTHER_KINDS = {
    b"version https://git-lfs": "is a Git LFS pointer and not the file itself; run git lfs pull",
    b"PK\x03\x04": "is a zip archive (or .npz); unpack it, expected NIfTI",
    b"NRRD": "is an NRRD file; convert it to NIfTI",
    b"ObjectType": "is a MetaImage file (.mha, .mhd); convert it to NIfTI",
    b"NDims": "is a MetaImage file (.mha, .mhd); convert it to NIfTI",
    b"\x93NUMPY": "is an array of numpy, which does not say where its voxels lie; expected NIfTI",
    b"\x89PNG": "is a PNG picture, expected NIfTI",
    b"BZh": "is packed with bzip2; unpack it",
    b"\xfd7zXZ": "is packed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it",
    b"<": "is a web page or XML, expected NIfTI; was the download refused?",
}
# Raised when a damaged file is read; OverflowError where gzip's own header is larger than ISA-L's buffer.
READ_ERRORS = (EOFError, OSError, zlib.error, isal_zlib.error, ValueError, MemoryError, OverflowError)


@dataclass(frozen=True)
class Reading:
    """Options for reading files.

    Attributes:
        max_gib: size limit of the voxels as float32, in GiB; checked before memory is taken.
        assume_ras: read a file without sform and qform as RAS+; by default it is refused.
        replace_nonfinite: replace NaN and infinite voxels of a scan by air; by default it is refused.
        warn: called with each warning, one sentence.
    """

    max_gib: float = MAX_GIB
    assume_ras: bool = False
    replace_nonfinite: bool = False
    warn: Callable[[str], None] = print_warning


@dataclass(frozen=True, eq=False)
class NiftiFile:
    """The checked header of a file.

    Attributes:
        path: the file.
        packed: True for gzip.
        geometry: of its voxels; its header is that of the file, without extensions and trailing extents of 1.
        dtype: of the stored values, with the file's byte order.
        offset: bytes before the first voxel.
        slope: multiplies the stored values.
        intercept: is added after that.
    """

    path: Path
    packed: bool
    geometry: Geometry
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """Open the unpacked file at its first voxel."""
        with unpacked(self.path, self.packed) as stream:
            stream.seek(self.offset)
            yield stream


def open_nifti(path: str | Path, reading: Reading, warn: Callable[[str], None]) -> NiftiFile:
    """Read and check the header of a 3-D NIfTI file.

    Args:
        path: the file.
        reading: the options.
        warn: called with each warning about the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file and the fault.
    """
    path = Path(path)
    size = size_of(path)
    try:
        header, packed = read_header(path)
        shape, dtype, offset = shape_of(header), type_of(header), offset_of(header)
        check_size(shape, dtype, offset, size, packed, reading)
        slope, intercept = scaling_of(header, warn)
        affine = affine_of(header, shape, reading.assume_ras, warn)
    except (ValueError, HeaderDataError) as error:
        raise ValueError(f"{path}: {error}") from error
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error
    header.set_data_shape(shape)
    header["vox_offset"] = 0  # nibabel then sets it for each file that is written with this header
    return NiftiFile(path, packed, Geometry(shape, affine, header), dtype, offset, slope, intercept)


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


def read_header(path: Path) -> tuple[nib.Nifti1Header, bool]:
    """Return the header of a single-file NIfTI, without its extensions, and True where the file is gzip.

    Raises:
        ValueError: when it is another kind of file, named where it is a known one.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with unpacked(path, packed) as stream:
        head = stream.read(max(HEADERS))
    for order in ("little", "big"):
        length = int.from_bytes(head[:4], order)
        if length not in HEADERS:
            continue
        if len(head) < length:
            raise ValueError(f"ends after {len(head)} bytes, within its header; copy it again")
        header = HEADERS[length](head[:length], endianness=order, check=False)
        position, magic = MAGIC[length]
        if header["magic"] == header.pair_magic:
            raise ValueError("is one of a pair, .hdr and .img; convert them into one .nii file")
        if not head.startswith(magic, position):
            raise ValueError("lacks NIfTI's mark in its header; an Analyze 7.5 file does not say where its voxels lie")
        return header, packed
    for start, what in OTHER_KINDS.items():
        if head.startswith(start):
            raise ValueError(what)
    if dataset_start(head) is not None:
        raise ValueError("is a DICOM file; give the folder of its series")
    raise ValueError("is no NIfTI file: it does not begin with the length of its header")


def shape_of(header: nib.Nifti1Header) -> tuple[int, int, int]:
    """Return the three extents of a volume; further extents of 1 are dropped.

    Raises:
        ValueError: when it is not a 3-D volume.
    """
    count = int(header["dim"][0])
    if not 1 <= count <= 7:
        raise ValueError(f"has {count} axes by its header, expected one 3-D volume")
    # Not header.get_data_shape(): it gives another shape than the header's where FreeSurfer's surfaces have theirs.
    extents = [int(n) for n in header["dim"][1 : count + 1]]
    if len(extents) < 3 or min(extents[:3]) < 1 or any(n != 1 for n in extents[3:]):
        raise ValueError(f"has the shape {'x'.join(map(str, extents))}, expected one 3-D volume")
    return tuple(extents[:3])


def type_of(header: nib.Nifti1Header) -> np.dtype:
    """Return the type of the stored values.

    Raises:
        ValueError: when they are not real numbers, or bitpix contradicts the type.
    """
    name, bits = header.get_value_label("datatype"), int(header["bitpix"])
    if name not in REAL_TYPES:
        name = "unknown" if name.startswith("<unknown") else name
        raise ValueError(f"has voxels of type {name} (code {header['datatype']}), expected real numbers")
    dtype = header.get_data_dtype()
    if bits not in (0, 8 * dtype.itemsize):  # some writers leave bitpix 0
        raise ValueError(f"has bitpix {bits} but a type of {8 * dtype.itemsize} bits, so that its header is damaged")
    return dtype


def offset_of(header: nib.Nifti1Header) -> int:
    """Return the number of bytes before the first voxel.

    Raises:
        ValueError: when vox_offset is not a position after the header.
    """
    offset, first = float(header["vox_offset"]), header.sizeof_hdr + EXTENSION_FLAG
    if not (offset >= first and offset.is_integer()):
        raise ValueError(f"has vox_offset {offset:g}, expected a whole number of {first} or more")
    return int(offset)


def check_size(
    shape: tuple[int, int, int], dtype: np.dtype, offset: int, size: int, packed: bool, reading: Reading
) -> None:
    """Check the size that the header declares, before memory is taken for it.

    Raises:
        ValueError: when it is above the limit or more than the file can hold.
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


def scaling_of(header: nib.Nifti1Header, warn: Callable[[str], None]) -> tuple[float, float]:
    """Return slope and intercept; a slope of 0 (the standard) or NaN (nibabel, nifti_clib) means "not scaled".

    An intercept of NaN is read as 0, with a warning.

    Raises:
        ValueError: when they are not finite.
    """
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if math.isnan(intercept):
        warn("has scl_inter nan; read with an intercept of 0, so check its HU")
        intercept = 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept) and abs(slope) >= SMALLEST_SLOPE):
        raise ValueError(
            f"has scl_slope {slope:g} and scl_inter {intercept:g}, expected finite numbers that float32 holds in full"
        )
    return slope, intercept
