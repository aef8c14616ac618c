"""Surfaces of organs from a label map: closed, smooth, of the organ's own volume, in mm.

    organ_mesh(labels, organ, affine) -> Mesh

Signed distances are meshed and not the voxels themselves, so that no steps are seen; where slices are thick the
distances are taken within each slice and run evenly from one to the next (Raya and Udupa 1990, shape-based
interpolation). Smoothing is Taubin's (1995), which shrinks little; what is lost is given back along the normals.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from skimage.measure import marching_cubes

STEP_MM = (1.2, 2.0)  # the finest and the coarsest mesh, for small and for large organs
STEPS_ACROSS = 40  # of a mesh across an organ, within STEP_MM
THICK = 2.0  # slices are thick when they lie so many times farther apart than the voxels in them
PAD = 3  # voxels of background around an organ, also where the scan cuts it: the surface is closed there
BLUR = 1.0  # standard deviation, in steps, that takes what is left of the voxels out of the distances
TAUBIN = (0.5, -0.53)  # one step forward, one back; Taubin's weights
TAUBIN_ROUNDS = 20
MAX_MOVE_MM = 0.3  # along the normals; farther, a surface of few voxels would turn inside out
CLOSED_UP = 0.01  # share of an organ's volume in its smoothed mesh, below which the mesh is no surface of it
CONTEXT_STEP_MM = (3.0, 4.0)  # of skin and bones, which are seen faintly
SKIN_HU, BONE_HU = -300.0, 200.0  # what is denser is no air; is bone, or metal
IN_PLANE = ndimage.generate_binary_structure(2, 1)[:, :, None]  # neighbours within an axial slice
MIN_BONE_ML = 3.0  # smaller pieces are calcified vessels or contrast medium
HALVINGS = 30  # in search of the level; each halves what is left of the range


@dataclass(frozen=True)
class Mesh:
    """A closed surface of triangles.

    Attributes:
        vertices: (N, 3) float64 in mm.
        faces: (M, 3) int32, counter-clockwise as seen from outside.
    """

    vertices: np.ndarray
    faces: np.ndarray

    @property
    def volume_ml(self) -> float:
        """Of what it encloses, in mL; negative when it is inside out."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6000)

    @property
    def normals(self) -> np.ndarray:
        """(N, 3): unit vectors outwards, those of the triangles around a vertex by their areas."""
        sums = np.zeros_like(self.vertices)
        for corner in range(3):
            np.add.at(sums, self.faces[:, corner], self.face_normals)
        return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(float).tiny)

    @property
    def face_normals(self) -> np.ndarray:
        """(M, 3): outwards, as long as twice a triangle's area in mm²."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        return np.cross(b - a, c - a)


def organ_mesh(
    labels: np.ndarray, organ: int, affine: np.ndarray, step_range_mm: tuple[float, float] = STEP_MM
) -> Mesh | None:
    """Make the surface of an organ.

    Args:
        labels: (X, Y, Z) ids.
        organ: the id to mesh.
        affine: (4, 4), from voxels to mm.
        step_range_mm: the finest and the coarsest mesh; what lies between goes by the organ's size.

    Returns:
        the mesh, of the volume of the organ's voxels to a few per cent; None when the label map has not the organ, or
        only specks that are lost at this step.
    """
    mask = labels == organ
    if not mask.any():
        return None
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    mask = np.pad(mask[box], PAD)
    first = np.array([cut.start for cut in box]) - PAD
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    voxel_mm3 = abs(np.linalg.det(affine[:3, :3]))
    step_mm = np.clip(np.cbrt(np.count_nonzero(mask) * voxel_mm3) / STEPS_ACROSS, *step_range_mm)
    field, voxels_a_step = resampled(signed_distance(mask, spacing_mm), spacing_mm, step_mm)
    field = ndimage.gaussian_filter(field, BLUR)
    level = level_of_volume(field, step_mm, np.count_nonzero(mask) / np.prod(voxels_a_step))
    try:
        places, faces, *_ = marching_cubes(field, level, gradient_direction="ascent", allow_degenerate=False)
    except RuntimeError:  # no surface at that level
        return None
    if not len(faces):
        return None
    voxels = places * voxels_a_step + first
    mesh = Mesh(voxels @ affine[:3, :3].T + affine[:3, 3], faces.astype(np.int32))
    if mesh.volume_ml < 0:
        mesh = Mesh(mesh.vertices, mesh.faces[:, ::-1])
    return grown_to(smoothed(mesh), np.count_nonzero(mask) * voxel_mm3 / 1000)


def context_meshes(voxels: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> tuple[Mesh | None, Mesh | None]:
    """Make the surfaces of bones and skin, to be shown around the organs; None for one that is missing.

    Args:
        voxels: (X, Y, Z) HU.
        labels: (X, Y, Z) ids on the same grid; no organ counts as bone, whatever contrast medium it holds.
        affine: (4, 4), from voxels to mm.
    """
    voxels, labels, affine = every_few_mm(voxels, labels, affine)
    body = body_mask(voxels)
    bones = (voxels > BONE_HU) & body & ~ndimage.binary_dilation(labels > 0, IN_PLANE)
    pieces, count = ndimage.label(bones)
    sizes_ml = np.bincount(pieces.ravel(), minlength=count + 1) * abs(np.linalg.det(affine[:3, :3])) / 1000
    sizes_ml[0] = 0
    masks = (sizes_ml > MIN_BONE_ML)[pieces], body
    return tuple(organ_mesh(mask.astype(np.uint8), 1, affine, CONTEXT_STEP_MM) for mask in masks)


def body_mask(voxels: np.ndarray) -> np.ndarray:
    """Find the patient in a scan, (X, Y, Z) HU: the largest object denser than air, filled, without table."""
    # What hangs together by a few voxels of a slice comes off.
    dense = ndimage.binary_opening(voxels > SKIN_HU, IN_PLANE, iterations=2)
    pieces, count = ndimage.label(dense)
    body = pieces == 1 + np.argmax(np.bincount(pieces.ravel(), minlength=count + 1)[1:]) if count else dense
    return np.stack([ndimage.binary_fill_holes(body[:, :, z]) for z in range(body.shape[2])], axis=2)


def every_few_mm(
    voxels: np.ndarray, labels: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Subsample scan, label map and affine to voxels about CONTEXT_STEP_MM apart."""
    steps = np.maximum(1, np.round(CONTEXT_STEP_MM[0] / np.linalg.norm(affine[:3, :3], axis=0))).astype(int)
    kept = tuple(slice(None, None, step) for step in steps)
    return voxels[kept], labels[kept], affine @ np.diag([*steps, 1])


