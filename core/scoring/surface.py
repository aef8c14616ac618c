"""Distances between the surfaces of two masks: arrays in, numbers out.

The definitions are those of google-deepmind/surface-distance (Nikolov et al. 2018, https://arxiv.org/abs/1809.04430,
section "Performance metrics"). Surface points are corners of voxels: a corner is one when its eight voxels are neither
all inside nor all outside. Each point carries the area in mm2 of the piece of surface that passes through the cube
between the eight voxels' centres. Scores weigh each point's distance to the other surface by its area.

    reference   prediction   nsd    hausdorff_mm, mean_distance_mm
    organ       organ        0..1   0..
    organ       -            0      inf
    -           organ        0      inf
    -           -            NaN    NaN
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects
from scipy.spatial import cKDTree

# Corners of the box for each point asked for, below which a distance transform is faster than a tree: a point costs a
# tree 1 to 6 us, a corner costs a transform 0.05 to 0.13 us (RESULTS.md).
TRANSFORM_BELOW = 30
POINTS_PER_LEAF = 32  # of a tree; 10 to 20 % faster than scipy's 16
ROUNDING = 1e-12  # share of the area; rounding errors below it do not move a percentile
CORNERS = tuple(product((0, 1), repeat=3))  # of a cube, in the order of a code's bits, the highest first


@dataclass(frozen=True)
class Surfaces:
    """Two surfaces: each point's distance in mm to the other surface, and the area in mm2 that it represents.

    Four float64 arrays, (N,) for the reference's points and (M,) for the prediction's. When one mask is empty the
    other's distances are infinite.
    """

    reference_mm: np.ndarray
    reference_mm2: np.ndarray
    prediction_mm: np.ndarray
    prediction_mm2: np.ndarray


def nsd(surfaces: Surfaces, tolerance_mm: float) -> float:
    """Return normalised surface Dice, 0..1: the share of both surfaces' area within `tolerance_mm` of the other."""
    total = surfaces.reference_mm2.sum() + surfaces.prediction_mm2.sum()
    if total == 0:
        return float("nan")
    close = surfaces.reference_mm2[surfaces.reference_mm <= tolerance_mm].sum()
    close += surfaces.prediction_mm2[surfaces.prediction_mm <= tolerance_mm].sum()
    return float(close / total)


def hausdorff_mm(surfaces: Surfaces, percent: float = 100.0) -> float:
    """Return the distance in mm that `percent` % of each surface's area keeps to the other; 95 for HD95, 100 for HD."""
    if not len(surfaces.reference_mm) and not len(surfaces.prediction_mm):
        return float("nan")
    return max(
        percentile_mm(surfaces.reference_mm, surfaces.reference_mm2, percent),
        percentile_mm(surfaces.prediction_mm, surfaces.prediction_mm2, percent),
    )


def percentile_mm(distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float) -> float:
    """Return the smallest distance that covers `percent` % of the area; infinite when there is no surface."""
    if not len(distances_mm):
        return float("inf")
    order = np.argsort(distances_mm)
    covered = np.cumsum(areas_mm2[order])
    enough = np.searchsorted(covered, covered[-1] * (percent / 100 - ROUNDING))
    return float(distances_mm[order[enough]])


def mean_distance_mm(surfaces: Surfaces) -> float:
    """Return the mean distance in mm to the other surface, over the area of both."""
    total = surfaces.reference_mm2.sum() + surfaces.prediction_mm2.sum()
    if total == 0:
        return float("nan")
    weighted = surfaces.reference_mm @ surfaces.reference_mm2 + surfaces.prediction_mm @ surfaces.prediction_mm2
    return float(weighted / total)


def organ_surfaces(
    reference: np.ndarray, prediction: np.ndarray, classes: int, spacing_mm: Sequence[float], threads: int = 1
) -> Iterator[Surfaces]:
    """Yield the surfaces of organ 1, 2, ..., each computed in the box that holds it in both label maps.

    Args:
        reference: label map (X, Y, Z), integers below `classes`.
        prediction: label map of the same shape.
        classes: K, the number of classes with background.
        spacing_mm: distance of neighbouring voxels along X, Y, Z.
        threads: for nearest neighbours; they do not change the numbers.

    Raises:
        ValueError: when the shapes differ.
    """
    check_shapes(reference, prediction)
    boxes = zip(find_objects(reference, classes - 1), find_objects(prediction, classes - 1), strict=True)
    for organ, both in enumerate(boxes, start=1):
        box = union(both)
        yield surfaces_of(reference[box] == organ, prediction[box] == organ, spacing_mm, threads)


