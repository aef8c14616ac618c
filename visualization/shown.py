"""What is looked at: a scan and its label maps, read and checked once for every kind of picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.scans.files import case_id
from core.scans.geometry import Geometry, check_same_grid
from core.scans.volumes import load_labels, load_scan


@dataclass(frozen=True, eq=False)
class Shown:
    """A scan with the label maps to look at.

    Attributes:
        title: the case, as a rule.
        voxels: (X, Y, Z) float32, HU in RAS+ order.
        geometry: of the scan.
        label_maps: (X, Y, Z) uint8 ids on the same grid, by what they are called on the page.
        organs: names by id, background first.
    """

    title: str
    voxels: np.ndarray
    geometry: Geometry
    label_maps: dict[str, np.ndarray]
    organs: Sequence[str]


def read_shown(scan: Path, label_maps: dict[str, Path], organs: Sequence[str]) -> Shown:
    """Read a scan and its label maps, by what they are to be called.

    Raises:
        OSError, ValueError: when a file cannot be read, or does not lie on the scan's grid.
    """
    voxels, geometry = load_scan(scan)
    return Shown(title_of(case_id(scan)), voxels, geometry, read_label_maps(label_maps, geometry, organs), organs)


def title_of(case: str) -> str:
    """A case's name as text: file names may hold bytes that are no letters, which no font can draw."""
    return case.encode(errors="replace").decode()


def read_label_maps(paths: dict[str, Path], geometry: Geometry, organs: Sequence[str]) -> dict[str, np.ndarray]:
    """Read label maps of a scan, (X, Y, Z) uint8 in RAS+ order, by the same names.

    Raises:
        OSError, ValueError: when a file cannot be read, or does not lie on the scan's grid.
    """
    label_maps = {}
    for name, path in paths.items():
        label_maps[name], grid = load_labels(path, len(organs))
        check_same_grid(geometry, grid, path.name)
    return label_maps


def in_mm(geometry: Geometry, voxel: Sequence[int]) -> list[float]:
    """Where a voxel of the RAS+ array lies in the patient, in mm."""
    return (geometry.ras_affine @ [*voxel, 1])[:3].tolist()
