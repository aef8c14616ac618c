"""From a scan on disk to the network's grid and back; every transform stands beside its inverse.

    load_scan -> window_hu -> resize_image          (voxels in HU, then an image in 0..255 on the network's grid)
    load_labels -> resize_labels                    (a label map on the same grid)
    logits_to_labels -> save_label_map              (back to the scan's own shape, axes, affine and header)

Arrays are (X, Y, Z) in RAS+ order: X grows to the patient's right, Y to the front, Z to the head.
No affine is ever computed: a `Geometry` carries the scan's own.
"""

import contextlib
import math
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage, sparse
from torch import Tensor
from torch.nn import functional as F

from core.files import whole_file

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ANTIALIAS_ABOVE = 2.0  # input voxels per output voxel: up to here linear interpolation still touches every voxel
LABEL_TOLERANCE = 0.05  # a stored label may be this far from an integer (scaled and float files)
GRID_TOLERANCE = 0.1  # voxels by which the corners of two grids may differ and still count as the same
# What nibabel raises on bad files; a header that promises too much is a MemoryError.
READ_ERRORS = (ImageFileError, HeaderDataError, EOFError, OSError, zlib.error, isal_zlib.error, ValueError, MemoryError)
READ_BYTES = 4 * 2**20  # read and put into order at a time; more leaves the CPU's cache
GZIP_LEVEL = 2  # of ISA-L's 0 to 3: label maps come out smaller than with level 3, or with gzip's level 1
SLAB_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}  # of scores resized at a time; more leaves the CPU's cache
DENSE_ABOVE = 0.4  # share of cells with a boundary above which interpolating all voxels is faster than picking them
NIFTI_INTENT_LABEL = 1002  # NIFTI_INTENT_LABEL of nifti1.h


