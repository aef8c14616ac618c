"""Read scans and label maps, prepare them for the network, and write its results in the scan's own geometry.

    load_scan -> prepare_image                      (voxels in HU; image of 0..255 on the network's grid)
    load_labels -> resize_labels                    (a label map on the same grid)
    logits_to_labels -> save_label_map              (back to the scan's own shape, axes, affine and header)

The resampling itself, resize_* and logits_to_labels, is in core/scans/resample.py.

Arrays are (X, Y, Z) in RAS+ order: X grows to the patient's right, Y to the front, Z to the head.
No affine is computed; a `Geometry` carries the scan's own.
"""

import contextlib
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np
from isal import igzip
from torch import Tensor

from core.scans.alternating import period_of_slices
from core.scans.crop import Box, shape_of
from core.scans.geometry import Geometry
from core.scans.nifti import MAX_BEHIND, READ_ERRORS, Reading, open_nifti
from core.scans.organ_names import CHECKSUM, NETWORK, organ_names_extension, read_entries
from core.scans.resample import resize_image, resize_slab, slabs
from core.system.exits import one_line
from core.system.files import whole_file

NIFTI_SUFFIXES = (".nii.gz", ".nii")
LABEL_TOLERANCE = 0.05  # a stored label may be this far from an integer (scaled and float files)
READ_BYTES = 4 * 2**20  # read and put into order at a time; more leaves the CPU's cache
GZIP_LEVEL = 2  # of ISA-L's 0 to 3: label maps come out smaller than with level 3, or with gzip's level 1
AIR_HU = -1024.0  # replaces voxels without a value
MIN_FAT_HU = -100.0  # a scan whose lowest value is above it shows neither fat nor air, and is no CT in HU
SOFT_TISSUE_HU = (-200.0, 300.0)
PADDING_BELOW_HU = -1500.0  # lower values stand for "not scanned", as -2000 or -3024
SHIFTED_HU = 1024.0  # by which values are too high that were stored without a rescale intercept
SHIFTED_SOFT_TISSUE = 0.1  # share of a scan's voxels that would be soft tissue after subtracting SHIFTED_HU
MIN_SOFT_TISSUE = 0.02  # share of a scan's voxels; below it is no abdomen, or values are not HU
NIFTI_INTENT_LABEL = 1002  # NIFTI_INTENT_LABEL of nifti1.h


DEFAULT_READING = Reading()


# ---- Files -----------------------------------------------------------------------------------------------------------


def load_scan(path: str | Path, reading: Reading = DEFAULT_READING) -> tuple[np.ndarray, Geometry]:
    """Read a CT scan.

    Args:
        path: a NIfTI file.
        reading: the options; `warn` is also called for values that are unlike those of CT.

    Returns:
        voxels, (X, Y, Z) float32 in HU and RAS+ order, and the geometry that leads back to the file's own order.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a readable 3-D NIfTI file, or a voxel is not finite.
    """
    voxels, slope, intercept, geometry = read_nifti(path, reading, np.float32)
    if (slope, intercept) != (1, 0):
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is counted
            voxels *= np.float32(slope)
            voxels += np.float32(intercept)
    not_finite = voxels.size - sum(np.count_nonzero(np.isfinite(plane)) for plane in voxels)
    if not_finite:
        found = f"{not_finite} of {voxels.size} voxels are NaN or infinite"
        if not reading.replace_nonfinite:
            raise ValueError(f"{path}: {found}, expected finite HU; --replace-nonfinite makes them air")
        reading.warn(f"{path}: {found}; they become air ({AIR_HU:g} HU)")
        np.nan_to_num(voxels, copy=False, nan=AIR_HU, posinf=AIR_HU, neginf=AIR_HU)
    warn_of_values(voxels, lambda message: reading.warn(f"{path}: {message}"))
    return voxels, geometry


