"""Measure each organ in a segmented scan: volume, HU, pieces, and where the scan's edge cuts it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from core.inference.restoring import CONNECTED
from core.scans.anatomy import ends_of
from core.scans.crop import Box
from core.scans.geometry import Geometry


@dataclass(frozen=True)
class Measures:
    """One organ in one label map; the default is an organ that was not found.

    Attributes:
        ml: its volume.
        hu_mean, hu_sd, hu_median: of its voxels' HU, NaN without voxels; the standard deviation of a population.
        pieces: into how many it falls, connected by face, edge or corner.
        touches_edge: the ends of the box that it touches, where it may go on outside: some of core.scans.anatomy.ENDS.
    """

    ml: float = 0.0
    hu_mean: float = math.nan
    hu_sd: float = math.nan
    hu_median: float = math.nan
    pieces: int = 0
    touches_edge: tuple[str, ...] = ()


def measure_organs(
    labels: np.ndarray, hu: np.ndarray, box: Box, geometry: Geometry, organs: Sequence[str]
) -> list[Measures]:
    """Measure each organ but the background, in the order of their ids.

    Args:
        labels: (X, Y, Z) ids below K in RAS+ order, of the whole scan; background outside of the box.
        hu: the HU of the voxels in the box, of any type.
        box: the part of the scan that was segmented.
        geometry: of the scan.
        organs: names by id, background first.
    """
    inside = labels[box]
    measured = []
    for organ, part in enumerate(ndimage.find_objects(inside, max_label=len(organs) - 1), start=1):
        if part is None:
            measured.append(Measures())
            continue
        mask = inside[part] == organ
        values = hu[part][mask]
        measured.append(
            Measures(
                ml=float(np.count_nonzero(mask) * geometry.voxel_ml),
                hu_mean=float(values.mean(dtype=np.float64)),
                hu_sd=float(values.std(dtype=np.float64)),
                hu_median=float(np.median(values)),
                pieces=ndimage.label(mask, CONNECTED)[1],
                touches_edge=ends_of(part, inside.shape),
            )
        )
    return measured
