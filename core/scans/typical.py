"""Compare a scan with the training cases: its extent in mm and the HU percentiles of its body."""

import numpy as np

from core.scans.geometry import Geometry

BODY_ABOVE_HU = -500  # voxels above it belong to the body; its HU percentiles tell CT from other things
HU_PERCENTILES = (5, 50, 95)


def hu_percentiles(voxels: np.ndarray) -> list[float]:
    """HU_PERCENTILES of the body's voxels in HU (of every fourth along each axis); of all where none is body."""
    sample = voxels[::4, ::4, ::4]
    body = sample[sample > BODY_ABOVE_HU]
    return np.percentile(body if body.size else sample, HU_PERCENTILES).tolist()


EXTENT_TOLERANCE = 0.25  # a scan may be this much smaller or larger than every training case before infer.py warns
HU_TOLERANCE = 50.0  # HU by which the body's HU percentiles may lie outside those of the training cases


# ---- What a scan is beside the training cases ------------------------------------------------------------------------


def differences(voxels: np.ndarray, geometry: Geometry, training_data: dict) -> list[str]:
    """In words, what sets a scan apart from all the cases that the network was trained on, theirs in brackets."""
    found = []
    extent = training_data["extent_mm"]
    for axis, mm, low, high in zip("XYZ", geometry.extent_mm, extent["min"], extent["max"], strict=True):
        if not low * (1 - EXTENT_TOLERANCE) <= mm <= high * (1 + EXTENT_TOLERANCE):
            found.append(f"it covers {mm:.0f} mm along {axis} ({low:.0f} to {high:.0f})")
    ranges = training_data["hu_percentiles"]
    rows = zip(training_data["percentiles"], hu_percentiles(voxels), ranges["min"], ranges["max"], strict=True)
    for percentile, hu, low, high in rows:
        if not low - HU_TOLERANCE <= hu <= high + HU_TOLERANCE:
            found.append(f"{percentile} % of its body lies below {hu:.0f} HU ({low:.0f} to {high:.0f})")
    return found
