"""Compare a scan with the training cases: its extent in mm and the HU percentiles of its body."""

import numpy as np

from core.scans.crop import Box, extent_of
from core.scans.geometry import Geometry

PERCENTILES_ABOVE_HU = -500  # HU percentiles are over the voxels above it: the body without air and lungs
HU_PERCENTILES = (5, 50, 95)
EXTENT_TOLERANCE = 0.25  # a scan may be this much smaller or larger than every training case before infer.py warns
HU_TOLERANCE = 50.0  # HU by which the body's HU percentiles may be outside those of the training cases


def hu_percentiles(voxels: np.ndarray) -> list[float]:
    """Return HU_PERCENTILES of the body's voxels (every fourth along each axis); of all voxels where none is body."""
    sample = voxels[::4, ::4, ::4]
    body = sample[sample > PERCENTILES_ABOVE_HU]
    return np.percentile(body if body.size else sample, HU_PERCENTILES).tolist()


def ranges_of(found: dict[str, list]) -> dict:
    """Return the smallest and the largest value of each name's (cases, n) numbers, and HU_PERCENTILES.

    Args:
        found: for `extent_mm` and `hu_percentiles` a row of numbers for each case; no row: no range.
    """
    ranges = {
        name: {"min": np.min(values, axis=0).tolist(), "max": np.max(values, axis=0).tolist()}
        for name, values in found.items()
        if values
    }
    return {"percentiles": list(HU_PERCENTILES), **ranges}


def differences(voxels: np.ndarray, geometry: Geometry, box: Box, training_data: dict) -> list[str]:
    """Describe in words how a scan differs from all training cases, with their range in brackets.

    Args:
        voxels: (X, Y, Z) in HU.
        geometry: of the scan.
        box: the part of it that the network sees.
        training_data: from `ranges_of`.
    """
    found = []
    extent = training_data["extent_mm"]
    for axis, mm, low, high in zip("XYZ", extent_of(box, geometry), extent["min"], extent["max"], strict=True):
        if not low * (1 - EXTENT_TOLERANCE) <= mm <= high * (1 + EXTENT_TOLERANCE):
            found.append(f"it covers {mm:.0f} mm along {axis} ({low:.0f} to {high:.0f})")
    ranges = training_data["hu_percentiles"]
    rows = zip(training_data["percentiles"], hu_percentiles(voxels), ranges["min"], ranges["max"], strict=True)
    for percentile, hu, low, high in rows:
        if not low - HU_TOLERANCE <= hu <= high + HU_TOLERANCE:
            found.append(f"{percentile} % of its body lies below {hu:.0f} HU ({low:.0f} to {high:.0f})")
    return found