def union(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    """Return the smallest box that holds all boxes given; an empty one when all are None."""
    boxes = [box for box in boxes if box is not None]
    if not boxes:
        return (slice(0, 0),) * 3
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def surfaces_of(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], threads: int = 1
) -> Surfaces:
    """Return the surfaces of two masks and their distances.

    Args:
        reference: mask (X, Y, Z) bool; everything outside the array is outside the organ.
        prediction: mask of the same shape.
        spacing_mm: distance of neighbouring voxels along X, Y, Z.
        threads: for nearest neighbours; they do not change the numbers.

    Raises:
        ValueError: when the shapes differ.
    """
    check_shapes(reference, prediction)
    spacing_mm = np.asarray(spacing_mm, dtype=np.float64)
    shape = tuple(voxels + 1 for voxels in reference.shape)
    reference_points, reference_codes = surface_points(reference)
    prediction_points, prediction_codes = surface_points(prediction)
    there_mm = distances_mm(reference_points, prediction_points, shape, spacing_mm, threads)
    back_mm = distances_mm(prediction_points, reference_points, shape, spacing_mm, threads)
    areas_mm2 = element_areas_mm2(spacing_mm)
    return Surfaces(there_mm, areas_mm2[reference_codes], back_mm, areas_mm2[prediction_codes])


def check_shapes(reference: np.ndarray, prediction: np.ndarray) -> None:
    """Refuse two arrays of different shapes by a ValueError."""
    if reference.shape != prediction.shape:
        raise ValueError(f"reference of shape {reference.shape}, prediction of shape {prediction.shape}")


# ---- Surface points and their areas ----------------------------------------------------------------------------------