def signed_distance(mask: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Return each voxel's distance in mm to the border of a mask, (X, Y, Z) float32: above 0 inside, below outside.

    Where one axis' spacing is THICK times the smallest, distances are those within the slices across it, cut off at its
    spacing; a slice without the organ lies that far outside.
    """
    thick = int(np.argmax(spacing_mm))
    if spacing_mm[thick] < THICK * spacing_mm.min():
        inside, outside = (ndimage.distance_transform_edt(part, spacing_mm) for part in (mask, ~mask))
        return (inside - outside).astype(np.float32)
    far = spacing_mm[thick]
    field = np.full(mask.shape, -far, np.float32)
    for plane, target in zip(np.moveaxis(mask, thick, 0), np.moveaxis(field, thick, 0), strict=True):
        if plane.any():
            inside, outside = (
                ndimage.distance_transform_edt(part, np.delete(spacing_mm, thick)) for part in (plane, ~plane)
            )
            target[:] = np.clip(inside - outside, -far, far)
    return field


def resampled(field: np.ndarray, spacing_mm: np.ndarray, step_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Resample a field to about `step_mm`, its ends fixed; return it and the old voxels per new one, (3,)."""
    last = np.array(field.shape) - 1
    steps = np.maximum(np.round(last * spacing_mm / step_mm), 1).astype(int)
    return ndimage.zoom(field, (steps + 1) / (last + 1), order=1, mode="nearest"), last / steps


def level_of_volume(field: np.ndarray, step_mm: float, volume: float) -> float:
    """Return the level above which a field of distances in mm encloses `volume` voxels with edges of `step_mm`."""
    low, high = float(field.min()), float(field.max())
    for _ in range(HALVINGS):
        level = (low + high) / 2
        # A voxel whose centre lies on the surface is half within it.
        if np.clip((field - level) / step_mm + 0.5, 0, 1).sum() > volume:
            low = level
        else:
            high = level
    return (low + high) / 2


def smoothed(mesh: Mesh) -> Mesh:
    """Smooth a mesh: move its vertices towards their neighbours' mean and back, repeatedly."""
    count = len(mesh.vertices)
    start, end = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]).T
    neighbours = sparse.csr_array((np.ones(len(start)), (start, end)), shape=(count, count))
    mean = sparse.diags_array(1 / np.maximum(neighbours.sum(axis=1), 1)) @ neighbours
    vertices = mesh.vertices
    for weight in TAUBIN * TAUBIN_ROUNDS:
        vertices = vertices + weight * (mean @ vertices - vertices)
    return Mesh(vertices, mesh.faces)


def grown_to(mesh: Mesh, volume_ml: float) -> Mesh | None:
    """Move a mesh along its normals by one distance everywhere, then scale it, so that it encloses a volume.

    None for a speck that smoothing has closed up: to scale it would blow it up, or turn it inside out.
    """
    area_mm2 = np.linalg.norm(mesh.face_normals, axis=1).sum() / 2
    move_mm = np.clip((volume_ml - mesh.volume_ml) * 1000 / area_mm2, -MAX_MOVE_MM, MAX_MOVE_MM)
    mesh = Mesh(mesh.vertices + move_mm * mesh.normals, mesh.faces)
    if not mesh.volume_ml > CLOSED_UP * volume_ml:
        return None
    centre = mesh.vertices.mean(axis=0)
    return Mesh(centre + (mesh.vertices - centre) * np.cbrt(volume_ml / mesh.volume_ml), mesh.faces)
