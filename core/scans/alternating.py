"""Find volumes whose slices come from several acquisitions in turn, such as two contrast phases or two kernels."""

import math

import numpy as np

TISSUE_HU = (-200.0, 400.0)
SAMPLES = 96  # rows, and columns, of a slice that are looked at
MIN_VOXELS = 20  # of tissue in the sample of a slice; with fewer, its mean says little
MIN_SLICES = 8  # of tissue; in fewer slices, chance alternates too
# Acquisitions that may take turns, and the share that repeats when they do (three: of two equal steps and one back).
PERIODS = {2: 1.0, 3: math.sqrt(3) / 2}
# In 24 real scans, and in every second or third slice of them, changes repeat by at most 0.80 in a long scan and 0.75
# in a short one. Those of two phases that differ by 10 HU in organs and vessels repeat by 0.98 and more.
# Fewer slices tell nothing: in stretches of 4 to 7 of the same scans, one in a hundred repeats by 1.00. Four phases are
# found as two, each of which still alternates.
REGULAR = 0.8  # share of the changes between neighbours that repeats with the period
REGULAR_IF_FEW = 0.5  # more in few slices: this over the root of their number
LARGEST = 2.0  # changes count up to this multiple of their median, since one step between two blocks is no alternation
MIN_CHANGE_HU = 2.0  # of the mean of a slice
MIN_CHANGE_OF_ROUGHNESS = 0.03  # relative to its mean, or to 1 HU


def period_of_slices(voxels: np.ndarray) -> int:
    """Return how many acquisitions take turns along the slices, judged by mean HU and by roughness; 1 for one volume.

    Args:
        voxels: (X, Y, Z) in HU, slices along Z. Only a part of each slice is looked at.
    """
    if voxels.shape[2] < MIN_SLICES + 2:
        return 1
    step_x, step_y = (max(1, n // SAMPLES) for n in voxels.shape[:2])
    depth = voxels.shape[2]
    hu, roughness = Means(depth - 2), Means(depth)
    for plane in voxels[step_x // 2 :: step_x]:  # (Y, Z), one at a time, because memory holds one volume only
        before, here, after = (plane[start : plane.shape[0] - 2 + start : step_y] for start in (0, 1, 2))
        tissue = is_tissue(here)
        roughness.add(np.abs(2 * here - before - after), tissue & is_tissue(before) & is_tissue(after))
        between = here[:, 1:-1] - (here[:, :-2] + here[:, 2:]) / 2
        hu.add(between, tissue[:, 1:-1] & tissue[:, :-2] & tissue[:, 2:])
    rough = roughness.values()
    changes = rough[1:-1] - (rough[:-2] + rough[2:]) / 2
    for period in PERIODS:
        if repeats(hu.values(), period, MIN_CHANGE_HU):
            return period
        if repeats(changes, period, MIN_CHANGE_OF_ROUGHNESS * max(mean(rough), 1.0)):
            return period
    return 1


def is_tissue(hu: np.ndarray) -> np.ndarray:
    """Return True for each voxel of tissue."""
    return (hu > TISSUE_HU[0]) & (hu < TISSUE_HU[1])


class Means:
    """The mean of masked values for each slice, added up plane by plane."""

    def __init__(self, slices: int):
        """Begin without a value."""
        self.sums, self.counts = np.zeros(slices), np.zeros(slices, dtype=np.int64)

    def add(self, values: np.ndarray, mask: np.ndarray) -> None:
        """Add the values in a mask, (Y, Z)."""
        self.sums += np.where(mask, values, 0).sum(axis=0, dtype=np.float64)
        self.counts += np.count_nonzero(mask, axis=0)

    def values(self) -> np.ndarray:
        """Return the means, (Z,); NaN where there are too few values."""
        return np.where(self.counts >= MIN_VOXELS, self.sums / np.maximum(self.counts, 1), np.nan)


def mean(values: np.ndarray) -> float:
    """Return the mean of those values that are not NaN; infinite when there is none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.inf


def repeats(changes: np.ndarray, period: int, smallest: float) -> bool:
    """Return True when the changes between neighbours repeat with a period and are large enough.

    Args:
        changes: (N,) of each slice against its neighbours, NaN where unknown.
        period: of slices.
        smallest: median size of the changes.
    """
    known = np.isfinite(changes)
    if np.count_nonzero(known) < MIN_SLICES:
        return False
    typical = float(np.median(np.abs(changes[known])))
    if not typical > smallest:
        return False
    changes = np.clip(changes[known], -LARGEST * typical, LARGEST * typical)
    wave = np.exp(-2j * math.pi * np.flatnonzero(known) / period)
    regular = PERIODS[period] * (REGULAR + REGULAR_IF_FEW / math.sqrt(len(changes)))
    return bool(abs((changes * wave).sum()) >= regular * np.abs(changes).sum())