def warn_of_values(voxels: np.ndarray, warn: Callable[[str], None]) -> None:
    """Warn of a scan, in HU, whose values (of every fourth voxel along each axis) are unlike those of a CT."""
    sample = scanned_sample(voxels)
    low, high = float(sample.min()), float(sample.max())
    if low == high and voxels.min() == voxels.max():
        warn(f"all its voxels are {low:g}, so that there is nothing to see")
    elif looks_too_high(voxels):
        low = lowest_scanned(sample)
        warn(f"its values go from {low:g} to {high:g} and look {SHIFTED_HU:g} too high; subtract that, or is it MR?")
    elif low > MIN_FAT_HU:
        warn(f"its values go from {low:g} to {high:g}, without the fat and air of every CT; is it MR, or not in HU?")
    elif (soft := soft_tissue_share(sample)) < MIN_SOFT_TISSUE:
        softest, hardest = SOFT_TISSUE_HU
        warn(
            f"{soft:.1%} of its voxels are soft tissue ({softest:g} to {hardest:g} HU); is it CT of the abdomen, in HU?"
        )
    if period_of_slices(voxels) > 1:
        warn("neighbouring slices alternate in HU or noise; are they of two acquisitions, such as contrast phases?")


def scanned_sample(voxels: np.ndarray) -> np.ndarray:
    """Return every fourth voxel along each axis without padding; with it where there is nothing else."""
    sample = voxels[::4, ::4, ::4]
    scanned = sample[sample > PADDING_BELOW_HU]
    return scanned if scanned.size else sample


def lowest_scanned(sample: np.ndarray) -> float:
    """Return the lowest value; where it is that of fat or air, the next one, as a single such value may be padding."""
    low = sample.min()
    return float(low if low > MIN_FAT_HU else np.min(sample, where=sample > low, initial=sample.max()))


def looks_too_high(voxels: np.ndarray) -> bool:
    """Return True when values look SHIFTED_HU too high: no fat and no air, but soft tissue after subtracting that."""
    sample = scanned_sample(voxels)
    return lowest_scanned(sample) > MIN_FAT_HU and soft_tissue_share(sample - SHIFTED_HU) > SHIFTED_SOFT_TISSUE


def soft_tissue_share(voxels: np.ndarray) -> float:
    """Return the share of HU values that are soft tissue, 0 to 1."""
    softest, hardest = SOFT_TISSUE_HU
    return np.count_nonzero((voxels > softest) & (voxels < hardest)) / voxels.size


def load_labels(
    path: str | Path, classes: int | None = None, reading: Reading = DEFAULT_READING
) -> tuple[np.ndarray, Geometry]:
    """Read a label map.

    Args:
        path: a NIfTI file of organ ids.
        classes: K; ids must be below it. None allows any that fit into uint8.
        reading: the options.

    Returns:
        labels, (X, Y, Z) uint8 in RAS+ order, and the geometry of the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a readable 3-D NIfTI file, or a value is not an id of the organ list.
    """
    stored, slope, intercept, geometry = read_nifti(path, reading)
    if (slope, intercept) != (1, 0) or not np.issubdtype(stored.dtype, np.integer):
        with np.errstate(all="ignore"):  # NaN and infinite values count as far off
            scaled = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
            stored = np.rint(scaled)
            scaled -= stored
            far = np.count_nonzero(~(np.abs(scaled) <= LABEL_TOLERANCE))
        if far:
            raise ValueError(f"{path}: {far} of {scaled.size} voxels are no whole numbers, expected organ ids")
    highest = 255 if classes is None else classes - 1
    if stored.min() < 0 or stored.max() > highest:
        ids, counts = np.unique(stored, return_counts=True)
        outside = [(int(i), int(n)) for i, n in zip(ids, counts, strict=True) if i < 0 or i > highest]
        listed = ", ".join(f"{i} ({n} voxels)" for i, n in outside[:5]) + (", ..." if len(outside) > 5 else "")
        raise ValueError(f"{path}: ids outside the organ list: {listed}; expected 0 to {highest}")
    return stored.astype(np.uint8, copy=False), geometry


def read_geometry(path: str | Path, reading: Reading = DEFAULT_READING) -> Geometry:
    """Read only the header of a 3-D NIfTI file, without a warning: reading its voxels gives those.

    Raises:
        FileNotFoundError, ValueError: as `load_scan`, as far as the header tells.
    """
    return open_nifti(path, reading, warn=lambda message: None).geometry


