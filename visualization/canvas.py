"""Lay out a figure in inches for pictures of one scan's slices.

`counts` below are those of `count_by_slice`, and `spacing_mm` is the distance of neighbouring voxels along X, Y, Z.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visualization.fonts import drawable
from visualization.slices import VIEWS
from visualization.style import apply_style

# Inches around a panel, for its letters; between the rows, for letters, scale bar and caption; and for the title.
MARGIN, ROW_GAP, TITLE_HEIGHT = 0.35, 0.85, 0.4


class Canvas:
    """A figure that is filled with axes placed in inches from its upper left corner."""

    def __init__(self, width: float, height: float, title: str):
        apply_style()
        self.figure = Figure(figsize=(width, height))
        self.figure.text(
            MARGIN / width, 1 - TITLE_HEIGHT / height, drawable(title), size=13, weight="bold", va="bottom"
        )

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes of that size in inches, their upper left corner at `left`, `top`."""
        w, h = self.figure.get_size_inches()
        return self.figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def box_extent_mm(box: Sequence[slice], spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the size of a box of voxels along X, Y, Z in mm."""
    return np.array([(cut.stop - cut.start) * mm for cut, mm in zip(box, spacing_mm, strict=True)])


def plane_of(axis: int, number: int, box: Sequence[slice]) -> tuple[int | slice, ...]:
    """Return the index of one slice of a volume, within a box."""
    return tuple(number if other == axis else cut for other, cut in enumerate(box))


def organs_present(counts: Sequence[np.ndarray]) -> list[int]:
    """Return the ids of the organs that have voxels."""
    return (np.flatnonzero(counts[0].sum(axis=0)[1:]) + 1).tolist()


def volume_column(counts: Sequence[np.ndarray], voxel_ml: float) -> list[str]:
    """Return each id's volume in mL as text; `voxel_ml` is that of one voxel."""
    return [f"{ml:,.1f}" for ml in counts[0].sum(axis=0) * voxel_ml]


def organs_shown(counts: Sequence[np.ndarray], chosen: Sequence[int]) -> set[int]:
    """Return the ids that the chosen slices of the three axes show."""
    return {organ for axis in VIEWS for organ in np.flatnonzero(counts[axis][chosen[axis]]).tolist()}
