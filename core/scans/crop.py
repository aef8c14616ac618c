"""The box of a scan that the network sees: all of it, the body without the air around it, or the organs.

A box is three slices along X, Y, Z of an array in RAS+ order, and is never empty. What the network finds in it goes
back to the same voxels, so that no affine changes.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from core.scans.geometry import Geometry

Box = tuple[slice, slice, slice]

BODY_ABOVE_HU = -120.0  # fat and more; the air of a scan that was clipped to a window of -125 HU is below it, too
SAMPLES = 128  # the body is looked for on at least so many voxels along each axis, or on all of them
OPENING = 2  # samples by which the body is opened in X and Y: the table and its sheets come off
MARGIN = 0.1  # of the organs' box, added on each side: what the network that locates them may miss
LONGER = 1.25  # times what a network was trained on; a longer scan is searched in windows
MIN_PIECE = 0.02  # share of an organ's voxels, or of all that was found; a smaller piece does not widen the box


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box of a whole array."""
    return tuple(slice(0, n) for n in shape[:3])


def crop_box(crop: str, voxels: np.ndarray, labels: np.ndarray) -> Box:
    """Return the box that a labelled scan is cropped to.

    Args:
        crop: none, body or organs. Without any organ the box is the body's.
        voxels: (X, Y, Z) in HU.
        labels: (X, Y, Z), ids, 0 for background.
    """
    if crop == "none":
        return whole_box(voxels.shape)
    return (organs_box(labels) if crop == "organs" else None) or body_box(voxels)


def organs_box(labels: np.ndarray) -> Box | None:
    """Return the box of the organs in labels, (X, Y, Z), with MARGIN around it; None where there is none.

    Pieces below MIN_PIECE of their organ do not count: one stray voxel would widen the box.
    """
    kept = np.zeros(labels.shape, dtype=bool)
    for organ, part in enumerate(ndimage.find_objects(labels), start=1):
        if part:
            kept[part] |= large_pieces(labels[part] == organ)
    found = box_of(kept)
    return found and widened(found, MARGIN, labels.shape)


def large_pieces(mask: np.ndarray) -> np.ndarray:
    """Return a mask, (X, Y, Z), without pieces (by face, edge, corner) below MIN_PIECE of it; all if none is larger."""
    pieces, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    large = sizes >= max(1, MIN_PIECE * sizes.sum())
    return large[pieces] if large.any() else mask


def body_box(voxels: np.ndarray) -> Box:
    """Return the box of the body in a scan, (X, Y, Z) in HU: of its largest piece above BODY_ABOVE_HU.

    The whole scan where nothing is above it.
    """
    steps = [max(1, n // SAMPLES) for n in voxels.shape]
    mask = voxels[tuple(slice(None, None, step) for step in steps)] > BODY_ABOVE_HU
    in_plane = ndimage.generate_binary_structure(2, 1)[:, :, None]
    opened = ndimage.binary_opening(mask, in_plane, iterations=OPENING)
    pieces, count = ndimage.label(opened if opened.any() else mask)
    if not count:
        return whole_box(voxels.shape)
    largest = 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    box = zip(box_of(pieces == largest), steps, voxels.shape, strict=True)
    # A step more on either side, as the body may end between two samples.
    return tuple(slice(max(0, (cut.start - 1) * step + 1), min(n, cut.stop * step)) for cut, step, n in box)


def box_of(mask: np.ndarray) -> Box | None:
    """Return the smallest box around what is True in (X, Y, Z); None where nothing is."""
    return ndimage.find_objects(mask.astype(np.uint8), max_label=1)[0]


def located_box(labels: np.ndarray, searched: Box, shape: Sequence[int]) -> Box | None:
    """Return the organs' box in a scan from what a network found on its own, coarser grid.

    Args:
        labels: (X', Y', Z') ids on the network's grid, which covers `searched`. Pieces below MIN_PIECE of all that
            was found do not count.
        searched: box of the scan.
        shape: of the scan, (X, Y, Z).

    Returns:
        the box with MARGIN around it, or None where nothing was found.
    """
    found = box_of(large_pieces(labels > 0))
    if found is None:
        return None
    scaled = []
    for cut, n, within in zip(found, labels.shape, searched, strict=True):
        step = (within.stop - within.start) / n  # voxels of the scan for one of the grid
        scaled.append(slice(within.start + int(cut.start * step), within.start + int(np.ceil(cut.stop * step))))
    return widened(tuple(scaled), MARGIN, shape)


def windows_along_z(box: Box, slices: float) -> list[Box]:
    """Cut a box into windows of so many slices, each a quarter of its length above the one before.

    A box that is little longer stays whole, as LONGER says.
    """
    x, y, z = box
    if z.stop - z.start <= LONGER * slices:
        return [box]
    length = max(1, round(slices))
    count = 1 + math.ceil((z.stop - z.start - length) / (length / 4))
    starts = np.linspace(z.start, z.stop - length, count).round().astype(int).tolist()
    return [(x, y, slice(start, start + length)) for start in starts]


def widened(box: Box, share: float, shape: Sequence[int]) -> Box:
    """Return a box with `share` of its lengths added on each side, as far as an array of `shape` goes."""
    margins = [int(np.ceil(share * (cut.stop - cut.start))) for cut in box]
    return tuple(
        slice(max(0, cut.start - margin), min(n, cut.stop + margin))
        for cut, margin, n in zip(box, margins, shape, strict=True)
    )


def shape_of(box: Box) -> tuple[int, int, int]:
    """Return the lengths of a box in voxels."""
    return tuple(cut.stop - cut.start for cut in box)


def extent_of(box: Box, geometry: Geometry) -> tuple[float, float, float]:
    """Return the lengths of a box in mm, from outer face to outer face."""
    return tuple(n * mm for n, mm in zip(shape_of(box), geometry.spacing_mm, strict=True))