def read_nifti(
    path: str | Path, reading: Reading, dtype: type | None = None
) -> tuple[np.ndarray, float, float, Geometry]:
    """Read a 3-D NIfTI file piece by piece; memory holds one volume only.

    Args:
        path: a NIfTI file.
        reading: the options.
        dtype: type of the returned values; None keeps the file's own type.

    Returns:
        the stored values, (X, Y, Z) in RAS+ order, the slope and intercept that scale them, and the geometry.

    Raises:
        FileNotFoundError, ValueError: as `load_scan`.
    """
    file = open_nifti(path, reading, warn=lambda message: reading.warn(f"{path}: {message}"))
    geometry = file.geometry
    *plane, depth = geometry.stored_shape
    thickness = max(1, READ_BYTES // (math.prod(plane) * file.dtype.itemsize))
    try:
        voxels = np.empty(geometry.shape, dtype or file.dtype.newbyteorder("="))
        in_file_order = geometry.from_ras(voxels).T  # a view; the axis that changes slowest in the file comes first
        # What float32 cannot hold becomes infinite, which load_scan counts.
        with file.stream() as stream, np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, depth, thickness):
                piece = np.empty((min(thickness, depth - start), *reversed(plane)), file.dtype)
                if stream.readinto(piece) < piece.nbytes:
                    raise EOFError(f"it ends before its {depth} x {math.prod(plane)} voxels do")
                copy_by_planes(piece, in_file_order[start : start + thickness])
            read_to_the_end(stream)
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read to its end ({one_line(error)}); copy it again") from error
    return voxels, file.slope, file.intercept, geometry


def read_to_the_end(stream: IO[bytes]) -> None:
    """Read the rest of the file after the voxels; at its end gzip checks the checksum and finds damaged voxels."""
    behind = 0
    while part := stream.read(READ_BYTES):
        behind += len(part)
        if behind > MAX_BEHIND:
            raise ValueError(f"more than {MAX_BEHIND // 2**20} MiB follow its voxels, expected the end of the file")


def copy_by_planes(source: np.ndarray, target: np.ndarray) -> None:
    """Copy (A, B, C) to an array of another memory order, one B plane at a time, which fits the CPU's cache."""
    for i in range(source.shape[1]):
        target[:, i] = source[:, i]


def save_label_map(
    labels: np.ndarray, geometry: Geometry, path: str | Path, organs: Sequence[str] = (), made_by: dict | None = None
) -> None:
    """Write labels, (X, Y, Z) uint8 in RAS+ order, as a label map in the scan's own geometry.

    The file has the scan's shape, affine, qform and sform with their codes, and units; type uint8, intent "label".
    Its header holds the names of `organs`, by id with the background first, when they are given; and what it is
    `made_by` (NETWORK, SCAN), with a checksum of the voxels.
    The file is replaced in one step; `path` never holds half a file.
    """
    header = geometry.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_intent(NIFTI_INTENT_LABEL, name="organ ids")
    stored = stored_order(labels, geometry)
    if organs:
        checksum = {CHECKSUM: checksum_of(stored)} if made_by else {}
        header.extensions.append(organ_names_extension(organs, (made_by or {}) | checksum))
    save_volume(stored, header, path)


def is_as_made(path: Path) -> bool:
    """Return True when a network of this program has made a label map and its voxels are the same since then.

    A label map of an earlier version, without a checksum, counts as the same. False where it cannot be read.
    """
    try:
        made_by = read_entries(path)
        if NETWORK not in made_by or CHECKSUM not in made_by:
            return NETWORK in made_by
        labels, geometry = load_labels(path, reading=Reading(math.inf, assume_ras=True, warn=lambda _: None))
        return made_by[CHECKSUM] == checksum_of(stored_order(labels, geometry))
    except READ_ERRORS:
        return False


def stored_order(values: np.ndarray, geometry: Geometry, dtype: np.dtype = np.uint8) -> np.ndarray:
    """Return values, (X, Y, Z) in RAS+ order, as `dtype` along the file's own axes and in its order (Fortran's)."""
    stored = np.empty(geometry.stored_shape, dtype, order="F")
    copy_by_planes(geometry.from_ras(values), stored)
    return stored


