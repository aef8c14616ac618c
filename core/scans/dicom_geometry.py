"""Place the slices of a CT series in DICOM: their order, the affine, and why they fill no even grid."""

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from core.scans.dicom_slice import Slice
from core.scans.geometry import GRID_TOLERANCE, Geometry
from core.scans.placement import SPACING_MM, corners_mm, voxels_apart, warn_of_shear

NIFTI_EXTENT = 32767  # a NIfTI header holds no more voxels along an axis
WHOLE_GAP = 0.2  # by which a gap may differ from a multiple of the others and still mean missing slices
SAME_POSITION_MM = 0.01  # slices closer than that are two of one place
ROUNDING_MM = 0.101  # that a slice may always be off an even line, as two positions rounded to 0.1 mm put it
SAME_SPACING_MM = 1e-4  # by which pixel spacings may differ between slices: 0.05 mm across 512 pixels
SAME_DIRECTION = 1e-4  # by which direction cosines may differ between slices: 0.05 mm across 500 mm


def sort_slices(folder: Path, slices: Sequence[Slice]) -> list[Slice]:
    """Return the slices in the order in which they lie along their normal; file names and numbers do not count.

    Raises:
        ValueError: when they do not belong into one volume.
    """
    if len(slices) < 2:
        raise ValueError(f"{folder}: the series has {len(slices)} slice, expected at least 2")
    first = slices[0]
    for other in slices[1:]:
        differs = {
            "Rows": first.rows != other.rows,
            "Columns": first.columns != other.columns,
            "PixelSpacing": not np.allclose(first.spacing, other.spacing, rtol=0, atol=SAME_SPACING_MM),
            "ImageOrientationPatient": not np.allclose(first.orientation, other.orientation, 0, SAME_DIRECTION),
            **{keyword: value != other.same[keyword] for keyword, value in first.same.items()},
        }
        if any(differs.values()):
            which = " and ".join(keyword for keyword, different in differs.items() if different)
            raise ValueError(f"{other.path}: {which} differs from {first.path.name}, expected the same in all slices")
    return [slices[k] for k in np.argsort(positions_mm(slices), kind="stable")]


def affine_of(folder: Path, slices: Sequence[Slice]) -> np.ndarray:
    """Return the affine (4, 4) from (column, row, slice) indices to mm in RAS+, of slices in order.

    PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1, places column i and row j of a slice at S + X di i + Y dj j in LPS+: S is
    ImagePositionPatient, X and Y are the halves of ImageOrientationPatient, di and dj the second and the first value of
    PixelSpacing. Slice k adds k times the step between the S of neighbours, which with a tilted gantry is not the
    normal of the slices. L and P are turned to R and A by their signs.

    Raises:
        ValueError: when slices are missing, uneven or double, or the spacing is not that of CT.
    """
    positions = np.array([one.position for one in slices])
    check_doubles(folder, slices)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    row_mm, column_mm = slices[0].spacing
    along_row, down_column = slices[0].orientation
    affine = np.eye(4)
    affine[:3] = np.column_stack([along_row * column_mm, down_column * row_mm, step, positions[0]])
    low, high = SPACING_MM
    for mm in (row_mm, column_mm, np.linalg.norm(step)):
        if not low <= mm <= high:
            raise ValueError(f"{folder}: its voxels are {mm:.4g} mm apart, expected {low:g} to {high:g}")
    off = positions - positions[0] - np.arange(len(slices))[:, None] * step
    off_voxels = np.linalg.solve(affine[:3, :3], off.T)
    far = (np.abs(off_voxels).max(axis=0) > GRID_TOLERANCE) & (np.linalg.norm(off, axis=1) > ROUNDING_MM)
    if far.any():
        raise ValueError(f"{folder}: {why_uneven(slices, off_voxels)}")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def positions_mm(slices: Sequence[Slice]) -> np.ndarray:
    """Return where slices are along their normal, in mm, (N,)."""
    normal = np.cross(*slices[0].orientation)
    return np.array([one.position @ normal for one in slices])


def check_doubles(folder: Path, slices: Sequence[Slice]) -> None:
    """Refuse slices, in order, of which two are at one place.

    Raises:
        ValueError: naming two.
    """
    gaps = np.diff(positions_mm(slices))
    doubles = np.count_nonzero(gaps < SAME_POSITION_MM)
    if doubles:
        raise ValueError(
            f"{folder}: {doubles} slice(s) at a place that another one has, such as "
            f"{beside(slices, int(gaps.argmin()))}; a file copied, or several phases under one series UID?"
        )


def why_uneven(slices: Sequence[Slice], off_voxels: np.ndarray) -> str:
    """Explain why slices, in order, are not an even grid; `off_voxels` (3, slices) is the distance of each from it."""
    gaps = np.diff(positions_mm(slices))
    closest, widest, typical = int(gaps.argmin()), int(gaps.argmax()), float(np.median(gaps))
    if np.abs(off_voxels[2]).max() <= GRID_TOLERANCE:
        return f"slices are shifted sideways by up to {np.abs(off_voxels[:2]).max():.2g} pixels, expected an even line"
    missing = np.rint(gaps / typical) - 1
    if missing.max() >= 1 and np.abs(gaps / typical - 1 - missing).max() <= WHOLE_GAP:
        return (
            f"{missing.sum():.0f} slice(s) missing: {beside(slices, widest)} are {gaps[widest]:.4g} mm apart, "
            f"others {typical:.4g} mm; expected an even spacing"
        )
    return (
        f"slices are unevenly spaced: {beside(slices, closest)} are {gaps[closest]:.4g} mm apart, "
        f"{beside(slices, widest)} {gaps[widest]:.4g} mm; expected the same everywhere"
    )


def beside(slices: Sequence[Slice], gap: int) -> str:
    """Return the names of the slices on both sides of a gap."""
    one, two = slices[gap], slices[gap + 1]
    if one.path == two.path:
        return f"frames {one.frame + 1} and {two.frame + 1} of {one.path.name}"
    return f"{one.path.name} and {two.path.name}"


def geometry_of(folder: Path, slices: Sequence[Slice], warn: Callable[[str], None]) -> Geometry:
    """Make the geometry of a volume of sorted slices, stored as (columns, rows, slices), with a NIfTI header.

    A tilted gantry's slices are sheared against each other; the sform holds that. A qform cannot and is left out then.

    Raises:
        ValueError: as `affine_of`.
    """
    affine = affine_of(folder, slices)
    shape = (slices[0].columns, slices[0].rows, len(slices))
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner", strip_shears=True)
    affine = header.get_sform()  # rounded to float32, as it will stand in the files written for this scan
    if voxels_apart(corners_mm(affine, shape) - corners_mm(header.get_qform(), shape), affine) > GRID_TOLERANCE:
        header.set_qform(None, code="unknown")
        warn_of_shear(affine, lambda message: warn(f"{folder}: {message}"))
    return Geometry(shape, affine, header, tuple(slices))