@dataclass(frozen=True, eq=False)
class Geometry:
    """How a file's voxels lie in the patient, and how to go back from RAS+ order to the file's own.

    Attributes:
        stored_shape: the file's own three extents in voxels.
        affine: (4, 4), from the file's voxel indices to mm in the patient.
        header: the file's NIfTI header, carried into everything written for this scan.
    """

    stored_shape: tuple[int, int, int]
    affine: np.ndarray
    header: nib.Nifti1Header

    @property
    def orientation(self) -> np.ndarray:
        """(3, 2): for each stored axis the RAS+ axis nearest to it and its direction, as nibabel has it."""
        return io_orientation(self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Extents in voxels, in RAS+ order."""
        return self._in_ras_order(self.stored_shape)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels in mm, in RAS+ order."""
        return self._in_ras_order(nib.affines.voxel_sizes(self.affine).tolist())

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """The volume's size in mm, outer faces to outer faces, in RAS+ order."""
        return tuple(n * mm for n, mm in zip(self.shape, self.spacing_mm, strict=True))

    @property
    def voxel_ml(self) -> float:
        """The volume of one voxel in mL; right for sheared grids too."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def corners_mm(self) -> np.ndarray:
        """(8, 3): the centres of the eight corner voxels in mm, in the order of the RAS+ array."""
        last = np.array(self.shape) - 1
        corners = np.array(np.meshgrid(*[(0, n) for n in last], indexing="ij")).reshape(3, -1).T
        ras_to_stored = np.linalg.inv(inv_ornt_aff(ornt_transform(RAS, self.orientation), self.shape))
        return nib.affines.apply_affine(self.affine @ ras_to_stored, corners)

    def to_ras(self, stored: np.ndarray) -> np.ndarray:
        """A view of an array in the file's own three axes as (X, Y, Z) in RAS+ order; further axes stay."""
        return apply_orientation(stored, self.orientation)

    def from_ras(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ras`: a view in the file's own axes of (X, Y, Z); further axes stay where they are."""
        return apply_orientation(array, ornt_transform(RAS, self.orientation))

    def _in_ras_order(self, per_stored_axis: Sequence) -> tuple:
        ordered = [None, None, None]
        for axis, value in zip(self.orientation[:, 0].astype(int), per_stored_axis, strict=True):
            ordered[axis] = value
        return tuple(ordered)


RAS = axcodes2ornt(("R", "A", "S"))


class Opener(ImageOpener):
    """nibabel's way of opening files for reading, with ISA-L in place of zlib, which takes half its time for gzip."""

    compress_ext_map = ImageOpener.compress_ext_map | {".gz": (igzip.open, ("mode",))}


# ---- Files -----------------------------------------------------------------------------------------------------------


def load_scan(path: str | Path) -> tuple[np.ndarray, Geometry]:
    """Read a CT scan.

    Returns:
        voxels, (X, Y, Z) float32 in HU and RAS+ order, and the geometry that leads back to the file's own order.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no readable 3-D NIfTI file, or has voxels that are not finite.
    """
    voxels, slope, intercept, geometry = read_nifti(path, np.float32)
    if (slope, intercept) != (1, 0):
        voxels *= np.float32(slope)
        voxels += np.float32(intercept)
    not_finite = voxels.size - sum(np.count_nonzero(np.isfinite(plane)) for plane in voxels)
    if not_finite:
        raise ValueError(f"{path}: {not_finite} of {voxels.size} voxels are NaN or infinite, expected finite HU")
    return voxels, geometry


def load_labels(path: str | Path, classes: int | None = None) -> tuple[np.ndarray, Geometry]:
    """Read a label map.

    Args:
        path: a NIfTI file of organ ids.
        classes: K; ids must be below it. None allows any that fit into uint8.

    Returns:
        labels, (X, Y, Z) uint8 in RAS+ order, and the geometry of the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no readable 3-D NIfTI file, or its values are no ids of the organ list.
    """
    stored, slope, intercept, geometry = read_nifti(path)
    if (slope, intercept) != (1, 0) or not np.issubdtype(stored.dtype, np.integer):
        with np.errstate(all="ignore"):  # NaN and infinite count as far
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


def read_geometry(path: str | Path) -> Geometry:
    """Read only the header of a 3-D NIfTI file.

    Raises:
        FileNotFoundError, ValueError: as `load_scan`, as far as the header tells.
    """
    return open_nifti(path)[1]


def read_nifti(path: str | Path, dtype: type | None = None) -> tuple[np.ndarray, float, float, Geometry]:
    """Read a 3-D NIfTI file piece by piece, so that there is no second volume beside the one that is returned.

    Args:
        path: a NIfTI file.
        dtype: what the stored values are converted to; None for the file's own type.

    Returns:
        the stored values, (X, Y, Z) in RAS+ order, the slope and intercept that scale them, and the geometry.

    Raises:
        FileNotFoundError, ValueError: as `load_scan`.
    """
    file, geometry = open_nifti(path)
    proxy = file.dataobj
    *plane, depth = geometry.stored_shape
    thickness = max(1, READ_BYTES // (math.prod(plane) * proxy.dtype.itemsize))
    try:
        voxels = np.empty(geometry.shape, dtype or proxy.dtype.newbyteorder("="))
        in_file_order = geometry.from_ras(voxels).T  # a view; the axis that changes slowest in the file comes first
        # What float32 cannot hold becomes infinite, which load_scan counts.
        with Opener(path) as stream, np.errstate(over="ignore"):
            stream.seek(proxy.offset)
            for start in range(0, depth, thickness):
                piece = np.empty((min(thickness, depth - start), *reversed(plane)), proxy.dtype)
                if stream.readinto(piece) < piece.nbytes:
                    raise EOFError(f"it ends before its {depth} x {math.prod(plane)} voxels do")
                copy_by_planes(piece, in_file_order[start : start + thickness])
            # gzip's checksum stands behind the last voxel: without reading on, damaged voxels pass for good ones.
            while stream.read(READ_BYTES):
                pass
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read to its end ({one_line(error)})") from error
    return voxels, proxy.slope, proxy.inter, geometry


def copy_by_planes(source: np.ndarray, target: np.ndarray) -> None:
    """Copy (A, B, C) to an array of another memory order, B planes one by one: what is at work stays in the cache."""
    for i in range(source.shape[1]):
        target[:, i] = source[:, i]


def open_nifti(path: str | Path) -> tuple[nib.Nifti1Image, Geometry]:
    """Open a NIfTI file and check its header; the voxels are not read yet."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = nib.load(path)
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read as NIfTI ({one_line(error)})") from error
    if not isinstance(file, nib.Nifti1Image):
        raise ValueError(f"{path}: is a {type(file).__name__}, expected a NIfTI file (.nii or .nii.gz)")
    shape = file.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{path}: has the shape {'x'.join(map(str, file.shape))}, expected one 3-D volume")
    kind = file.get_data_dtype()
    if not np.issubdtype(kind, np.number) or np.issubdtype(kind, np.complexfloating):
        raise ValueError(f"{path}: has voxels of type {kind}, expected real numbers")
    if not np.isfinite(file.affine).all() or abs(np.linalg.det(file.affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: its affine cannot be inverted, so the scan has no place in the patient")
    header = file.header.copy()
    header.set_data_shape(shape)
    return file, Geometry(tuple(shape), file.affine, header)


def one_line(error: Exception) -> str:
    """What an error says, without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def save_label_map(labels: np.ndarray, geometry: Geometry, path: str | Path) -> None:
    """Write labels, (X, Y, Z) uint8 in RAS+ order, as a label map in the scan's own geometry.

    The file has the scan's shape, affine, qform and sform with their codes, and units; type uint8, intent "label".
    It is written whole: `path` is the old file or the new one, never half of one.
    """
    header = geometry.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_intent(NIFTI_INTENT_LABEL, name="organ ids")
    stored = np.empty(geometry.stored_shape, dtype=np.uint8, order="F")
    copy_by_planes(geometry.from_ras(labels), stored)
    save_volume(stored, header, path)


def save_probabilities(logits: Tensor, geometry: Geometry, path: str | Path) -> None:
    """Write the classes' probabilities from logits, (K, X, Y, Z), as a file of (X, Y, Z, K) in the scan's own geometry.

    NIfTI has no float16: the file stores uint16 steps of 1/65535, which is as small and off by less than 1e-5.
    The K full-size volumes lie in a temporary file beside `path`, not in memory.
    """
    with tempfile.TemporaryFile(dir=Path(path).parent) as file:
        steps = np.memmap(file, np.uint16, mode="w+", shape=(*geometry.shape, len(logits)), order="F")
        for slab in slabs(logits, geometry.shape):
            probabilities = resize_slab(logits, geometry.shape, slab).softmax(dim=0)
            steps[slab] = (probabilities * 65535).round().cpu().numpy().astype(np.uint16).transpose(1, 2, 3, 0)
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


def check_same_grid(
    first: Geometry, second: Geometry, name: str, first_is: str = "the scan", second_is: str = "the label map"
) -> None:
    """Check that two files of a case lie on the same voxels of the patient; their storage orders may differ.

    Raises:
        ValueError: naming the case and both grids.
    """
    if first.shape == second.shape:
        apart_mm = np.abs(first.corners_mm - second.corners_mm).max()
        if apart_mm <= GRID_TOLERANCE * min(first.spacing_mm):
            return
    raise ValueError(
        f"{name}: {first_is} has {describe_grid(first)}, {second_is} {describe_grid(second)}; expected the same voxels"
    )


def describe_grid(geometry: Geometry) -> str:
    """One line for messages: shape, spacing, first and last voxel in RAS+ order."""
    shape = "x".join(map(str, geometry.shape))
    spacing = "x".join(f"{mm:.3g}" for mm in geometry.spacing_mm)
    first, last = (", ".join(f"{mm:.1f}" for mm in geometry.corners_mm[i]) for i in (0, -1))
    return f"{shape} voxels of {spacing} mm from ({first}) to ({last})"


# ---- Values ----------------------------------------------------------------------------------------------------------


def window_hu(voxels: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Clip HU to `window` (low, high) and scale it to 0..1; float32 in, float32 out, any shape.

    There is no inverse: what lies outside the window is gone.
    """
    low, high = window
    image = np.clip(voxels, np.float32(low), np.float32(high))
    image -= np.float32(low)
    image /= np.float32(high) - np.float32(low)  # the same difference as above, so that no value comes out above 1
    return image


def prepare_image(voxels: np.ndarray, size: Sequence[int], window: Sequence[float]) -> np.ndarray:
    """From HU, (X, Y, Z) float32, to what the network sees: `size` voxels, uint8, 0..255 across the HU window.

    Training (through the cache) and inference both come through here, so they round alike.
    """
    return np.rint(resize_image(window_hu(voxels, window), size) * 255).astype(np.uint8)


# ---- Resampling ------------------------------------------------------------------------------------------------------


def axis_weights(n_in: int, n_out: int, antialias: bool = False) -> Tensor:
    """The linear interpolation from `n_in` to `n_out` voxels over the same length, as a matrix.

    Voxel i of the output has its centre at (i + 1/2) n_in / n_out - 1/2 of the input (half-voxel aligned); beyond the
    outermost centres the outermost value goes on. With `antialias` and shrinking by more than ANTIALIAS_ABOVE the
    interpolation's triangle is widened to cover every input voxel.

    Returns:
        (n_out, n_in) float32; every row sums to 1.
    """
    step = n_in / n_out
    width = step if antialias and step > ANTIALIAS_ABOVE else 1.0
    centres = (torch.arange(n_out, dtype=torch.float64) + 0.5) * step - 0.5
    distances = (torch.arange(n_in, dtype=torch.float64) - centres[:, None]).abs()
    weights = (1 - distances / width).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def apply_weights(volume: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """Apply an (n_out, n_in) matrix along each of the last three axes of (..., X, Y, Z); None leaves an axis alone."""
    axes = [axis for axis in range(3) if weights[axis] is not None]
    # The axis that shrinks most goes first, so that the rest has the least to do.
    for axis in sorted(axes, key=lambda a: weights[a].shape[0] / weights[a].shape[1]):
        # Each product takes the volume as it lies in memory; moving the axis to the end would copy it.
        if axis == 0:
            volume = (weights[axis] @ volume.flatten(-2)).unflatten(-1, volume.shape[-2:])
        elif axis == 1:
            volume = weights[axis] @ volume
        else:
            volume = volume @ weights[axis].T
    return volume


def resize_image(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize an image, (X, Y, Z) float32, to `size`: trilinear, anti-aliased where it shrinks by more than 2.

    The inverse is the same function with the image's own shape (what was averaged away stays away).
    """
    # Not by F.interpolate with antialias: torch 2.13 gets pictures of one voxel's width wrong.
    averaging = [
        axis_weights(n_in, n_out, antialias=True) if n_in > ANTIALIAS_ABOVE * n_out else None
        for n_in, n_out in zip(image.shape, size, strict=True)
    ]
    volume = apply_weights(torch.from_numpy(image), averaging)
    return F.interpolate(volume[None, None], size=tuple(size), mode="trilinear", align_corners=False)[0, 0].numpy()


def resize_labels(labels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize a label map, (X, Y, Z) uint8, to `size`: each organ's share by linear interpolation, the largest wins.

    No label comes out that did not go in; ties go to the lower id. The inverse is the same function with the label
    map's own shape. Chosen over nearest neighbour by the Dice of going there and back (RESULTS.md).
    """
    weights = [axis_weights(n_in, n_out) for n_in, n_out in zip(labels.shape, size, strict=True)]
    winner = torch.zeros(tuple(size), dtype=torch.uint8)
    best = torch.zeros(tuple(size))  # the winning organ's share
    background = torch.ones(tuple(size))  # what the organs leave over
    for organ, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        # Only where the organ's box has any weight can its share be above zero.
        target, inside = [], []
        for matrix, cut in zip(weights, box, strict=True):
            rows = matrix[:, cut].any(dim=1).nonzero()
            first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
            target.append(slice(first, last + 1))
            inside.append(matrix[first : last + 1, cut])
        target = tuple(target)
        share = apply_weights(torch.from_numpy(labels[box] == organ).float(), inside)
        background[target] -= share
        wins = share > best[target]
        best[target] = torch.where(wins, share, best[target])
        winner[target] = torch.where(wins, organ, winner[target])
    winner[background >= best] = 0
    return winner.numpy()


@torch.no_grad()
def logits_to_labels(logits: Tensor, shape: Sequence[int]) -> np.ndarray:
    """Resize logits, (K, X, Y, Z) on any device, to a scan's `shape` and take the largest class of each voxel.

    The labels are those of F.interpolate (trilinear, align_corners=False) and argmax, but never K full-size volumes are
    in memory; and on a CPU only voxels near a boundary are interpolated, unless the logits are so noisy that most are.

    Returns:
        labels of `shape`, uint8, RAS+ order like the logits; ties go to the lower id.
    """
    labels = np.empty(tuple(shape), dtype=np.uint8)
    if logits.device.type == "cpu":
        winners = np.stack([largest_class(logits[:, layer].float()) for layer in range(logits.shape[1])])
        mixed = cells_with_boundary(winners)
        if mixed.mean() < DENSE_ABOVE:
            return interpolate_boundary(logits, winners, mixed, labels)
    for slab in slabs(logits, shape):
        labels[slab] = largest_class(resize_slab(logits, shape, slab))
    return labels


def largest_class(scores: Tensor) -> np.ndarray:
    """The largest class of (K, ...) float32 scores, uint8; ties go to the lower id."""
    if scores.device.type != "cpu":
        return scores.max(dim=0).indices.to("cpu", torch.uint8).numpy()
    # A running maximum: four times as fast as torch's max, which keeps int64 indices too.
    best, *others = scores.numpy()
    best, winner = best.copy(), np.zeros(best.shape, dtype=np.uint8)
    for k, other in enumerate(others, start=1):
        wins = other > best
        np.maximum(winner, wins * np.uint8(k), out=winner)
        np.maximum(best, other, out=best)
    return winner


def cells_with_boundary(winners: np.ndarray) -> np.ndarray:
    """Which cells of eight neighbouring voxels, (X, Y, Z) by their lowest voxel, have more than one winning class.

    In the others the class that wins at all eight corners wins everywhere between them, since interpolated logits are
    weighted means of the corners'. At the upper ends the last voxel is its own neighbour.
    """
    mixed = np.zeros(winners.shape, dtype=bool)
    mixed[:-1] |= winners[:-1] != winners[1:]
    mixed[:, :-1] |= mixed[:, 1:] | (winners[:, :-1] != winners[:, 1:])
    mixed[:, :, :-1] |= mixed[:, :, 1:] | (winners[:, :, :-1] != winners[:, :, 1:])
    return mixed


def interpolate_boundary(logits: Tensor, winners: np.ndarray, mixed: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Fill `labels` from (K, X, Y, Z) logits: in cells that are not `mixed` by their winner, else by interpolation."""
    (low_x, high_x, share_x), *in_plane = (neighbours(n, m) for n, m in zip(winners.shape, labels.shape, strict=True))
    (low_y, _, _), (low_z, _, _) = in_plane
    for layer in np.unique(low_x):
        slices = np.flatnonzero(low_x == layer)  # all that lie between this layer and the next
        labels[slices] = winners[layer].take(low_y, axis=0).take(low_z, axis=1)
        chosen = np.nonzero(mixed[layer].take(low_y, axis=0).take(low_z, axis=1))
        points, weights = interpolation_in_plane(chosen, in_plane, winners.shape[1:])
        both = [plane for x in (layer, high_x[slices[0]]) for plane in logits[:, x].float().flatten(1).numpy()]
        low, high = np.hsplit(weights @ np.stack([plane.take(points) for plane in both], axis=1), 2)  # (chosen, K) each
        for x in slices:
            labels[x][chosen] = (low + share_x[x] * (high - low)).argmax(axis=1)
    return labels


def interpolation_in_plane(
    places: tuple[np.ndarray, np.ndarray], in_plane: Sequence[tuple], plane: tuple[int, int]
) -> tuple[np.ndarray, sparse.csr_array]:
    """The bilinear interpolation of a plane of (Y, Z) points at `places`, N indices along Y' and along Z'.

    Args:
        places: of the plane that is interpolated to.
        in_plane: what `neighbours` gives along Y and along Z.
        plane: (Y, Z).

    Returns:
        the P points that are needed, counted along the flattened plane, and the weights, (N, P).
    """
    (low_y, high_y, to_y), (low_z, high_z, to_z) = (
        (low[i], high[i], share[i]) for i, (low, high, share) in zip(places, in_plane, strict=True)
    )
    corners = np.stack([at_y * plane[1] + at_z for at_y in (low_y, high_y) for at_z in (low_z, high_z)], axis=1)
    weights = np.stack([share_y * share_z for share_y in (1 - to_y, to_y) for share_z in (1 - to_z, to_z)], axis=1)
    needed = np.zeros(math.prod(plane), dtype=bool)
    needed[corners] = True
    columns = (np.cumsum(needed, dtype=np.int32) - 1)[corners]
    rows = np.arange(0, corners.size + 1, corners.shape[1], dtype=np.int32)  # where each begins
    points = np.flatnonzero(needed)
    return points, sparse.csr_array((weights.ravel(), columns.ravel(), rows), shape=(len(corners), len(points)))


def neighbours(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `n_out` voxels the two of `n_in` around it, and the second's share, as in `axis_weights`.

    In float32, step by step as F.interpolate does it: its labels come out but for ties in the last bit.
    """
    step = np.float32(n_in / n_out)
    half = np.float32(0.5)
    centres = np.clip((np.arange(n_out, dtype=np.float32) + half) * step - half, 0, n_in - 1)
    low = np.floor(centres).astype(np.int64)
    return low, np.minimum(low + 1, n_in - 1), centres - low.astype(np.float32)


def slabs(logits: Tensor, shape: Sequence[int]) -> list[slice]:
    """Cut the X axis of `shape` so that float32 logits resized to one piece of it stay within SLAB_BYTES."""
    thickness = max(1, SLAB_BYTES[logits.device.type] // (4 * len(logits) * shape[1] * shape[2]))
    return [slice(start, min(start + thickness, shape[0])) for start in range(0, shape[0], thickness)]


def resize_slab(logits: Tensor, shape: Sequence[int], slab: slice) -> Tensor:
    """The part `slab` along X of (K, X, Y, Z) logits resized to `shape`: (K, slab, Y', Z') float32."""
    along_x = neighbours(logits.shape[1], shape[0])
    low, high, share = (torch.from_numpy(each[slab]).to(logits.device) for each in along_x)
    part = torch.lerp(logits[:, low].float(), logits[:, high].float(), share[:, None, None])  # (K, slab, Y, Z)
    return F.interpolate(part, size=tuple(shape[1:]), mode="bilinear", align_corners=False)
