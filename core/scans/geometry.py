"""Place a scan's voxels in the patient, and convert between the file's own axes and RAS+ order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from core.scans.placement import corners_mm, voxels_apart

if TYPE_CHECKING:
    from core.scans.dicom_slice import Slice

GRID_TOLERANCE = 0.1  # voxels by which the corners of two grids may differ and still count as the same


@dataclass(frozen=True, eq=False)
class Geometry:
    """Position and axis order of a file's voxels, with the conversion to RAS+ order and back.

    Attributes:
        stored_shape: the file's own three extents in voxels.
        affine: (4, 4), from the file's voxel indices to mm in the patient.
        header: the file's NIfTI header, carried into everything written for this scan.
        slices: of a DICOM series, along the third stored axis; empty for a NIfTI file.
    """

    stored_shape: tuple[int, int, int]
    affine: np.ndarray
    header: nib.Nifti1Header
    slices: tuple["Slice", ...] = ()

    @property
    def orientation(self) -> np.ndarray:
        """(3, 2): for each stored axis the RAS+ axis nearest to it and its direction, in nibabel's form."""
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
        """Size of the volume in mm, from outer face to outer face, in RAS+ order."""
        return tuple(n * mm for n, mm in zip(self.shape, self.spacing_mm, strict=True))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in mL; correct for sheared grids too."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def corners_mm(self) -> np.ndarray:
        """(8, 3): the centres of the eight corner voxels in mm, in the order of the RAS+ array."""
        return corners_mm(self.ras_affine, self.shape)

    @property
    def ras_affine(self) -> np.ndarray:
        """(4, 4): from voxels of the RAS+ array to mm in the patient."""
        return self.affine @ np.linalg.inv(inv_ornt_aff(ornt_transform(RAS, self.orientation), self.shape))

    def to_ras(self, stored: np.ndarray) -> np.ndarray:
        """Return a view of an array in the file's own three axes as (X, Y, Z) in RAS+ order; further axes stay."""
        return apply_orientation(stored, self.orientation)

    def from_ras(self, array: np.ndarray) -> np.ndarray:
        """Invert `to_ras`: return a view of (X, Y, Z) in the file's own axes; further axes stay where they are."""
        return apply_orientation(array, ornt_transform(RAS, self.orientation))

    def _in_ras_order(self, per_stored_axis: Sequence) -> tuple:
        return tuple(per_stored_axis[axis] for axis in np.argsort(self.orientation[:, 0]))


RAS = axcodes2ornt(("R", "A", "S"))


def check_same_grid(
    first: Geometry, second: Geometry, name: str, first_is: str = "the scan", second_is: str = "the label map"
) -> None:
    """Check that two files of a case have the same voxels of the patient; their storage orders may differ.

    Raises:
        ValueError: naming the case and both grids.
    """
    if first.shape == second.shape:
        apart_mm = first.corners_mm - second.corners_mm
        if voxels_apart(apart_mm, first.affine) <= GRID_TOLERANCE:
            return
    raise ValueError(
        f"{name}: {first_is} has {describe_grid(first)}, {second_is} {describe_grid(second)}; expected the same voxels"
    )


def describe_grid(geometry: Geometry) -> str:
    """Describe a grid in one line: shape, spacing, first and last voxel in RAS+ order."""
    shape = "x".join(map(str, geometry.shape))
    spacing = "x".join(f"{mm:.3g}" for mm in geometry.spacing_mm)
    first, last = (", ".join(f"{mm:.1f}" for mm in geometry.corners_mm[i]) for i in (0, -1))
    return f"{shape} voxels of {spacing} mm from ({first}) to ({last})"
