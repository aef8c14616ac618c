"""Read the affine of a NIfTI header, in mm: sform or qform, and units."""

import warnings
from collections.abc import Callable

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.nifti1 import xform_codes
from nibabel.spatialimages import HeaderDataError

from core.system.exits import one_line

SPACING_MM = (0.1, 20.0)  # between neighbouring voxels of any CT
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micron; of xyzt_units & UNIT_BITS
UNIT_BITS = 7
SAME_PLACE = 0.1  # voxels by which sform and qform may differ at a corner
EXACT_MM = 1e-6  # by which numbers of a qform may differ from whole ones
SHEAR_DEGREES = 0.5  # by which axes may be off right angles


def affine_of(
    header: nib.Nifti1Header, shape: tuple[int, int, int], assume_ras: bool, warn: Callable[[str], None]
) -> np.ndarray:
    """Return the affine from voxel indices to mm in the patient: the sform if its code is above 0, else the qform.

    An sform of zeros or of numbers that are not finite is marked as absent in the header when there is a qform. A code
    that the standard does not have becomes 1 there.

    Raises:
        ValueError: when both codes are 0 and `assume_ras` is False, or when a scan cannot have this affine.
    """
    replace_unknown_codes(header, warn)
    ways = {}
    if header["sform_code"] > 0:
        ways["sform"] = header.get_sform()
        finite = np.isfinite(ways["sform"]).all()
        if header["qform_code"] > 0 and not (finite and ways["sform"][:3, :3].any()):
            del ways["sform"]
            header["sform_code"] = 0  # label maps are written with this header, and others would read the sform
            warn(f"its sform {'is all zeros' if finite else 'has numbers that are not finite'}; the qform is used")
    if header["qform_code"] > 0:
        try:
            ways["qform"] = qform_of(header)
        except ValueError:
            if not ways:
                raise
    if not ways:
        if not assume_ras:
            raise ValueError(
                "does not say where its voxels lie (sform_code and qform_code are 0); where you know that they are in "
                "RAS+ order, give --assume-ras"
            )
        warn("does not say where its voxels lie; taken to be in RAS+ order")
        # Of the sizes only: a minus sign, which some writers leave, would turn an axis round.
        ways["assumed"] = np.diag([*np.abs(header["pixdim"][1:4].astype(float)), 1.0])
    mm = MM_PER_UNIT.get(int(header["xyzt_units"]) & UNIT_BITS, 1.0)
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        affine, *other = (affine * [[mm], [mm], [mm], [1.0]] for affine in ways.values())
    check_affine(affine)
    if other:
        warn_of_two_places(affine, *other, shape, warn)
    warn_of_shear(affine, warn)
    if "assumed" not in ways:
        warn_of_identity(affine, warn)
    return affine


def replace_unknown_codes(header: nib.Nifti1Header, warn: Callable[[str], None]) -> None:
    """Replace codes above 0 that nibabel does not know by 1 (scanner): it would write label maps without a place."""
    for name in ("sform_code", "qform_code"):
        if header[name] > 0 and int(header[name]) not in xform_codes.value_set():
            warn(f"has the unknown {name} {header[name]}; taken as 1 (scanner)")
            header[name] = 1


def qform_of(header: nib.Nifti1Header) -> np.ndarray:
    """Return the affine of quaternion, offset and spacing.

    Raises:
        ValueError: when the quaternion is not a rotation, or a number is not finite.
    """
    header = header.copy()
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 means 1 (the standard)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            affine = header.get_qform()
    except (HeaderDataError, ValueError) as error:
        raise ValueError(f"has a qform that is no rotation ({one_line(error)})") from error
    if not np.isfinite(affine).all():
        raise ValueError("has a qform with numbers that are not finite")
    return affine


def check_affine(affine: np.ndarray) -> None:
    """Check that an affine is finite and invertible and has the spacing of CT.

    Raises:
        ValueError: when it is not.
    """
    if not np.isfinite(affine).all():
        raise ValueError("has an affine with numbers that are not finite, so that the scan has no place in the patient")
    with np.errstate(over="ignore"):
        spacing = voxel_sizes(affine)
    low, high = SPACING_MM
    if not (spacing.min() >= low * (1 - 1e-6) and spacing.max() <= high * (1 + 1e-6)):
        listed = " x ".join(f"{mm:.4g}" for mm in spacing)
        raise ValueError(f"has voxels of {listed} mm, expected {low:g} to {high:g}; are its units (xyzt_units) right?")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-3 * spacing.prod():
        raise ValueError("has an affine that cannot be inverted: its axes lie in a plane")


def warn_of_two_places(
    used: np.ndarray, other: np.ndarray, shape: tuple[int, int, int], warn: Callable[[str], None]
) -> None:
    """Warn when sform and qform put the corners of a volume in different places."""
    apart_mm = corners_mm(used, shape) - corners_mm(other, shape)
    if not voxels_apart(apart_mm, used) <= SAME_PLACE:
        warn(f"its sform and qform put it in places {np.abs(apart_mm).max():.3g} mm apart; the sform is used")


def corners_mm(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the centres of a volume's eight corner voxels in mm, (8, 3)."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1).T
    return apply_affine(affine, corners)


def voxels_apart(apart_mm: np.ndarray, affine: np.ndarray) -> float:
    """Return the largest of (N, 3) differences between places, in voxels of each axis."""
    return float(np.abs(np.linalg.solve(affine[:3, :3], apart_mm.T)).max())


def warn_of_identity(affine: np.ndarray, warn: Callable[[str], None]) -> None:
    """Warn of an affine that no scanner writes, but many conversions that lose a scan's place: the identity.

    Some write it with X and Y turned round, which is the identity of DICOM's directions.
    """
    if np.allclose(np.abs(affine), np.eye(4), rtol=0, atol=EXACT_MM):
        turned = " with axes turned round" if (np.diag(affine) < 0).any() else ""
        warn(
            f"its affine is the identity{turned} (voxels of 1 mm, the first at 0, 0, 0): a conversion has probably "
            "lost its place in the patient, so that right and left, sizes and volumes cannot be trusted"
        )


def warn_of_shear(affine: np.ndarray, warn: Callable[[str], None]) -> None:
    """Warn when the axes are not at right angles, as with a tilted gantry; such scans are read correctly too."""
    degrees = shear_degrees(affine)
    if degrees > SHEAR_DEGREES:
        warn(f"its slices are sheared by {degrees:.1f} degrees (tilted gantry); the affine keeps that")


def shear_degrees(affine: np.ndarray) -> float:
    """Return by how many degrees two axes of an affine are off a right angle, at most."""
    axes = affine[:3, :3] / voxel_sizes(affine)
    return 90 - np.degrees(np.arccos(np.clip(np.abs(axes.T @ axes)[np.triu_indices(3, 1)], 0, 1))).min()