def surface_points(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of the grid that are points of a mask's surface.

    Args:
        mask: (X, Y, Z) bool.

    Returns:
        points: (N,) int64, ascending indices into the raveled (X + 1, Y + 1, Z + 1) grid of corners.
        codes: (N,) uint8, the neighbour code of each.
    """
    codes = neighbour_codes(mask).ravel()
    points = np.flatnonzero((codes != 0) & (codes != 255))
    return points, codes[points]


def neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Return for each corner of the grid which of its eight voxels are inside, as bits in the order of CORNERS.

    Args:
        mask: (X, Y, Z) bool.

    Returns:
        (X + 1, Y + 1, Z + 1) uint8.
    """
    codes = np.pad(mask.astype(bool, copy=False), 1).view(np.uint8)
    for bits, axis in ((1, 2), (2, 1), (4, 0)):
        along = codes.swapaxes(0, axis)
        codes = (along[:-1] << bits | along[1:]).swapaxes(0, axis)
    return np.ascontiguousarray(codes)


def element_areas_mm2(spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the area in mm2 of the piece of surface within a cube of eight voxel centres, (256,) by code."""
    stretch = np.prod(spacing_mm) / np.array(spacing_mm)  # of a normal's parts: the X part is an area in the Y-Z plane
    codes, normals = element_triangles()
    return np.bincount(codes, np.linalg.norm(normals * stretch, axis=1), minlength=256)


@cache
def element_triangles() -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles of the piece of surface within a cube of eight voxel centres, for all neighbour codes.

    The pieces are those of marching cubes (Lorensen and Cline 1987) with vertices half way between voxel centres. The
    vertices of a piece form loops around its corners. Most loops are flat; a crooked one is cut into the triangles
    with the largest area in a cube of equal sides, whatever the spacing.

    Returns:
        codes: (N,) the neighbour code that each triangle belongs to.
        normals: (N, 3), as long as the triangle's area in a cube whose sides are 1.
    """
    codes, normals = [], []
    for code in range(1, 255):
        for loop in surface_loops(code):
            normals.append(max(triangulations(loop), key=lambda cut: np.linalg.norm(cut, axis=1).sum()))
            codes += [code] * len(normals[-1])
    return np.array(codes), np.concatenate(normals)


def surface_loops(code: int) -> list[np.ndarray]:
    """Return the closed loops where the surface of a code cuts the unit cube's faces, each (N, 3) in order."""
    inside = {corner: bool(code & 128 >> bit) for bit, corner in enumerate(CORNERS)}
    if code.bit_count() > 4:  # inside and outside have the same surface; the fewer corners decide how it runs
        inside = {corner: not value for corner, value in inside.items()}
    following = {}  # from each edge that the surface cuts, to the next one around a corner that is inside
    for face in cube_faces():
        for i in range(4):
            if inside[face[i]] and not inside[face[i - 1]]:
                # Two opposite corners of a face are cut off one by one, never joined.
                last = next(j for j in range(i, i + 4) if not inside[face[(j + 1) % 4]])
                following[frozenset((face[i - 1], face[i]))] = frozenset((face[last % 4], face[(last + 1) % 4]))
    loops = []
    while following:
        start, edge = following.popitem()
        loop = [start]
        while edge != start:
            loop.append(edge)
            edge = following.pop(edge)
        loops.append(np.array([np.mean(list(edge), axis=0) for edge in loop]))
    return loops


def cube_faces() -> Iterator[list[tuple[int, int, int]]]:
    """Yield the four corners of each of a cube's six faces, counter-clockwise as seen from outside."""
    for axis, side in product(range(3), (0, 1)):
        ring = [np.roll((side, *corner), axis) for corner in ((0, 0), (1, 0), (1, 1), (0, 1))]
        yield [tuple(map(int, corner)) for corner in (ring if side else ring[::-1])]


def triangulations(loop: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each way to cut a loop, (N, 3), into triangles their normals, (N - 2, 3), as long as the areas."""
    if len(loop) < 3:
        yield np.empty((0, 3))
        return
    for k in range(1, len(loop) - 1):  # the triangle on the side from the first point to the last
        normal = np.cross(loop[k] - loop[0], loop[-1] - loop[0])[None] / 2
        for one, other in product(triangulations(loop[: k + 1]), triangulations(loop[k:])):
            yield np.concatenate([normal, one, other])


# ---- Nearest points --------------------------------------------------------------------------------------------------


def distances_mm(
    points: np.ndarray, others: np.ndarray, shape: tuple[int, int, int], spacing_mm: Sequence[float], threads: int
) -> np.ndarray:
    """Return the distance in mm of each point to the nearest of the others, (N,) float64.

    Args:
        points: (N,) indices into the raveled grid of corners.
        others: (M,) likewise; with none of them, every distance is infinite.
        shape: of that grid.
        spacing_mm: distance of neighbouring corners along X, Y, Z.
        threads: for the tree.
    """
    if not len(others):
        return np.full(len(points), np.inf)
    distances = np.zeros(len(points))
    free = np.ones(prod(shape), dtype=bool)  # corners that are none of the others
    free[others] = False
    apart = np.flatnonzero(free[points])
    if not len(apart):
        return distances
    asked = unravel(points[apart], shape)
    if len(free) < TRANSFORM_BELOW * len(apart):
        nearest = nearest_by_transform(asked, free.reshape(shape), spacing_mm)
    else:
        nearest = nearest_by_tree(asked, unravel(others, shape), spacing_mm, threads)
    # From whole steps: two points 10 voxels of 0.7 mm apart are 7 mm apart anywhere on the grid.
    distances[apart] = np.linalg.norm((asked - nearest) * spacing_mm, axis=1)
    return distances


def unravel(points: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Turn indices into a raveled grid, (N,), into indices along X, Y, Z: (N, 3) int32."""
    return np.stack(np.unravel_index(points, shape), axis=1, dtype=np.int32)


def nearest_by_tree(asked: np.ndarray, others: np.ndarray, spacing_mm: Sequence[float], threads: int) -> np.ndarray:
    """Return for each point asked for, (N, 3), the nearest of the others, (M, 3); fast for few points."""
    tree = cKDTree(others * spacing_mm, POINTS_PER_LEAF, balanced_tree=False, compact_nodes=False)
    return others[tree.query(asked * spacing_mm, workers=threads)[1]]


def nearest_by_transform(asked: np.ndarray, free: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Do the same as `nearest_by_tree`; the others are the False of a grid (X, Y, Z).

    The grid bounds its time and memory, however many points there are.
    """
    nearest = distance_transform_edt(free, sampling=spacing_mm, return_distances=False, return_indices=True)
    return nearest[:, *asked.T].T