def checksum_of(stored: np.ndarray) -> str:
    """Return a checksum (CRC-32) of stored voxels in Fortran order, in hexadecimal digits."""
    return f"{zlib.crc32(stored.T):08x}"


def save_scan(voxels: np.ndarray, geometry: Geometry, path: str | Path) -> None:
    """Write HU, (X, Y, Z) in RAS+ order, as a scan in its own geometry: int16 where that holds them, else float32."""
    limits = np.iinfo(np.int16)
    whole = limits.min <= voxels.min() and voxels.max() <= limits.max and np.array_equal(voxels, np.rint(voxels))
    header = geometry.header.copy()
    header.set_data_dtype(np.int16 if whole else np.float32)
    header.set_intent("none")
    save_volume(stored_order(voxels, geometry, header.get_data_dtype()), header, path)


def save_probabilities(logits: Tensor, geometry: Geometry, box: Box, path: str | Path) -> None:
    """Write the classes' probabilities, from logits (K, X, Y, Z) of a box, as (X, Y, Z, K) in the scan's own geometry.

    Outside of the box the background's probability is 1.

    NIfTI has no float16: the file stores uint16 steps of 1/65535, which is as small and off by less than 1e-5.
    The K full-size volumes are in a temporary file in the folder of `path`, not in memory.
    """
    with tempfile.TemporaryFile(dir=Path(path).parent) as file:
        # A full disk raises an error here; a write to the memory map would kill the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 2 * len(logits) * math.prod(geometry.shape))
        steps = np.memmap(file, np.uint16, mode="w+", shape=(*geometry.shape, len(logits)), order="F")
        if shape_of(box) != geometry.shape:
            steps[..., 0] = 65535
        for slab in slabs(logits, shape_of(box)):
            probabilities = resize_slab(logits, shape_of(box), slab).softmax(dim=0)
            steps[box][slab] = (probabilities * 65535).round().cpu().numpy().astype(np.uint16).transpose(1, 2, 3, 0)
        header = geometry.header.copy()
        header.set_data_dtype(np.uint16)
        header.set_intent("none")
        save_volume(geometry.from_ras(steps), header, path, slope=1 / 65535)


def save_volume(stored: np.ndarray, header: nib.Nifti1Header, path: str | Path, slope: float = 1) -> None:
    """Write stored values, in a file's own axes, under (a changed copy of) that file's header, whole.

    The same values give the same bytes: gzip's header holds neither time nor name.
    """
    assert stored.shape[:3] == header.get_data_shape(), f"{stored.shape[:3]} for {header.get_data_shape()}"
    header["cal_min"] = header["cal_max"] = 0
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # With no affine given, nibabel keeps the header's qform and sform as they are.
    file = kind(stored, None, header)
    file.header.set_slope_inter(slope, 0)
    with whole_file(path) as temporary, open(temporary, "wb") as on_disk:
        if temporary.suffix.lower() == ".gz":
            packed = igzip.IGzipFile("", "wb", GZIP_LEVEL, on_disk, mtime=0)
        else:
            packed = contextlib.nullcontext(on_disk)
        with packed as stream:
            file.to_stream(stream)


# ---- Values ----------------------------------------------------------------------------------------------------------


def window_hu(voxels: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Clip HU to `window` (low, high) and scale it to 0..1; float32 in, float32 out, any shape.

    There is no inverse: values outside the window are lost.
    """
    low, high = window
    image = np.clip(voxels, np.float32(low), np.float32(high))
    image -= np.float32(low)
    image /= np.float32(high) - np.float32(low)  # the same difference as above, so that no value comes out above 1
    return image


def prepare_image(voxels: np.ndarray, size: Sequence[int], window: Sequence[float]) -> np.ndarray:
    """Convert HU, (X, Y, Z) float32, to the network's image: `size` voxels, uint8, 0..255 across the HU window.

    Training (through the cache) and inference both call it, so their rounding is the same.
    """
    return np.rint(resize_image(window_hu(voxels, window), size) * 255).astype(np.uint8)
